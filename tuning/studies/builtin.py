"""Define the built-in studies, and what own ones are made of.

A study is a list of trials, or a space that a search draws trials from. Configurations are made of variants, each of
which changes a few fields of `TrainingConfig`; a new study calls its parent and changes what differs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llgbm.generator import GENERATORS, read_generator
from llgbm.models.load import FAMILIES
from llgbm.runtime import UserError
from llgbm.training import TrainingConfig
from llgbm.world import WorldConfig, smoke_world
from tuning.studies.spec import TRAINING, SearchSpace, Study, TrialSpec
from tuning.studies.terms import weight_grid, weights_name
from tuning.studies.variants import (
    Variant,
    amount_axes,
    amount_variant,
    amounts,
    check_mixtures,
    condition_axes,
    crossed,
    mixup_variants,
    of_weights,
    settled_amounts,
    unnamed_if_single,
)

SEEDS = (0, 1, 2)
WORLD_SEEDS = (0, 1, 2)
SMALL_SIZES = tuple(small for small, _ in FAMILIES.values())


@dataclass(frozen=True)
class StudyOptions:
    """Overrides of a named study; None keeps the study's own choice."""

    model_sizes: tuple[str, ...] | None = None
    lambda_weight: tuple[float, ...] | None = None
    lambda_delta: tuple[float, ...] | None = None
    learning_rates: tuple[float, ...] | None = None
    generators: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    world_seeds: tuple[int, ...] | None = None
    steps: int | None = None
    batch_size: int | None = None
    activation_checkpointing: bool | None = None
    probe_chunk: int | None = None
    delta_probes: str = "trajectory"
    encoder: str = "minilm"
    smoke: bool = False
    own_worlds: tuple[WorldConfig, ...] = ()
    n_probes: int | None = None
    trajectories: int | None = None
    trajectory_tokens: int | None = None
    terms: Mapping[str, tuple[float, ...]] | None = None
    term_options: Mapping[str, Any] = field(default_factory=dict)
    conditions: tuple[str, ...] | None = None
    prompt_tokens: tuple[int, ...] | None = None
    n_prompts_min: tuple[int, ...] | None = None
    mixup: tuple[float, ...] | None = None
    n_tasks: tuple[int, ...] | None = None
    n_teachers: tuple[int, ...] | None = None
    n_trajectories: tuple[int, ...] | None = None
    adapters_per_task: int | None = None


MULTITASK = of_weights("multitask", weight=0.3, delta=1.0)
DELTA_ONLY = of_weights("delta-only", delta=1.0)
WEIGHT_ONLY = of_weights("weight-only", weight=1.0)
CONFIGURATIONS = (MULTITASK, DELTA_ONLY, WEIGHT_ONLY)
TERMS = (
    DELTA_ONLY,
    of_weights("kl", kl=1.0),
    of_weights("delta + kl", delta=1.0, kl=1.0),
    WEIGHT_ONLY,
)
LABELS = of_weights("true labels", labels=1.0)
_DND_DECODER = Variant(
    "DnD's decoder",
    {"generator": read_generator("hyperconv_tokens"), "prompt_tokens": 32},
    "The decoder of Drag-and-Drop LLMs reads the states of all tokens of 16 prompts.",
)
DND = (
    _DND_DECODER.joined(of_weights("importance", importance=1.0)),
    _DND_DECODER.joined(of_weights("kl", kl=1.0)),
    of_weights("importance", importance=1.0),
    of_weights("kl", kl=1.0),
    DELTA_ONLY,
)
# Points of learning curves, where a world has more.
CURVES: Mapping[str, tuple[int, ...]] = {
    "n_tasks": (24, 48, 72, 108),
    "n_teachers": (1, 2),
    "n_trajectories": (1, 4),
}
STEPS = (100, 200, 800)
_SHARED = (
    "Can shared probes teach a task? Every adapter is read on the same texts, at their last token."
)
OBJECTIVES = (
    Variant(
        "cosine_norm", {"delta_loss": "cosine_norm"}, "The default: direction and relative norm."
    ),
    Variant("cosine", {"delta_loss": "cosine"}, "Is direction enough, without the norm?"),
    Variant(
        "mse",
        {"delta_loss": "mse"},
        "Squared error of unit vectors: direction with weaker gradients.",
    ),
    Variant("mse_raw", {"delta_loss": "mse_raw"}, "Plain squared error: large deltas weigh more."),
    Variant(
        "mean reading",
        {"delta_reading": "mean"},
        "Is the mean over probes enough, or is each probe needed?",
    ),
    Variant("domain probes", {"delta_probes": "domain"}, _SHARED),
    Variant("generic probes", {"delta_probes": "generic"}, _SHARED),
)


