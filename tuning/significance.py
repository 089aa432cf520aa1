"""Paired tests, intervals and Holm's correction over seeds and tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import stats

SIGNIFICANCE = 0.05
FLIPS = 9999
EXACT_TASKS = 13  # 2^13 flips are fewer than FLIPS
TASKS_FOR_TEST = 6  # 2 of 2^5 sign flips are still 0.06
TaskValue = float | Sequence[float]
Ends = tuple[float, float]
# What a number can be: anything, a share such as an accuracy, a difference of two shares.
ANY, SHARES, DIFFERENCES = (-math.inf, math.inf), (0.0, 1.0), (-1.0, 1.0)


@dataclass(frozen=True)
class PairedTest:
    """Two generators on the same n tasks, new minus old.

    `difference` is the mean over tasks, `interval` its 95 % interval by Student's t, `p` that of the two-sided
    sign-flip test, corrected for the `candidates` that the new one was picked from, `effect` the difference over its
    standard deviation over tasks (Cohen's d_z). A value that cannot be computed (one task; no spread) is None.
    """

    difference: float
    interval: tuple[float, float] | None
    p: float
    effect: float | None
    n: int
    candidates: int = 1

    @property
    def is_better(self) -> bool:
        """True if the new one is better at the 5 % level, two-sided."""
        return self.difference > 0 and self.p <= SIGNIFICANCE

    @property
    def verdict(self) -> str:
        """Return one sentence: better or not, by how much, with which evidence."""
        parts = [f"{self.difference:+.3f} over {self.n} tasks"]
        if self.interval:
            parts.append(f"95 % interval {self.interval[0]:+.3f} to {self.interval[1]:+.3f}")
        parts.append(p_text(self.p))
        if self.candidates > 1:
            parts[-1] += f" as the best of {self.candidates} candidates"
        if self.effect is not None:
            parts.append(f"effect size {self.effect:+.2f}")
        numbers = ", ".join(parts)
        if self.n < TASKS_FOR_TEST:
            numbers += f"; below {TASKS_FOR_TEST} tasks nothing can be told"
        if self.is_better:
            return f"better: {numbers}"
        return f"not shown to be better: {numbers}"


def paired_comparison(
    new: Mapping[str, TaskValue],
    old: Mapping[str, TaskValue],
    rivals: Sequence[Mapping[str, TaskValue]] = (),
) -> PairedTest:
    """Compare two generators by their accuracy on the same tasks, given by task name; the task is the unit.

    A task's value is its accuracy, or a list over its examples, which is averaged: examples of one task are no
    independent evidence about tasks. p is that of the sign-flip permutation test on the differences of the tasks: it
    holds for any distribution that is symmetric around 0 without an effect, ties and accuracies of exactly 0 or 1
    included, and cannot fall to 0.05 below six tasks. `rivals` are the generators that `new` was picked from as the
    best; see `selected_p`. Raises ValueError if there is no task, the tasks differ, or a value is missing or not
    finite.
    """
    tasks = sorted(new)
    rows = [
        np.array([float(np.mean(one[task])) for task in tasks])
        for one in _same_tasks(new, old, rivals)
    ]
    differences_KT = np.stack([row - rows[1] for row in (rows[0], *rows[2:])])
    if not np.isfinite(differences_KT).all():
        raise ValueError("an accuracy of a task is missing or not finite: nothing can be compared")
    differences = differences_KT[0]
    p = sign_flip_p(differences) if len(differences_KT) == 1 else selected_p(differences_KT)
    return PairedTest(
        float(differences.mean()),
        student_interval(differences),
        p,
        effect_size(differences),
        len(differences),
        len(differences_KT),
    )


def _same_tasks(
    new: Mapping[str, TaskValue],
    old: Mapping[str, TaskValue],
    rivals: Sequence[Mapping[str, TaskValue]],
) -> list[Mapping[str, TaskValue]]:
    """Return new, old and those rivals that were measured on the same tasks. Raises ValueError for new and old."""
    if not new or set(new) != set(old):
        odd = ", ".join(sorted(set(new) ^ set(old))[:5]) or "there is none"
        raise ValueError(f"two generators are compared on the same tasks, at least one: {odd}")
    return [new, old, *(rival for rival in rivals if set(rival) == set(new))]


def selected_p(differences_KT: np.ndarray) -> float:
    """Return the two-sided p of the first of K candidates, picked as the best of them, on T tasks.

    Step of Westfall and Young (1993): the sign of a task is flipped for all candidates together, and the largest of
    their means is compared with the mean of the first. The correlation of candidates, which share the old generator's
    errors, is kept. All flips up to 13 tasks, else `FLIPS` random ones.
    """
    n = differences_KT.shape[1]
    if n <= EXACT_TASKS:
        signs_FT = np.array(list(product((1.0, -1.0), repeat=n)))
    else:
        signs_FT = np.random.default_rng(0).choice((1.0, -1.0), (FLIPS + 1, n))
        signs_FT[0] = 1.0  # the differences as they are
    best_F = (signs_FT @ differences_KT.T / n).max(1)
    share = float(np.mean(best_F >= differences_KT[0].mean() - 1e-12))
    return min(1.0, 2 * share)


def sign_flip_p(differences: np.ndarray) -> float:
    """Return p of the two-sided sign-flip permutation test of a mean of 0; 1 for a single value."""
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


def student_interval(values: np.ndarray, ends: Ends = ANY) -> Ends | None:
    """Return the 95 % interval of the mean by Student's t, cut to the values that there can be (`ends`).

    None below two values or without spread.
    """
    if len(values) < 2 or _no_spread(values):
        return None
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return within((float(interval.low), float(interval.high)), ends)


def within(interval: Ends, ends: Ends) -> Ends:
    """Cut an interval to the values that there can be."""
    return max(ends[0], interval[0]), min(ends[1], interval[1])


def effect_size(differences: np.ndarray) -> float | None:
    """Return Cohen's d_z, the mean over the standard deviation; None without spread."""
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
    """Test that paired differences [S, T] have mean 0, with seeds and tasks as random; None if no test is possible.

    Cells are not independent: a seed moves all tasks and a task moves all seeds. Two tests are made, and the larger p
    and the wider interval count. The first adds the variance of the mean over seeds and that over tasks, with
    Satterthwaite's degrees of freedom: min F' of Clark (1973), conservative because it counts the noise of single
    cells twice. It is too optimistic if few seeds are the main source of noise; there the second, the paired t-test
    of the seeds' means, gives the larger p. Needs two seeds and two tasks.
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
    """Return p of a mean of 0 and half the width of its 95 % interval, given the variance of the mean."""
    error = math.sqrt(variance)
    if error < 1e-12:
        return float(abs(mean) < 1e-12), 0.0
    p = float(2 * stats.t.sf(abs(mean) / error, freedom))
    return p, float(stats.t.ppf(0.975, freedom)) * error


def _no_spread(values: np.ndarray) -> bool:
    return math.isclose(float(values.std()), 0, abs_tol=1e-12)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's step-down correction of the p-values that are not None."""
    from statsmodels.stats.multitest import multipletests

    corrected = list(p_values)
    places = [place for place, p in enumerate(p_values) if p is not None]
    if places:
        found = multipletests([p_values[place] for place in places], method="holm")[1]
        for place, p in zip(places, found.tolist(), strict=True):
            corrected[place] = p
    return corrected


def p_text(value: float | None) -> str:
    """Return a p-value for people, "p = 0.012" or "p < 0.001"."""
    if value is None:
        return "no p"
    if value < 0.001:
        return "p < 0.001"
    return f"p = {value:.3f}"
