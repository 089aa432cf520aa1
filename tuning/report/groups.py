"""Group trials by configuration and compare the groups."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, combinations, starmap

import numpy as np
from scipy import stats

from llgbm.terms.names import NAMED
from tuning.significance import (
    ANY,
    DIFFERENCES,
    SHARES,
    SIGNIFICANCE,
    Ends,
    crossed_test,
    effect_size,
    holm,
    student_interval,
    within,
)
from tuning.tracking.runs import WORLD_PARAM, TrialResult, finite

MAIN = "heldout/accuracy"
SEALED = "sealed"  # prefix of the metrics on tasks that were sealed
WORLD = " world "  # in the label of a world, between its size and its seed
CHOOSING = "val/accuracy"
REFERENCE = "weight-only"
SEEDS_FOR_SPREAD = 3
# What the terms with a field of their own match; runs name that of other terms.
MATCHED_BY_NAMED = {"weight": "weights", "delta": "behaviour"}
ALL_PAIRS = 5  # up to so many configurations of a size, every pair is compared; above, each with the reference
AccuracyByTask = Mapping[str, float]
Baselines = Mapping[
    str, Mapping[str, float]
]  # metric by baseline, "name (size)" if there are several sizes


@dataclass(frozen=True)
class Cell:
    """Mean over n seeds or worlds; from `SEEDS_FOR_SPREAD` on, its sample standard deviation and 95 % interval.

    The interval is Student's. Over several worlds, each counts by the mean of its seeds.
    """

    mean: float
    sd: float | None
    n: int
    interval: tuple[float, float] | None = None
    unit: str = "seed"

    @classmethod
    def of(cls, values: Iterable[float], ends: Ends = ANY) -> Cell | None:
        """Summarise values that lie within `ends`, None if there are none."""
        array = np.asarray(list(values), dtype=float)
        if not array.size:
            return None
        mean, n = float(array.mean()), int(array.size)
        if n < SEEDS_FOR_SPREAD:
            return cls(mean, None, n)
        return cls(mean, float(array.std(ddof=1)), n, student_interval(array, ends) or (mean, mean))

    @classmethod
    def over(cls, by_seed: Mapping[str, float], ends: Ends = ANY) -> Cell | None:
        """Summarise values by seed: over worlds, or over the seeds of a single one; None if there are none."""
        by_world = mean_by_world(by_seed)
        if len(by_world) > 1:
            cell = cls.of(by_world.values(), ends)
            return cell and replace(cell, unit="world")
        return cls.of(by_seed.values(), ends)

    def __str__(self) -> str:
        if self.sd is None:
            return number(self.mean)
        return f"{number(self.mean)} ± {number(self.sd)}"


@dataclass(frozen=True)
class Group:
    """Complete trials of one configuration at one model size; `by_task` is held-out accuracy by run id and task."""

    config: str
    size: str
    label: str
    trials: tuple[TrialResult, ...]
    by_task: Mapping[str, AccuracyByTask] = field(default_factory=dict)

    def by_seed(self, metric: str) -> dict[str, float]:
        """Return the metric of each seed, averaged over its trials; values that are not finite are left out."""
        found: dict[str, list[float]] = {}
        for trial in self.trials:
            if math.isfinite(trial.metrics.get(metric, math.nan)):
                found.setdefault(seed_of(trial), []).append(trial.metrics[metric])
        return {seed: float(np.mean(values)) for seed, values in found.items()}

    def by_world(self, metric: str) -> dict[str, float]:
        """Return the metric of each world, averaged over its seeds."""
        return mean_by_world(self.by_seed(metric))

    def cell(self, metric: str) -> Cell | None:
        """Return mean and spread over worlds, or over the seeds of a single one; None if no trial has the metric.

        The interval of an accuracy lies within 0 and 1.
        """
        return Cell.over(self.by_seed(metric), SHARES if "accuracy" in metric else ANY)

    def gap(self) -> Cell | None:
        """Return training accuracy minus held-out accuracy, over the seeds that have both."""
        train, held = self.by_seed("train/accuracy"), self.by_seed(MAIN)
        return Cell.of(train[seed] - held[seed] for seed in train if seed in held)

    def task_accuracy(self) -> dict[str, dict[str, float]]:
        """Return held-out accuracy by seed and task; empty for a seed without numbers by task."""
        found: dict[str, dict[str, list[float]]] = {seed: {} for seed in self.seeds}
        for trial in self.trials:
            for task, value in finite(self.by_task.get(trial.run_id, {})).items():
                found[seed_of(trial)].setdefault(task, []).append(value)
        return {seed: _means(tasks) for seed, tasks in found.items()}

    def n_units(self, unit: str) -> int:
        """Return the number of its worlds, or of its seeds (over all worlds)."""
        if unit == "world":
            return len({world_of(trial) for trial in self.trials})
        return len(self.seeds)

    @property
    def matches(self) -> frozenset[str]:
        """Return what it is supervised by; told by name if it names no weight of a term."""
        trial = self.trials[0]
        if not trial.weights:
            return frozenset(("weights" if self.config.startswith(REFERENCE) else "behaviour",))
        named = {MATCHED_BY_NAMED[name] for name in trial.weights if name in NAMED}
        return frozenset((*named, *trial.params.get("matches", "").split()))

    @property
    def is_supervised(self) -> bool:
        """True if it is trained with behavioural supervision (λ_d > 0, KL and such) and no labels."""
        return "behaviour" in self.matches and not self.uses_labels

    @property
    def uses_labels(self) -> bool:
        """True if it is trained on true labels, which makes it a reference and no method."""
        return "labels" in self.matches

    def curves(self, key: str) -> list[dict[int, float]]:
        """Return the curve of every trial that has one, as value by step, up to its last training step.

        What is logged after that is of the generator that is kept, no point of the curve.
        """
        found = []
        for trial in self.trials:
            last = float(trial.params.get("steps", "inf"))
            curve = {step: value for step, value in trial.curves.get(key, ()) if step <= last}
            if curve:
                found.append(curve)
        return found

    @property
    def lambdas(self) -> tuple[float, float] | None:
        """Return λ_w and λ_d, None if the trials do not name them or have other terms too."""
        params = self.trials[0].params
        if set(self.trials[0].weights) - set(NAMED):
            return None
        try:
            return float(params["lambda_weight"]), float(params["lambda_delta"])
        except (KeyError, ValueError):
            return None

    @cached_property
    def seeds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(seed_of(trial) for trial in self.trials))


def mean_by_world(by_seed: Mapping[str, float]) -> dict[str, float]:
    """Average values by seed over the seeds of each world."""
    seeds: dict[str, list[float]] = {}
    for key, value in by_seed.items():
        seeds.setdefault(key.partition(WORLD)[2], []).append(value)
    return _means(seeds)


def _means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {key: float(np.mean(own)) for key, own in values.items()}


def is_of_size(baseline: str, size: str) -> bool:
    """True if a baseline is of this model size: those of a study with one size name none."""
    return baseline.endswith(f"({size})") or not baseline.endswith(")")


@dataclass(frozen=True)
class Comparison:
    """Configuration less another one of its size, on the seeds and held-out tasks that both have.

    `sd` is that of the difference over seeds; `effect` the mean difference over its standard deviation over tasks
    (Cohen's d_z); `wins` and `losses` count tasks. `tasks` is 0 where numbers by task were not kept: then the test is
    the paired t-test over seeds alone. What below three seeds cannot be told is None.
    """

    config: str
    reference: str
    size: str
    difference: float
    sd: float | None
    interval: tuple[float, float] | None
    p: float | None
    n: int
    tasks: int = 0
    effect: float | None = None
    wins: int = 0
    losses: int = 0
    p_holm: float | None = None
    unit: str = "seed"

    @property
    def is_clear(self) -> bool:
        """True if the difference is significant at 5 % after Holm's correction."""
        return self.p_holm is not None and self.p_holm <= SIGNIFICANCE


def group_trials(
    trials: Sequence[TrialResult], by_task: Mapping[str, AccuracyByTask] | None = None
) -> list[Group]:
    """Group complete trials by configuration and model size, in order of appearance; labels name the size if several.

    `by_task` is the held-out accuracy of every task by run id, where it was kept.
    """
    sizes = list(dict.fromkeys(size_of(trial) for trial in trials))
    keys = dict.fromkeys((size_of(trial), trial.config) for trial in trials if trial.is_complete)
    return [
        Group(
            config,
            size,
            f"{config} ({size})" if len(sizes) > 1 else config,
            tuple(t for t in trials if t.is_complete and (size_of(t), t.config) == (size, config)),
            by_task or {},
        )
        for size, config in sorted(keys, key=lambda key: sizes.index(key[0]))
    ]


def compare(groups: Sequence[Group]) -> list[Comparison]:
    """Compare the configurations of each size in pairs, with Holm's correction over all comparisons.

    Up to `ALL_PAIRS` configurations every pair is compared, above that each with the reference (`reference_of`).
    """
    sizes = dict.fromkeys(group.size for group in groups)
    pairs = chain.from_iterable(_pairs(groups, size) for size in sizes)
    found = [comparison for comparison in starmap(_compare, pairs) if comparison.n]
    corrected = holm([comparison.p for comparison in found])
    return [
        replace(c, p_holm=p, interval=c.interval and within(c.interval, DIFFERENCES))
        for c, p in zip(found, corrected, strict=True)
    ]


def reference_of(groups: Sequence[Group], size: str) -> Group | None:
    """Return the configuration that the others of a size are compared with: weight-only, else the first, else None.

    Of several weight-only ones the best on validation tasks is taken: held-out numbers select nothing.
    """
    own = [group for group in groups if group.size == size and group.cell(MAIN)]
    plain = [group for group in own if not (group.is_supervised or group.uses_labels)]
    if plain:
        return max(plain, key=_validation)
    return next((group for group in own if not group.uses_labels), None)


def _validation(group: Group) -> float:
    cell = group.cell(CHOOSING)
    return cell.mean if cell else -math.inf


def _pairs(groups: Sequence[Group], size: str) -> list[tuple[Group, Group]]:
    reference, ordered = reference_of(groups, size), ranked(groups, size)
    others = [group for group in ordered if group is not reference]
    pairs = [(group, reference) for group in others if reference]
    if len(ordered) <= ALL_PAIRS:
        pairs += combinations(others, 2)
    return pairs


def _compare(group: Group, reference: Group) -> Comparison:
    own, other = group.by_seed(MAIN), reference.by_seed(MAIN)
    seeds = [seed for seed in own if seed in other]
    differences = np.array([own[seed] - other[seed] for seed in seeds])
    n = len(seeds)
    names = (group.label, reference.label, group.size)
    worlds = list(dict.fromkeys(seed.partition(WORLD)[2] for seed in seeds))
    if len(worlds) > 1:
        return _over_worlds(group, reference, worlds)
    sd = float(differences.std(ddof=1)) if n >= SEEDS_FOR_SPREAD else None
    plain = Comparison(*names, float(differences.mean()) if n else 0.0, sd, None, None, n)
    cells_ST = _paired_cells(group, reference, seeds)
    if cells_ST is None:
        return _over_seeds(plain, differences)
    by_task_T = cells_ST.mean(0)
    test = crossed_test(cells_ST) if n >= SEEDS_FOR_SPREAD else None
    return replace(
        plain,
        interval=test.interval if test else None,
        p=test.p if test else None,
        tasks=len(by_task_T),
        effect=effect_size(by_task_T),
        wins=int((by_task_T > 1e-9).sum()),
        losses=int((by_task_T < -1e-9).sum()),
    )


def _over_worlds(group: Group, reference: Group, worlds: Sequence[str]) -> Comparison:
    """Compare over worlds by Student's t, each world counting by the mean difference of its seeds and tasks.

    Seeds and tasks are drawn within a world and move its mean, so the spread over worlds has theirs in it.
    """
    own, other = group.by_world(MAIN), reference.by_world(MAIN)
    differences = np.array([own[world] - other[world] for world in worlds])
    n = len(worlds)
    sd = float(differences.std(ddof=1)) if n >= SEEDS_FOR_SPREAD else None
    names = (group.label, reference.label, group.size)
    plain = Comparison(*names, float(differences.mean()), sd, None, None, n, unit="world")
    return _over_seeds(plain, differences)


def _over_seeds(plain: Comparison, differences: np.ndarray) -> Comparison:
    interval = student_interval(differences) if plain.n >= SEEDS_FOR_SPREAD else None
    if interval is None:
        return plain
    return replace(plain, interval=interval, p=float(stats.ttest_1samp(differences, 0).pvalue))


def _paired_cells(group: Group, reference: Group, seeds: Sequence[str]) -> np.ndarray | None:
    """Return differences in accuracy [S, T] on the tasks that all these trials share, None if there are none."""
    own, other = group.task_accuracy(), reference.task_accuracy()
    tables = [by_seed[seed] for seed in seeds for by_seed in (own, other)]
    shared = set.intersection(*map(set, tables)) if tables else set()
    tasks = sorted(shared)
    if not tasks:
        return None
    values_2ST = [[list(map(by[seed].get, tasks)) for seed in seeds] for by in (own, other)]
    return np.subtract(*np.array(values_2ST, dtype=float))


def ranked(groups: Sequence[Group], size: str) -> list[Group]:
    """Return the configurations of a size with a held-out accuracy, best first; those with few seeds come last.

    Few are fewer than `SEEDS_FOR_SPREAD`, or than the most that any has: a lucky seed must not rank above a mean.
    """
    cells = [(cell, g) for g in groups if g.size == size and (cell := g.cell(MAIN))]
    enough = seeds_needed(cell for cell, _ in cells)
    cells.sort(key=lambda pair: (pair[0].n < enough, -pair[0].mean))
    return [group for _, group in cells]


def seeds_needed(cells: Iterable[Cell]) -> int:
    """Return the number of seeds that a configuration needs to be ranked."""
    return min(SEEDS_FOR_SPREAD, max((cell.n for cell in cells), default=0))


def number(value: float | None) -> str:
    """Return a value with three decimals, with none from 100 on, a dash if there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    decimals = 3 if abs(value) < 100 else 0
    return f"{value:.{decimals}f}"


def repeated_seeds(trials: Sequence[TrialResult]) -> list[str]:
    """Return the configurations with more than one complete trial of a seed."""
    counts = Counter((t.config, size_of(t), seed_of(t)) for t in trials if t.is_complete)
    return sorted({config for (config, _, _), count in counts.items() if count > 1})


def seed_of(trial: TrialResult) -> str:
    """Return the seed as text, with the seed of its world if that is not 0; a trial without one stands for itself."""
    seed = trial.trial_id if trial.seed is None else str(trial.seed)
    world = world_of(trial)
    return seed if world == "0" else f"{seed}{WORLD}{world}"


def world_of(trial: TrialResult) -> str:
    """Return the seed of a trial's world as text."""
    return trial.params.get(WORLD_PARAM, "0")


def world_label(trial: TrialResult) -> str:
    """Return the label of a trial's world, as `WorldConfig.label` gives it."""
    size, world = size_of(trial), world_of(trial)
    return size if world == "0" else f"{size}{WORLD}{world}"


def size_of_label(label: str) -> str:
    """Return the size in the label of a world."""
    return label.partition(WORLD)[0]


def size_of(trial: TrialResult) -> str:
    """Return the model size, "" if the trial names none."""
    return trial.params.get("model_size", "")