def phase_4_5(options: StudyOptions) -> Study:
    """Multitask, delta-only and weight-only, each on every seed: does behavioural supervision help?"""
    return Study(
        "phase_4_5",
        make_trials(options, standard_variants(options)),
        note="Does behavioural supervision help on tasks never seen, alone or beside weight matching?",
    )


def lambda_grid(options: StudyOptions) -> Study:
    """λ_w × λ_d × seeds, without (0, 0): where is the best balance of weights and behaviour?"""
    grid = replace(
        options,
        lambda_weight=options.lambda_weight or (0.0, 0.1, 0.3, 1.0),
        lambda_delta=options.lambda_delta or (0.0, 0.3, 1.0, 3.0),
    )
    return replace(
        phase_4_5(grid),
        name="lambda_grid",
        note="Where is the best balance of weights and behaviour?",
    )


def model_size(options: StudyOptions) -> Study:
    """Sizes × configurations × seeds: does the answer of phase_4_5 hold at another size? Each size has its own bank."""
    sizes = replace(options, model_sizes=options.model_sizes or ("nano", "micro"))
    return replace(
        phase_4_5(sizes),
        name="model_size",
        note="Does the answer hold at another size of the base?",
    )


def worlds(options: StudyOptions) -> Study:
    """Worlds × configurations × seeds: does the answer hold in another world, and how far do the numbers move?

    A world has a base, teachers and a split of its own. Statistics take worlds as drawn at random, as seeds and tasks.
    """
    several = replace(options, world_seeds=options.world_seeds or WORLD_SEEDS)
    return replace(
        phase_4_5(several),
        name="worlds",
        note="Does the answer hold in worlds with another base, other teachers and another split?",
    )


def generators(options: StudyOptions) -> Study:
    """Every generator × configurations × seeds: is it the objective or the architecture?"""
    every = replace(options, generators=options.generators or tuple(GENERATORS))
    return replace(
        phase_4_5(every),
        name="generators",
        note="Does the answer depend on the generator's architecture?",
    )


def objectives(options: StudyOptions) -> Study:
    """Delta losses, readings and probes without the weight loss, beside weight-only: which behaviour is worth matching?

    With `delta_probes` among the changes, a trial has the world in which those probes are read.
    """
    chosen = _weight_options(options) or [DELTA_ONLY]
    if any(variant.changes["lambda_delta"] == 0 for variant in chosen):
        raise UserError(
            "study objectives compares delta losses: give --lambda-delta values above 0"
        )
    axes = other_axes(options)
    variants = [*crossed(chosen, *axes, OBJECTIVES), *crossed([WEIGHT_ONLY], *axes)]
    return Study(
        "objectives",
        make_trials(options, variants),
        note="Which reading of behaviour is worth matching?",
    )


def terms(options: StudyOptions) -> Study:
    """Delta, KL, both, and weights, each on every seed: what is worth matching?"""
    chosen = _weight_options(options) or list(TERMS)
    axes = other_axes(options)
    return Study(
        "terms",
        make_trials(options, crossed(chosen, *axes)),
        note="Which terms of the loss carry over to tasks never seen: deltas, the teachers' distributions, weights?",
    )


def labels(options: StudyOptions) -> Study:
    """Behaviour without labels beside true labels end to end: what share of the reference does it reach?"""
    axes = other_axes(options)
    behaviour = [variant for variant in TERMS if variant is not WEIGHT_ONLY]
    chosen = _weight_options(options) or behaviour
    return Study(
        "labels",
        make_trials(options, crossed([*chosen, LABELS], *axes)),
        note="How much of what true labels reach does behaviour reach without any?",
    )


