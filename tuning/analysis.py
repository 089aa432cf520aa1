"""Trials grouped, summarised and compared: means and intervals over seeds, paired tests with Holm's correction.

Only whole trials count. Several trials of one seed are averaged first, so that a spread is always one over seeds.
Configurations are compared over seeds and held-out tasks at once (`crossed_test`); two generators, say a new one and
the registry's champion, over tasks (`paired_comparison`). docs/decisions/0015 says why these tests.

Letters: S seeds, T tasks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations

import numpy as np
from scipy import stats

from tuning.runs import TrialResult

MAIN = "heldout/accuracy"
CHOOSING = "val/accuracy"
REFERENCE = "weight-only"
SEEDS_FOR_SPREAD = 3
SIGNIFICANCE = 0.05
FLIPS = 9999
TASKS_FOR_TEST = 6  # 2 of 2^5 sign flips are still 0.06
ALL_PAIRS = 5  # up to so many configurations of a size, every pair is compared; above, each with the reference

AccuracyByTask = Mapping[str, float]


@dataclass(frozen=True)
class PairedTest:
    """Two generators on the same n tasks, new minus old.

    `difference` is the mean over tasks, `interval` its 95 % interval by Student's t, `p` that of the two-sided
    sign-flip test, `effect` the difference over its standard deviation over tasks (Cohen's d_z). What cannot be
    computed (one task; no spread) is None. `verdict` says it in one sentence.
    """

    difference: float
    interval: tuple[float, float] | None
    p: float
    effect: float | None
    n: int

    @property
    def is_better(self) -> bool:
        """Whether the new one is better at the 5 % level, two-sided."""
        return self.difference > 0 and self.p <= SIGNIFICANCE

    @property
    def verdict(self) -> str:
        """One sentence: better or not, by how much, how sure."""
        low_high = f", 95 % interval {self.interval[0]:+.3f} to {self.interval[1]:+.3f}" if self.interval else ""
        effect = f", effect size {self.effect:+.2f}" if self.effect is not None else ""
        few = f"; below {TASKS_FOR_TEST} tasks nothing can be told" if self.n < TASKS_FOR_TEST else ""
        numbers = f"{self.difference:+.3f} over {self.n} tasks{low_high}, {p_text(self.p)}{effect}{few}"
        return f"{'better' if self.is_better else 'not shown to be better'}: {numbers}"


def paired_comparison(
    new: Mapping[str, float | Sequence[float]], old: Mapping[str, float | Sequence[float]]
) -> PairedTest:
    """Compare two generators by their accuracy on the same tasks, given by task name; the task is the unit.

    A task's value is its accuracy, or a list over its examples, which is averaged: examples of one task are no
    independent evidence about tasks. The p-value is that of the sign-flip permutation test on the tasks' differences
    (all 2^n flips up to 13 tasks, else 9999 random ones, always the same): it holds for any distribution that is
    symmetric around 0 without an effect, ties and accuracies of exactly 0 or 1 included, and cannot fall to 0.05
    below six tasks. Raises ValueError if there is no task, the tasks differ, or a value is missing or not finite.
    """
    if not new or set(new) != set(old):
        odd = ", ".join(sorted(set(new) ^ set(old))[:5]) or "there is none"
        raise ValueError(f"two generators are compared on the same tasks, at least one: {odd}")
    differences = np.array([float(np.mean(new[task])) - float(np.mean(old[task])) for task in sorted(new)])
    if not np.isfinite(differences).all():
        raise ValueError("an accuracy of a task is missing or not finite: nothing can be compared")
    return PairedTest(
        float(differences.mean()),
        student_interval(differences),
        sign_flip_p(differences),
        effect_size(differences),
        len(differences),
    )


def sign_flip_p(differences: np.ndarray) -> float:
    """p of the two-sided sign-flip permutation test of a mean of 0; 1 for a single value."""
    if len(differences) < 2:
        return 1.0
    found = stats.permutation_test(
        (differences,),
        lambda values, axis: values.mean(axis=axis),
        permutation_type="samples",
        n_resamples=FLIPS,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def student_interval(values: np.ndarray) -> tuple[float, float] | None:
    """The 95 % interval of the mean by Student's t; None below two values or where all are the same."""
    if len(values) < 2 or _no_spread(values):
        return None
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return float(interval.low), float(interval.high)


def effect_size(differences: np.ndarray) -> float | None:
    """Cohen's d_z: the mean over the standard deviation; None where there is no spread."""
    if len(differences) < 2 or _no_spread(differences):
        return None
    return float(differences.mean() / differences.std(ddof=1))


@dataclass(frozen=True)
class CrossedTest:
    """Paired differences over seeds and tasks: their mean, its 95 % interval, p, and the effect size over tasks.

    `p` is the larger of `p_both` (seeds and tasks both taken as drawn at random) and `p_seeds` (seeds alone).
    """

    difference: float
    interval: tuple[float, float]
    p: float
    p_both: float
    p_seeds: float
    effect: float | None


def crossed_test(differences_ST: np.ndarray) -> CrossedTest | None:
    """Test that paired differences [S, T] have mean 0, for seeds and tasks other than these; None if none can be made.

    The cells are not independent: a seed moves all tasks and a task moves all seeds. Two tests are made and the less
    favourable counts, its interval too. The first adds the variance of the mean over seeds and that over tasks, with
    Satterthwaite's degrees of freedom: the min F' of Clark (1973), on the safe side because it counts the noise of
    single cells twice. It is too sure of itself where few seeds are the main source of noise; there the second, the
    paired t-test of the seeds' means, is the larger. Needs two seeds and two tasks.
    """
    n_seeds, n_tasks = differences_ST.shape
    if min(n_seeds, n_tasks) < 2 or _no_spread(differences_ST.mean(0)) and _no_spread(differences_ST.mean(1)):
        return None
    mean, over_tasks_T = float(differences_ST.mean()), differences_ST.mean(0)
    by_seed = float(differences_ST.mean(1).var(ddof=1)) / n_seeds
    by_task = float(over_tasks_T.var(ddof=1)) / n_tasks
    freedom = (by_seed + by_task) ** 2 / (by_seed**2 / (n_seeds - 1) + by_task**2 / (n_tasks - 1))
    p_both, wide = _student(mean, by_seed + by_task, freedom)
    p_seeds, wide_seeds = _student(mean, by_seed, n_seeds - 1)
    reach = max(wide, wide_seeds)
    interval = (mean - reach, mean + reach)
    return CrossedTest(mean, interval, max(p_both, p_seeds), p_both, p_seeds, effect_size(over_tasks_T))


def _student(mean: float, variance: float, freedom: float) -> tuple[float, float]:
    """p of a mean of 0 and half the width of its 95 % interval, given the variance of the mean."""
    error = math.sqrt(variance)
    if error < 1e-12:
        return (1.0 if abs(mean) < 1e-12 else 0.0), 0.0
    return float(2 * stats.t.sf(abs(mean) / error, freedom)), float(stats.t.ppf(0.975, freedom)) * error


def _no_spread(values: np.ndarray) -> bool:
    return math.isclose(float(values.std()), 0, abs_tol=1e-12)


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
        return {seed: {task: float(np.mean(own)) for task, own in tasks.items()} for seed, tasks in found.items()}

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


def group_trials(trials: Sequence[TrialResult], by_task: Mapping[str, AccuracyByTask] | None = None) -> list[Group]:
    """Whole trials by configuration and model size, in order of appearance; several sizes show in the labels.

    `by_task` is the held-out accuracy of every task by run id, where it was kept.
    """
    sizes = list(dict.fromkeys(size_of(trial) for trial in trials))
    keys = dict.fromkeys((size_of(trial), trial.config) for trial in trials if trial.whole)
    return [
        Group(
            config,
            size,
            f"{config} ({size})" if len(sizes) > 1 else config,
            tuple(t for t in trials if t.whole and (size_of(t), t.config) == (size, config)),
            by_task or {},
        )
        for size, config in sorted(keys, key=lambda key: sizes.index(key[0]))
    ]


def compare(groups: Sequence[Group]) -> list[Comparison]:
    """Paired comparisons of the configurations of each size, with Holm's correction over all of them.

    Every pair up to five configurations, else each with the reference; see `reference_of`.
    """
    found = [_compare(*pair) for size in dict.fromkeys(group.size for group in groups) for pair in _pairs(groups, size)]
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


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction of the values that are there."""
    from statsmodels.stats.multitest import multipletests

    given = [p for p in p_values if p is not None]
    corrected = iter(multipletests(given, method="holm")[1].tolist() if given else ())
    return [None if p is None else next(corrected) for p in p_values]


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
    tasks = [t for t in (own[seeds[0]] if seeds else ()) if all(t in own[s] and t in other[s] for s in seeds)]
    if not tasks:
        return None
    return np.array([[own[seed][task] - other[seed][task] for task in tasks] for seed in seeds])


def ranked(groups: Sequence[Group], size: str) -> list[Group]:
    """The configurations of a size that have a held-out accuracy, best first."""
    scored = [(group.cell(MAIN), group) for group in groups if group.size == size]
    return [group for cell, group in sorted(scored, key=lambda pair: -pair[0].mean if pair[0] else 0) if cell]


def number(value: float | None) -> str:
    """A value for people: three decimals, none from 100 on, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def p_text(value: float | None) -> str:
    """A p-value for people, "p = 0.012" or "p < 0.001"."""
    if value is None:
        return "no p"
    return f"p = {value:.3f}" if value >= 0.001 else "p < 0.001"


def repeated_seeds(trials: Sequence[TrialResult]) -> list[str]:
    """Configurations that hold more than one whole trial of a seed."""
    counts = Counter((t.config, size_of(t), t.seed) for t in trials if t.whole)
    return sorted({config for (config, _, _), count in counts.items() if count > 1})


def seed_of(trial: TrialResult) -> str:
    return trial.trial_id if trial.seed is None else str(trial.seed)


def size_of(trial: TrialResult) -> str:
    return trial.params.get("model_size", "")
