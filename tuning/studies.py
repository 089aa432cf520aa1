"""Studies: named functions that return a study, a frozen value that says what is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from llgbm.models import PretrainConfig
from llgbm.runtime import UserError, content_hash
from llgbm.suites import SyntheticSuite
from llgbm.teachers import TeacherConfig
from llgbm.training import VERSION as TRAINING_VERSION
from llgbm.training import TrainingConfig
from llgbm.world import VERSIONS as WORLD_VERSIONS
from llgbm.world import WorldConfig

CONFIGURATIONS = {"multitask": (0.3, 1.0), "delta-only": (0.0, 1.0), "weight-only": (1.0, 0.0)}


@dataclass(frozen=True)
class TrialSpec:
    """One trial: a configuration with its name, and the world that it is trained in."""

    name: str
    config: TrainingConfig
    world: WorldConfig

    @property
    def id(self) -> str:
        """hash(config, seed, data, version of the code that makes its numbers)."""
        return content_hash("trial", TRAINING_VERSION, WORLD_VERSIONS, self.config, self.world, length=12)


@dataclass(frozen=True)
class Study:
    """Trials under one name."""

    name: str
    trials: tuple[TrialSpec, ...]

    def __post_init__(self) -> None:
        if not self.trials:
            raise UserError(f"study {self.name} has no trial: give at least one size, one seed and one λ above 0")
        ids = [trial.id for trial in self.trials]
        if len(set(ids)) != len(ids):
            raise UserError(f"study {self.name} has the same trial twice: give each λ, size and seed once")

    @property
    def id(self) -> str:
        return content_hash("study", self.name, [trial.id for trial in self.trials], length=12)

    @property
    def worlds(self) -> tuple[WorldConfig, ...]:
        """The worlds that its trials need, each once."""
        return tuple(dict.fromkeys(trial.world for trial in self.trials))


@dataclass(frozen=True)
class StudyOptions:
    """What a caller may change about a named study; None leaves the study's own choice."""

    model_sizes: tuple[str, ...] = ("nano",)
    lambda_weight: tuple[float, ...] | None = None
    lambda_delta: tuple[float, ...] | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    delta_probes: str = "trajectory"
    encoder: str = "minilm"
    generator: str = "default"
    smoke: bool = False


def phase_4_5(options: StudyOptions) -> Study:
    """Multitask, delta-only and weight-only, each on every seed: does behavioural supervision help?"""
    return Study("phase_4_5", _trials(options))


STUDIES: dict[str, Callable[[StudyOptions], Study]] = {"phase_4_5": phase_4_5}


def make_study(name: str, options: StudyOptions) -> Study:
    """A study by name. Raises UserError for an unknown name, size, λ or probe set."""
    if name not in STUDIES:
        raise UserError(f"unknown study {name!r}; there are: {', '.join(STUDIES)}")
    return STUDIES[name](options)


def _trials(options: StudyOptions) -> tuple[TrialSpec, ...]:
    return tuple(
        TrialSpec(name, _config(options, size, weights, seed), _world(options, size))
        for size in options.model_sizes
        for name, weights in _lambdas(options).items()
        for seed in options.seeds
    )


def _lambdas(options: StudyOptions) -> dict[str, tuple[float, float]]:
    """The study's configurations, or the grid of the λ given; the pair (0, 0) of a larger grid is left out."""
    if options.lambda_weight is None and options.lambda_delta is None:
        return CONFIGURATIONS
    weights, deltas = options.lambda_weight or (1.0,), options.lambda_delta or (0.0,)
    pairs = [(w, d) for w in weights for d in deltas]
    if len(pairs) > 1:
        pairs = [pair for pair in pairs if pair != (0, 0)]
    return {_pair_name(*pair): pair for pair in pairs}


def _pair_name(weight: float, delta: float) -> str:
    kind = "multitask" if weight and delta else "weight-only" if weight else "delta-only"
    return f"{kind} w={weight:g} d={delta:g}"


def _config(options: StudyOptions, size: str, weights: tuple[float, float], seed: int) -> TrainingConfig:
    config = TrainingConfig(
        lambda_weight=weights[0],
        lambda_delta=weights[1],
        seed=seed,
        use_small_model=size == "nano",
        model_size=size,
        delta_probes=options.delta_probes,
    )
    config = replace(config, generator=replace(config.generator, name=options.generator))
    if options.smoke:
        config = replace(config, steps=20, batch_size=4, eval_every=10, n_probes=2, n_prompts=4)
    return config if options.steps is None else replace(config, steps=options.steps)


def _world(options: StudyOptions, size: str) -> WorldConfig:
    world = WorldConfig(size=size, encoder=options.encoder, delta_probes=options.delta_probes)
    return smoke_world(world) if options.smoke else world


def smoke_world(world: WorldConfig) -> WorldConfig:
    """The same kind of world at toy settings: it shows that everything runs, and nothing about the method."""
    return replace(
        world,
        smoke=True,
        suite=SyntheticSuite(n_operations=5, n_formats=4, n_val=2, n_test=4),
        pretrain=PretrainConfig(steps=60, batch_size=32),
        teachers=TeacherConfig(steps=15, examples=4, condition_train=8, condition_evaluation=4, trajectories=4),
        eval_examples=4,
    )