def curves(options: StudyOptions) -> Study:
    """Delta-only on fewer tasks, on fewer trajectories and for fewer steps, one at a time: what does accuracy cost?"""
    chosen = _weight_options(options) or [DELTA_ONLY]
    world = _world(options, (options.model_sizes or ("nano",))[0], TRAINING)
    there, points = amounts(world), [Variant()]
    if options.delta_probes != "trajectory":
        there["n_trajectories"] = 0
    for name, counts in CURVES.items():
        asked = getattr(options, name) or [n for n in counts if n < there.get(name, n + 1)]
        points += [amount_variant(name, count) for count in asked]
    if options.steps is None and not options.smoke:
        points += [Variant(f"steps={n}", {"steps": n}, "How long must it train?") for n in STEPS]
    plain = replace(options, n_tasks=None, n_teachers=None, n_trajectories=None)
    return Study(
        "curves",
        make_trials(options, crossed(chosen, points, *other_axes(plain))),
        note="How does accuracy grow with tasks, teachers, trajectories and steps?",
    )


def composition(options: StudyOptions) -> Study:
    """Delta-only, KL and multitask, each with and without mixtures of teachers as training rows."""
    mixed = replace(options, mixup=options.mixup or (0.0, 1.0))
    chosen = _weight_options(options) or [DELTA_ONLY, TERMS[1], MULTITASK]
    return Study(
        "composition",
        make_trials(options, crossed(chosen, *other_axes(mixed))),
        note="Do mixtures of two teachers, as further training rows, help on tasks never seen?",
    )


def dnd(options: StudyOptions) -> Study:
    """Drag-and-Drop LLMs as published, and by halves: its decoder with KL, its loss with the default generator.

    Raises UserError for options that it sets itself.
    """
    own = ("generators", "conditions", "prompt_tokens", "lambda_weight", "lambda_delta", "terms")
    if any(getattr(options, name) is not None for name in own):
        raise UserError(
            "study dnd has generators, conditions and loss terms of its own: leave these options out, or take another"
        )
    return Study(
        "dnd",
        make_trials(options, crossed(DND, *other_axes(options))),
        note="What does the published method reach, and is it its decoder or its loss?",
    )


def optuna_lambda(options: StudyOptions) -> Study:
    """Search λ_w, λ_d, the weights of terms asked for, and the learning rate; one number fixes a value."""
    options = replace(options, seeds=options.seeds or SEEDS[:2])
    own = {"model_sizes": ("nano",), "generators": ("default",)}
    single = {name: getattr(options, name) or value for name, value in own.items()}
    axes = (generator_variants(options), *condition_axes(options), mixup_variants(options))
    axes = (*axes, *amount_axes(options))
    if any(len(values) > 1 for values in (*single.values(), *axes)):
        raise UserError(
            "a search has one model size, one generator, one kind of condition, one mixup and one number of tasks, "
            "teachers and trajectories: give one, or run one search for each"
        )
    names = {"lambda_weight": options.lambda_weight, "lambda_delta": options.lambda_delta}
    ranges = {**names, "learning_rate": options.learning_rates}
    base = make_trials(replace(options, seeds=(0,)), crossed([Variant("search")], *axes))[0]
    given: dict[str, Any] = {
        name: _range(name, ends) for name, ends in ranges.items() if ends is not None
    }
    if options.terms:
        given["terms"] = {name: _range(name, ends) for name, ends in options.terms.items()}
    space = SearchSpace(base, _seeds(options), **given)
    return Study(
        "optuna_lambda", space=space, note="Which λ_w, λ_d and learning rate are best together?"
    )


def _range(name: str, values: tuple[float, ...]) -> tuple[float, float]:
    if not 1 <= len(values) <= 2:
        raise UserError(
            f"{name} of a search is a range (two numbers) or fixed (one), not {len(values)} numbers"
        )
    return (min(values), max(values))


STUDIES: dict[str, Callable[[StudyOptions], Study]] = {
    function.__name__: function
    for function in (
        phase_4_5,
        worlds,
        terms,
        lambda_grid,
        model_size,
        generators,
        objectives,
        labels,
        curves,
        composition,
        dnd,
        optuna_lambda,
    )
}


def standard_variants(options: StudyOptions) -> list[Variant]:
    """Return the three configurations (or the given λ), crossed with what else is compared."""
    return crossed(lambda_variants(options), *other_axes(options))


def other_axes(options: StudyOptions) -> tuple[list[Variant], ...]:
    """Return what is compared beside the losses: generators, learning rates, conditions and mixtures asked for."""
    axes = (generator_variants(options), rate_variants(options), *condition_axes(options))
    return *axes, mixup_variants(options), *amount_axes(options)


def lambda_variants(options: StudyOptions) -> list[Variant]:
    """Return the three configurations, or the grid of the given λ and terms."""
    return _weight_options(options) or list(CONFIGURATIONS)


