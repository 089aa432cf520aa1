"""Group trials by configuration and compare the groups."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations

import numpy as np
from scipy import stats

from tuning.significance import SIGNIFICANCE, crossed_test, effect_size, holm, student_interval
from tuning.tracking.runs import TrialResult

MAIN = "heldout/accuracy"
CHOOSING = "val/accuracy"
REFERENCE = "weight-only"
SEEDS_FOR_SPREAD = 3
ALL_PAIRS = 5  # up to so many configurations of a size, every pair is compared; above, each with the reference
AccuracyByTask = Mapping[str, float]


@dataclass(frozen=True)
class Cell:
    """Mean over n seeds; where there are enough seeds to speak of a spread, its sample standard deviation and the
    95 % interval of the mean by Student's t."""

    mean: float
    sd: float | None
    n: int
    interval: tuple[float, float] | None = None

    @classmethod
    def of(cls, values: Iterable[float]) -> Cell | None:
        """Summarise values; None if there are none."""
        array = np.asarray(list(values), dtype=float)
        if not array.size:
            return None
        mean, n = float(array.mean()), int(array.size)
        if n < SEEDS_FOR_SPREAD:
            return cls(mean, None, n)
        return cls(mean, float(array.std(ddof=1)), n, student_interval(array) or (mean, mean))

    def __str__(self) -> str:
        return number(self.mean) if self.sd is None else f"{number(self.mean)} ± {number(self.sd)}"


@dataclass(frozen=True)
class Group:
    """The trials of one configuration at one model size that count, and their held-out accuracy by task and run id."""

    config: str
    size: str
    label: str
    trials: tuple[TrialResult, ...]
    by_task: Mapping[str, AccuracyByTask] = field(default_factory=dict)

    def by_seed(self, metric: str) -> dict[str, float]:
        """The value of each seed (the mean over its trials), for the trials that have a finite one."""
        found: dict[str, list[float]] = {}
        for trial in self.trials:
            if math.isfinite(trial.metrics.get(metric, math.nan)):
                found.setdefault(seed_of(trial), []).append(trial.metrics[metric])
        return {seed: float(np.mean(values)) for seed, values in found.items()}

    def cell(self, metric: str) -> Cell | None:
        """Mean and spread over seeds, or None where no trial has the metric."""
        return Cell.of(self.by_seed(metric).values())

    def gap(self) -> Cell | None:
        """Accuracy on training tasks less that on held-out tasks, over the seeds that have both."""
        train, held = self.by_seed("train/accuracy"), self.by_seed(MAIN)
        return Cell.of(train[seed] - held[seed] for seed in train if seed in held)

    def task_accuracy(self) -> dict[str, dict[str, float]]:
        """Held-out accuracy by seed and task; empty for seeds whose numbers by task were not kept."""
        found: dict[str, dict[str, list[float]]] = {seed: {} for seed in self.seeds}
        for trial in self.trials:
            for task, value in self.by_task.get(trial.run_id, {}).items():
                found[seed_of(trial)].setdefault(task, []).append(value)
        return {
            seed: {task: float(np.mean(own)) for task, own in tasks.items()}
            for seed, tasks in found.items()
        }

    @cached_property
    def seeds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(seed_of(trial) for trial in self.trials))


@dataclass(frozen=True)
class Comparison:
    """A configuration less another one of its size, on the seeds and held-out tasks that both have.

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

    @property
    def is_clear(self) -> bool:
        """Whether the difference stands at the 5 % level after Holm's correction."""
        return self.p_holm is not None and self.p_holm <= SIGNIFICANCE


def group_trials(
    trials: Sequence[TrialResult], by_task: Mapping[str, AccuracyByTask] | None = None
) -> list[Group]:
    """Whole trials by configuration and model size, in order of appearance; several sizes show in the labels.

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
    """Paired comparisons of the configurations of each size, with Holm's correction over all of them.

    Every pair up to five configurations, else each with the reference; see `reference_of`.
    """
    found = [
        _compare(*pair)
        for size in dict.fromkeys(group.size for group in groups)
        for pair in _pairs(groups, size)
    ]
    found = [comparison for comparison in found if comparison.n]
    corrected = holm([comparison.p for comparison in found])
    return [replace(c, p_holm=p) for c, p in zip(found, corrected, strict=True)]


def reference_of(groups: Sequence[Group], size: str) -> Group | None:
    """What the configurations of a size are held against: weight-only, else the first; None where there is none.

    Of several weight-only ones it is that with the best validation accuracy: held-out numbers choose nothing.
    """
    own = [group for group in groups if group.size == size and group.cell(MAIN)]
    plain = [group for group in own if group.config.startswith(REFERENCE)]
    return max(plain, key=_validation) if plain else next(iter(own), None)


def _validation(group: Group) -> float:
    cell = group.cell(CHOOSING)
    return cell.mean if cell else -math.inf


def _pairs(groups: Sequence[Group], size: str) -> list[tuple[Group, Group]]:
    reference, ordered = reference_of(groups, size), ranked(groups, size)
    others = [group for group in ordered if group is not reference]
    against = [(group, reference) for group in others if reference]
    return against + (list(combinations(others, 2)) if len(ordered) <= ALL_PAIRS else [])


def _compare(group: Group, reference: Group) -> Comparison:
    own, other = group.by_seed(MAIN), reference.by_seed(MAIN)
    seeds = [seed for seed in own if seed in other]
    differences = np.array([own[seed] - other[seed] for seed in seeds])
    n = len(seeds)
    names = (group.label, reference.label, group.size)
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


def _over_seeds(plain: Comparison, differences: np.ndarray) -> Comparison:
    interval = student_interval(differences) if plain.n >= SEEDS_FOR_SPREAD else None
    if interval is None:
        return plain
    return replace(plain, interval=interval, p=float(stats.ttest_1samp(differences, 0).pvalue))


def _paired_cells(group: Group, reference: Group, seeds: Sequence[str]) -> np.ndarray | None:
    """Differences in accuracy [S, T] on the tasks that all these trials have; None where there is none."""
    own, other = group.task_accuracy(), reference.task_accuracy()
    tasks = [
        t
        for t in (own[seeds[0]] if seeds else ())
        if all(t in own[s] and t in other[s] for s in seeds)
    ]
    if not tasks:
        return None
    return np.array([[own[seed][task] - other[seed][task] for task in tasks] for seed in seeds])


def ranked(groups: Sequence[Group], size: str) -> list[Group]:
    """The configurations of a size that have a held-out accuracy, best first."""
    scored = [(group.cell(MAIN), group) for group in groups if group.size == size]
    return [
        group
        for cell, group in sorted(scored, key=lambda pair: -pair[0].mean if pair[0] else 0)
        if cell
    ]


def number(value: float | None) -> str:
    """A value for people: three decimals, none from 100 on, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def repeated_seeds(trials: Sequence[TrialResult]) -> list[str]:
    """Configurations that hold more than one whole trial of a seed."""
    counts = Counter((t.config, size_of(t), t.seed) for t in trials if t.is_complete)
    return sorted({config for (config, _, _), count in counts.items() if count > 1})


def seed_of(trial: TrialResult) -> str:
    return trial.trial_id if trial.seed is None else str(trial.seed)


def size_of(trial: TrialResult) -> str:
    return trial.params.get("model_size", "")
