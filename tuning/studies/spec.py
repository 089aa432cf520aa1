"""Specify studies: a list of trials, or a space that trials are drawn from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llgbm.runtime import UserError, content_hash
from llgbm.terms.names import NAMED, PREFIX
from llgbm.training import VERSION as TRAINING_VERSION
from llgbm.training import TrainingConfig
from llgbm.world import VERSIONS as WORLD_VERSIONS
from llgbm.world import WorldConfig
from tuning.studies.terms import short_name

VAL_METRICS = ("val/accuracy", "val/delta_cosine")
SAMPLERS = ("optuna", "random")
Range = tuple[float, float]
LONGEST_NAME = 200
# The training of a trial, but for what its study changes.
TRAINING = TrainingConfig(steps=400, learning_rate=3e-3)


@dataclass(frozen=True)
class TrialSpec:
    """One trial: a named configuration, the world that it is trained in, and a note on its purpose."""

    name: str
    config: TrainingConfig
    world: WorldConfig
    note: str = ""

    @property
    def id(self) -> str:
        """Return hash(config, seed, data, version of the code that computes its numbers)."""
        return content_hash(
            "trial", TRAINING_VERSION, WORLD_VERSIONS, self.config, self.world, length=12
        )

    @property
    def label(self) -> str:
        """Return configuration, size and seed for people."""
        world = f", world {self.world.seed}" * bool(self.world.seed)
        return f"{self.name!r} on {self.config.model_size}{world}, seed {self.config.seed}"


@dataclass(frozen=True)
class SearchSpace:
    """Log-uniform ranges of λ_w, λ_d, the rate and weights of terms; equal ends fix one. A point is run on every seed.

    A point's value is its mean over the seeds, of each of the objectives. Raises UserError for an unknown sampler or
    objective, a range that is none, and a space with nothing to search.
    """

    base: TrialSpec
    seeds: tuple[int, ...] = (0, 1)
    lambda_weight: Range = (0.03, 3.0)
    lambda_delta: Range = (0.03, 3.0)
    learning_rate: Range = (5e-4, 8e-3)
    terms: Mapping[str, Range] = field(default_factory=dict)
    sampler: str = SAMPLERS[0]
    objectives: tuple[str, ...] = ("val/accuracy",)

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise UserError(f"unknown sampler {self.sampler!r}; there are: {', '.join(SAMPLERS)}")
        for name in self.objectives:
            check_metric(name)
        for name, values in (("objectives", self.objectives), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise UserError(
                    f"the {name} of a search are {list(values)}: give at least one, and none twice"
                )
        for name, ends in self._fields.items():
            _check_range(name, ends)
        if not self.ranges:
            raise UserError(
                "this search has nothing to search: give at least one range with two different ends"
            )

    @property
    def _fields(self) -> dict[str, Range]:
        named = {
            name: getattr(self, name) for name in ("lambda_weight", "lambda_delta", "learning_rate")
        }
        return named | {f"{PREFIX}{name}": ends for name, ends in self.terms.items()}

    @property
    def weights(self) -> dict[str, Range]:
        """Return the ranges of the loss terms' weights by name."""
        return {name: getattr(self, own) for name, own in NAMED.items()} | dict(self.terms)

    @property
    def ranges(self) -> dict[str, Range]:
        """Return the fields that are searched."""
        return {name: ends for name, ends in self._fields.items() if ends[0] < ends[1]}

    @property
    def identity(self) -> list[Any]:
        """Return what the numbers of a search depend on, which excludes notes."""
        return [self.base.id, self.seeds, self._fields, self.sampler, self.objectives]

    def describe(self) -> str:
        """Return one sentence: ranges, sampler, objectives and seeds."""
        ranges = ", ".join(
            f"{name} from {low:g} to {high:g}" for name, (low, high) in self.ranges.items()
        )
        return (
            f"search by {self.sampler} over {ranges} (log scale), for the mean {' and '.join(self.objectives)} "
            f"over seeds {', '.join(map(str, self.seeds))}."
        )

    def trials(self, point: Mapping[str, float]) -> tuple[TrialSpec, ...]:
        """Return the trials of a point, one per seed. Values are rounded to six digits, so that the name is exact."""
        values: dict[str, Any] = {
            name: float(f"{point.get(name, ends[0]):.6g}") for name, ends in self._fields.items()
        }
        terms = {name: values.pop(f"{PREFIX}{name}") for name in sorted(self.terms)}
        name = "w={lambda_weight:g} d={lambda_delta:g} lr={learning_rate:g}".format(**values)
        name += "".join(f" {short_name(term)}={value:g}" for term, value in terms.items())
        note = f"a point of the {self.describe()} {self.base.note}".strip()
        config = replace(self.base.config, **values, terms={**self.base.config.terms, **terms})
        return tuple(
            replace(self.base, name=name, config=replace(config, seed=s), note=note)
            for s in self.seeds
        )