def _weight_options(options: StudyOptions) -> list[Variant]:
    """Return the grid of the given λ and terms, if any; a combination that is 0 throughout is left out of others."""
    if options.lambda_weight is None and options.lambda_delta is None and options.terms is None:
        return []
    # Terms are the whole loss; without them the weight loss stands beside a λ_d.
    weight = (1.0,) if options.terms is None else (0.0,)
    axes = {
        "weight": options.lambda_weight or weight,
        "delta": options.lambda_delta or (0.0,),
        **(options.terms or {}),
    }
    return [of_weights(weights_name(weights), **weights) for weights in weight_grid(axes)]


def generator_variants(options: StudyOptions) -> list[Variant]:
    """Return the generators asked for; a single one is not named. Raises UserError for an unknown one."""
    asked = options.generators or ("default",)
    configs = {text.replace(",", " "): read_generator(text) for text in asked}
    if asked == ("default",):
        return [Variant()]
    variants = [
        Variant(name, {"generator": config}, f"Generator: {name}.")
        for name, config in configs.items()
    ]
    return unnamed_if_single(variants)


def rate_variants(options: StudyOptions) -> list[Variant]:
    """Return the learning rates asked for; a single one is not named."""
    rates = options.learning_rates or ()
    variants = [Variant(f"lr={rate:g}", {"learning_rate": rate}) for rate in rates]
    return unnamed_if_single(variants) or [Variant()]


def make_trials(options: StudyOptions, variants: Sequence[Variant]) -> tuple[TrialSpec, ...]:
    """Return trials of sizes × worlds × variants × seeds. Raises UserError for an unknown size, λ or field."""
    sizes, worlds = options.model_sizes or ("nano",), options.world_seeds or (None,)
    axes = itertools.product(sizes, worlds, variants, _seeds(options))
    trials = tuple(_trial(options, *point) for point in axes)
    check_mixtures(trials)
    return trials


def _seeds(options: StudyOptions) -> tuple[int, ...]:
    if options.smoke:
        return options.seeds or SEEDS[:1]
    return options.seeds or SEEDS


def _trial(
    options: StudyOptions, size: str, world_seed: int | None, variant: Variant, seed: int
) -> TrialSpec:
    unknown = sorted(set(variant.changes) - set(TrainingConfig.__dataclass_fields__))
    if unknown:
        raise UserError(
            f"variant {variant.name!r} changes {unknown[0]}, which is no field of TrainingConfig"
        )
    config = replace(_config(options, size, seed), **variant.changes)
    config = _with_term_options(config, options.term_options)
    world = _world(options, size, config)
    if world_seed is not None:
        world = world.with_seed(world_seed)
    return TrialSpec(variant.name, settled_amounts(config, world), world, variant.why)


def _config(options: StudyOptions, size: str, seed: int) -> TrainingConfig:
    config = replace(
        TRAINING,
        seed=seed,
        use_small_model=size in SMALL_SIZES,
        model_size=size,
        delta_probes=options.delta_probes,
    )
    if options.smoke:
        config = replace(config, steps=60, batch_size=8, eval_every=30, n_probes=2, n_prompts=8)
    names = ("steps", "batch_size", "n_probes", "activation_checkpointing", "probe_chunk")
    given = {name: getattr(options, name) for name in names}
    return replace(config, **{name: value for name, value in given.items() if value is not None})


def _with_term_options(config: TrainingConfig, given: Mapping[str, Any]) -> TrainingConfig:
    """Give a configuration the options of the terms that it has; its variant's own are kept."""
    own = {key: value for key, value in given.items() if key.rpartition(".")[0] in config.weights}
    return replace(config, term_options={**own, **config.term_options})


def _world(options: StudyOptions, size: str, config: TrainingConfig) -> WorldConfig:
    """Return the world that a configuration names: its size, its probes, and what is read of its tasks."""
    own = {world.size: world for world in options.own_worlds}
    world = own[size] if own else WorldConfig(size=size)
    world = replace(
        world,
        encoder=options.encoder,
        delta_probes=config.delta_probes,
        condition=config.condition,
        prompt_tokens=config.prompt_tokens,
    )
    if options.smoke:
        world = smoke_world(world)
    given = {
        "per_task": options.adapters_per_task,
        "trajectories": options.trajectories,
        "max_tokens": options.trajectory_tokens,
    }
    changed: dict[str, Any] = {name: own for name, own in given.items() if own is not None}
    return replace(world, teachers=replace(world.teachers, **changed))
