"""Make the changes of configurations that a study compares, and cross them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

from llgbm.runtime import UserError
from llgbm.training import TrainingConfig
from llgbm.training.mixup import count_mixtures
from llgbm.world import WorldConfig
from tuning.studies.terms import changes_of, why_of

if TYPE_CHECKING:
    from tuning.studies.builtin import StudyOptions
    from tuning.studies.spec import TrialSpec

WHY_CONDITION = {
    "description": "Does a description of the task say what its prompts do?",
    "both": "Does a description add to the prompts?",
}
# Fields that limit what is trained on, and what they count.
AMOUNTS = {"n_tasks": "tasks", "n_teachers": "teachers", "n_trajectories": "trajectories"}
WHY_FEWER = "How much does a generator need to be trained on?"
WHY_MIXED = (
    "Mixtures of two teachers, with prompts of both tasks, are trained on beside the teachers."
)


@dataclass(frozen=True)
class Variant:
    """Named change of `TrainingConfig` fields, with its reason."""

    name: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""

    def joined(self, other: Variant) -> Variant:
        """Return both changes at once; where both change a field, the other's value is used."""
        names, reasons = ((self.name, other.name), (self.why, other.why))
        return Variant(
            ", ".join(filter(None, names)),
            {**self.changes, **other.changes},
            " ".join(filter(None, reasons)),
        )


def of_weights(name: str, **weights: float) -> Variant:
    """Return the variant whose loss is the sum of these terms, with the reason for it."""
    return Variant(name, changes_of(weights), why_of(weights))


def crossed(*axes: Iterable[Variant]) -> list[Variant]:
    """Return every combination of one variant of each axis, the first axis slowest."""
    return [reduce(Variant.joined, combination) for combination in itertools.product(*axes)]


def condition_axes(options: StudyOptions) -> tuple[list[Variant], ...]:
    """Return the kinds of condition, token states and least numbers of prompts asked for; a single one is not named."""
    kinds = [
        Variant(name, {"condition": name}, WHY_CONDITION.get(name, ""))
        for name in options.conditions or ()
    ]
    states = [
        Variant(_tokens_name(count), {"prompt_tokens": count})
        for count in options.prompt_tokens or ()
    ]
    numbers = [
        Variant(f"prompts≥{least}" if least else "prompts fixed", {"n_prompts_min": least})
        for least in options.n_prompts_min or ()
    ]
    return tuple(unnamed_if_single(axis) or [Variant()] for axis in (kinds, states, numbers))


def amount_axes(options: StudyOptions) -> tuple[list[Variant], ...]:
    """Return the numbers of tasks, teachers and trajectories asked for; a single one is not named."""
    return tuple(
        unnamed_if_single([amount_variant(name, count) for count in getattr(options, name) or ()])
        or [Variant()]
        for name in AMOUNTS
    )


def amount_variant(name: str, count: int) -> Variant:
    """Return the variant that trains on less of what a field of `AMOUNTS` counts; 0 is all."""
    what = AMOUNTS[name]
    return Variant(f"{what}={count}" if count else f"all {what}", {name: count}, WHY_FEWER)


def amounts(world: WorldConfig) -> dict[str, int]:
    """Return what a world has of each of `AMOUNTS`; of given teachers that is known once they are opened."""
    found = {"n_tasks": len(world.suite.split.train)}
    if world.bank is None:
        teachers = world.teachers
        found |= {"n_teachers": teachers.per_task, "n_trajectories": teachers.trajectories}
    return found


def settled_amounts(config: TrainingConfig, world: WorldConfig) -> TrainingConfig:
    """Return a configuration in which all of what a world has is 0. Raises UserError for more than it has."""
    for name, there in amounts(world).items():
        asked = getattr(config, name)
        if asked > there:
            raise UserError(
                f"{name} is {asked}, and the world has {there}: give at most that, or 0 for all"
            )
        if asked == there:
            everything: dict[str, Any] = {name: 0}
            config = replace(config, **everything)
    if world.bank is None and config.n_tasks * (config.n_teachers or world.teachers.per_task) == 1:
        raise UserError("n_tasks is 1, and one teacher has no spread to train on: give at least 2")
    return config


def check_mixtures(trials: Sequence[TrialSpec]) -> None:
    """Raise UserError for a mixup that gives no mixtures or too many, and for two that give as many.

    Of given teachers that is known once they are opened.
    """
    seen: dict[str, float] = {}
    for trial in trials:
        config, world = trial.config, trial.world
        if not config.mixup or world.bank is not None:
            continue
        count = count_mixtures(config.mixup, _rows_by_task(config, world))
        other = seen.setdefault(
            replace(trial, config=replace(config, mixup=float(count))).id, config.mixup
        )
        if other != config.mixup:
            raise UserError(
                f"mixup {other:g} and {config.mixup:g} are both {count} mixtures: leave one out"
            )


def _rows_by_task(config: TrainingConfig, world: WorldConfig) -> list[int]:
    """Number of training rows of each task that a configuration trains on."""
    n_tasks = config.n_tasks or len(world.suite.split.train)
    return [config.n_teachers or world.teachers.per_task] * n_tasks


def mixup_variants(options: StudyOptions) -> list[Variant]:
    """Return the shares of mixtures asked for; 0 and a single one are not named."""
    variants = [
        Variant(f"mixup={share:g}", {"mixup": share}, WHY_MIXED) if share else Variant()
        for share in options.mixup or ()
    ]
    return unnamed_if_single(variants) or [Variant()]


def _tokens_name(count: int) -> str:
    return f"tokens={count}" if count else "vectors"


def unnamed_if_single(variants: list[Variant]) -> list[Variant]:
    if len(variants) == 1:
        return [replace(variants[0], name="")]
    return variants
