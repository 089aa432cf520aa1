"""Trials grouped, summarised and compared: means and spreads over seeds, paired tests with Holm's correction.

Only finished trials count. Several trials of one seed are averaged first, so that a spread is always one over seeds.
Two generators, say a new one and the registry's champion, are compared by `paired_comparison`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy import stats

from tuning.tracking import TrialResult

MAIN = "heldout/accuracy"
REFERENCE = "weight-only"
SEEDS_FOR_SPREAD = 3
SIGNIFICANCE = 0.05
FLIPS = 9999
TASKS_FOR_TEST = 6  # 2 of 2^5 sign flips are still 0.06


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
        numbers = f"{self.difference:+.3f} over {self.n} tasks{low_high}, p {number(self.p)}{effect}{few}"
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


def _no_spread(values: np.ndarray) -> bool:
    return math.isclose(float(values.std()), 0, abs_tol=1e-12)


@dataclass(frozen=True)
class Cell:
    """Mean over n seeds, with the sample standard deviation where there are enough seeds to speak of one."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Cell | None:
        """Summarise values; None if there are none."""
        array = np.asarray(list(values), dtype=float)
        if not array.size:
            return None
        spread = float(array.std(ddof=1)) if array.size >= SEEDS_FOR_SPREAD else None
        return cls(float(array.mean()), spread, int(array.size))

    def __str__(self) -> str:
        return number(self.mean) if self.sd is None else f"{number(self.mean)} ± {number(self.sd)}"


@dataclass(frozen=True)
class Group:
    """The finished trials of one configuration at one model size."""

    config: str
    size: str
    label: str
    trials: tuple[TrialResult, ...]

    def by_seed(self, metric: str) -> dict[str, float]:
        """The value of each seed (the mean over its trials), for the trials that have the metric."""
        found: dict[str, list[float]] = {}
        for trial in self.trials:
            if metric in trial.metrics:
                found.setdefault(seed_of(trial), []).append(trial.metrics[metric])
        return {seed: float(np.mean(values)) for seed, values in found.items()}

    def cell(self, metric: str) -> Cell | None:
        """Mean and spread over seeds, or None where no trial has the metric."""
        return Cell.of(self.by_seed(metric).values())

    @cached_property
    def seeds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(seed_of(trial) for trial in self.trials))


@dataclass(frozen=True)
class Comparison:
    """A configuration against the reference of its size, on the seeds that both have; p is of the paired t-test."""

    config: str
    reference: str
    size: str
    difference: float
    sd: float | None
    interval: tuple[float, float] | None
    p: float | None
    n: int
    p_holm: float | None = None

    @property
    def is_clear(self) -> bool:
        """Whether the 95 % interval leaves 0 out."""
        return self.interval is not None and self.interval[0] * self.interval[1] > 0


def group_trials(trials: Sequence[TrialResult]) -> list[Group]:
    """Finished trials by configuration and model size, in order of appearance; several sizes show in the labels."""
    sizes = list(dict.fromkeys(size_of(trial) for trial in trials))
    keys = dict.fromkeys((size_of(trial), trial.config) for trial in trials if trial.status == "FINISHED")
    return [
        Group(
            config,
            size,
            f"{config} ({size})" if len(sizes) > 1 else config,
            tuple(t for t in trials if (size_of(t), t.config, t.status) == (size, config, "FINISHED")),
        )
        for size, config in sorted(keys, key=lambda key: sizes.index(key[0]))
    ]


def compare(groups: Sequence[Group]) -> list[Comparison]:
    """Every configuration against the best weight-only one of its size, with Holm's correction over all of them."""
    found = []
    for size in dict.fromkeys(group.size for group in groups):
        ordered = ranked(groups, size)
        reference = next((group for group in ordered if group.config.startswith(REFERENCE)), None)
        if reference:
            found += [_compare(group, reference) for group in ordered if group is not reference]
    found = [comparison for comparison in found if comparison.n]
    corrected = holm([comparison.p for comparison in found])
    return [replace(c, p_holm=p) for c, p in zip(found, corrected, strict=True)]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction of the values that are there (Holm 1979)."""
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        corrected[place] = largest
    return corrected


def _compare(group: Group, reference: Group) -> Comparison:
    own, other = group.by_seed(MAIN), reference.by_seed(MAIN)
    differences = np.array([own[seed] - other[seed] for seed in own if seed in other])
    n = len(differences)
    mean = float(differences.mean()) if n else 0.0
    names = (group.label, reference.label, group.size)
    if n < SEEDS_FOR_SPREAD:
        return Comparison(*names, mean, None, None, None, n)
    sd = float(differences.std(ddof=1))
    if math.isclose(sd, 0, abs_tol=1e-12):
        return Comparison(*names, mean, 0.0, None, None, n)
    error = sd / math.sqrt(n)
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    return Comparison(*names, mean, sd, (mean - reach, mean + reach), p, n)


def ranked(groups: Sequence[Group], size: str) -> list[Group]:
    scored = [(group.cell(MAIN), group) for group in groups if group.size == size]
    return [group for cell, group in sorted(scored, key=lambda pair: -pair[0].mean if pair[0] else 0) if cell]


def number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def repeated_seeds(trials: Sequence[TrialResult]) -> list[str]:
    """Configurations that hold more than one finished trial of a seed."""
    counts = Counter((t.config, size_of(t), t.seed) for t in trials if t.status == "FINISHED")
    return sorted({config for (config, _, _), count in counts.items() if count > 1})


def seed_of(trial: TrialResult) -> str:
    return trial.trial_id if trial.seed is None else str(trial.seed)


def size_of(trial: TrialResult) -> str:
    return trial.params.get("model_size", "")