def _check_range(name: str, ends: Range) -> None:
    low, high = ends
    if not (math.isfinite(low) and math.isfinite(high) and 0 <= low <= high):
        raise UserError(
            f"{name} cannot be searched from {low:g} to {high:g}: the ends must be finite and in order"
        )
    if low == 0 < high:
        raise UserError(
            f"{name} is searched on a log scale and cannot start at 0: start at 0.01, say, or fix it at 0"
        )


def check_metric(name: str) -> None:
    """Raise UserError unless a generator may be chosen by this metric."""
    if name not in VAL_METRICS:
        raise UserError(
            f"unknown metric {name!r}; a generator is chosen by: {', '.join(VAL_METRICS)}"
        )


def check_name(what: str, name: str) -> None:
    """Raise UserError for a name that is empty, too long for a line, or holds what cannot be printed."""
    if not (
        isinstance(name, str) and name.strip() and name.isprintable() and len(name) <= LONGEST_NAME
    ):
        shown = f"{name!r:.60}" if name else "empty"
        raise UserError(
            f"the name of a {what} is {shown}: give a text of one line and at most {LONGEST_NAME} letters"
        )


@dataclass(frozen=True)
class Study:
    """Trials under one name, or a space to draw them from; the best is chosen by `metric`, on validation tasks.

    Raises UserError for a study without trials, the same trial twice, two configurations of one name, a name that
    cannot be shown, or a metric that does not exist.
    """

    name: str
    trials: tuple[TrialSpec, ...] = ()
    metric: str = "val/accuracy"
    note: str = ""
    space: SearchSpace | None = None

    def __post_init__(self) -> None:
        check_metric(self.metric)
        _check_types(self)
        if not self.trials and self.space is None:
            raise UserError(
                f"study {self.name} has no trial: give at least one size, one seed and one λ above 0"
            )
        check_name("study", self.name)
        seen: dict[str, TrialSpec] = {}
        named: dict[tuple[Any, ...], TrialSpec] = {}
        for trial in self.trials:
            check_name("configuration", trial.name)
            if trial.id in seen:
                raise UserError(
                    f"study {self.name} has the same trial twice ({seen[trial.id].label} and {trial.label}): "
                    "give each configuration, λ, size and seed once"
                )
            seen[trial.id] = trial
            place = (trial.name, trial.config.model_size, trial.world.seed, trial.config.seed)
            if named.setdefault(place, trial) is not trial:
                raise UserError(
                    f"study {self.name} has two configurations of the name {trial.name!r}: give each its own"
                )

    @property
    def id(self) -> str:
        """Return hash(name, trials); of a search hash(name, space), independent of the trials drawn so far."""
        content = [trial.id for trial in self.trials]
        if self.space:
            content = self.space.identity
        return content_hash("study", self.name, content, length=12)

    @property
    def worlds(self) -> tuple[WorldConfig, ...]:
        """Return the worlds that its trials need, each once."""
        worlds = [trial.world for trial in self.trials]
        if self.space:
            worlds.insert(0, self.space.base.world)
        return tuple(dict.fromkeys(worlds))


def _check_types(study: Study) -> None:
    if not isinstance(study.trials, tuple) or not all(
        isinstance(trial, TrialSpec) for trial in study.trials
    ):
        raise UserError(
            f"the trials of study {study.name} must be a tuple of TrialSpec: make them with make_trials()"
        )
    if study.space is not None and not isinstance(study.space, SearchSpace):
        raise UserError(
            f"the space of study {study.name} must be a SearchSpace, not a {type(study.space).__name__}"
        )
