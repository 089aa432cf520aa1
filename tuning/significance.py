"""Paired tests, intervals and Holm's correction over seeds and tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

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
        low_high = (
            f", 95 % interval {self.interval[0]:+.3f} to {self.interval[1]:+.3f}"
            if self.interval
            else ""
        )
        effect = f", effect size {self.effect:+.2f}" if self.effect is not None else ""
        few = (
            f"; below {TASKS_FOR_TEST} tasks nothing can be told" if self.n < TASKS_FOR_TEST else ""
        )
        numbers = (
            f"{self.difference:+.3f} over {self.n} tasks{low_high}, {p_text(self.p)}{effect}{few}"
        )
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
    differences = np.array(
        [float(np.mean(new[task])) - float(np.mean(old[task])) for task in sorted(new)]
    )
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
    if (
        min(n_seeds, n_tasks) < 2
        or _no_spread(differences_ST.mean(0))
        and _no_spread(differences_ST.mean(1))
    ):
        return None
    mean, over_tasks_T = float(differences_ST.mean()), differences_ST.mean(0)
    by_seed = float(differences_ST.mean(1).var(ddof=1)) / n_seeds
    by_task = float(over_tasks_T.var(ddof=1)) / n_tasks
    freedom = (by_seed + by_task) ** 2 / (by_seed**2 / (n_seeds - 1) + by_task**2 / (n_tasks - 1))
    p_both, wide = _student(mean, by_seed + by_task, freedom)
    p_seeds, wide_seeds = _student(mean, by_seed, n_seeds - 1)
    reach = max(wide, wide_seeds)
    interval = (mean - reach, mean + reach)
    return CrossedTest(
        mean, interval, max(p_both, p_seeds), p_both, p_seeds, effect_size(over_tasks_T)
    )


def _student(mean: float, variance: float, freedom: float) -> tuple[float, float]:
    """p of a mean of 0 and half the width of its 95 % interval, given the variance of the mean."""
    error = math.sqrt(variance)
    if error < 1e-12:
        return (1.0 if abs(mean) < 1e-12 else 0.0), 0.0
    return float(2 * stats.t.sf(abs(mean) / error, freedom)), float(
        stats.t.ppf(0.975, freedom)
    ) * error


def _no_spread(values: np.ndarray) -> bool:
    return math.isclose(float(values.std()), 0, abs_tol=1e-12)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction of the values that are there."""
    from statsmodels.stats.multitest import multipletests

    given = [p for p in p_values if p is not None]
    corrected = iter(multipletests(given, method="holm")[1].tolist() if given else ())
    return [None if p is None else next(corrected) for p in p_values]


def p_text(value: float | None) -> str:
    """A p-value for people, "p = 0.012" or "p < 0.001"."""
    if value is None:
        return "no p"
    return f"p = {value:.3f}" if value >= 0.001 else "p < 0.001"
