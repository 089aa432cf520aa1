"""The tests behind a report: against scipy and statsmodels, on planted effects, and on studies without any."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.weightstats import DescrStatsW

from llgbm.runtime import stream_seed
from tuning.report.groups import Cell, Comparison, compare, group_trials, reference_of
from tuning.significance import crossed_test, holm, paired_comparison
from tuning.tracking.runs import TrialResult

NAMES = ("weight-only", "delta-only", "multitask", "other", "more", "last")


def cells(
    seed: int, seeds: int, tasks: int, by_seed: float = 1.0, by_task: float = 1.0
) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise_ST = rng.normal(size=(seeds, tasks))
    return 0.5 + by_seed * rng.normal(size=(seeds, 1)) + by_task * rng.normal(size=tasks) + noise_ST


def trial(config: str, seed: int, accuracy: float, **changed: object) -> TrialResult:
    metrics = {"heldout/accuracy": accuracy, "val/accuracy": accuracy}
    made = TrialResult(
        f"{config}{seed}",
        config,
        seed,
        "FINISHED",
        metrics,
        {},
        {"model_size": "nano"},
        f"run {config} {seed}",
    )
    return replace(made, **changed)  # type: ignore[arg-type]


def compared(accuracy_CST: np.ndarray) -> list[Comparison]:
    """The comparisons of a study whose accuracies are given as [configurations, seeds, tasks]."""
    trials, by_task = [], {}
    for name, accuracy_ST in zip(NAMES, accuracy_CST, strict=False):
        for seed, accuracy_T in enumerate(accuracy_ST):
            trials.append(trial(name, seed, float(accuracy_T.mean())))
            by_task[trials[-1].run_id] = {
                f"task {i}": float(value) for i, value in enumerate(accuracy_T)
            }
    return compare(group_trials(trials, by_task))


@dataclass(frozen=True)
class Scenario:
    """Standard deviations in logits: of tasks for all, of configuration × seed, configuration × task, and each cell."""

    configurations: int
    seeds: int
    tasks: int
    by_seed: float
    by_task: float
    by_cell: float

    def draw(self, rng: np.random.Generator, effect: float = 0.0, examples: int = 24) -> np.ndarray:
        """Accuracies [configurations, seeds, tasks]; the last configuration is better by `effect` logits."""
        c, s, t = self.configurations, self.seeds, self.tasks
        logits = 0.3 + rng.normal(0, 1.5, t) + rng.normal(0, self.by_seed, (c, s, 1))
        logits = (
            logits + rng.normal(0, self.by_task, (c, 1, t)) + rng.normal(0, self.by_cell, (c, s, t))
        )
        logits[-1] += effect
        return rng.binomial(examples, 1 / (1 + np.exp(-logits))) / examples


NULLS = [
    Scenario(3, 3, 24, 0.0, 0.0, 0.5),
    Scenario(3, 3, 24, 0.8, 0.2, 0.5),
    Scenario(3, 3, 24, 0.1, 0.7, 0.5),
    Scenario(4, 5, 12, 0.3, 0.5, 0.3),
]


@pytest.fixture(autouse=True, scope="module")
def quick_collection() -> Iterator[None]:
    """statsmodels collects garbage at every correction: five sixths of the time unless what is there is set aside."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def false_alarms(scenario: Scenario, studies: int, seed: int = 7) -> float:
    """Share of studies without any effect in which at least one comparison is called significant."""
    rng = np.random.default_rng(seed)
    return float(
        np.mean([any(c.is_clear for c in compared(scenario.draw(rng))) for _ in range(studies)])
    )


@pytest.mark.parametrize("scenario", NULLS, ids=str)
def test_a_study_without_effect_is_called_significant_in_at_most_one_of_twenty(
    scenario: Scenario,
) -> None:
    assert false_alarms(scenario, studies=200) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("shape", list(product((2, 3, 6), (3, 5, 10), (6, 24))), ids=str)
def test_null_studies_of_many_shapes(shape: tuple[int, int, int]) -> None:
    noises = product((0.0, 0.3, 1.0), (0.0, 0.3, 0.8), (0.2, 1.0))
    rates = {n: false_alarms(Scenario(*shape, *n), 60, stream_seed(*shape, *n)) for n in noises}
    print(
        shape, "mean", round(float(np.mean(list(rates.values()))), 4), "worst", max(rates.values())
    )
    assert np.mean(list(rates.values())) <= 0.05
    assert max(rates.values()) <= stats.binom.ppf(0.999, 60, 0.05) / 60, rates


def test_a_planted_improvement_is_found() -> None:
    rng = np.random.default_rng(3)
    scenario = Scenario(3, 3, 24, 0.1, 0.5, 0.3)
    found = [compared(scenario.draw(rng, effect=1.5)) for _ in range(40)]
    better = [
        next(c for c in each if (c.config, c.reference) == ("multitask", "weight-only"))
        for each in found
    ]
    assert np.mean([c.is_clear and c.difference > 0 for c in better]) >= 0.8


@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(2, 30))
@settings(max_examples=40, deadline=None)
def test_the_crossed_test_is_the_larger_of_min_f_and_the_paired_t_test(
    seed: int, seeds: int, tasks: int
) -> None:
    differences_ST = cells(seed, seeds, tasks)
    found = crossed_test(differences_ST)
    assert found is not None
    over_seeds = stats.ttest_1samp(differences_ST.mean(1), 0)
    f1, f2 = over_seeds.statistic**2, stats.ttest_1samp(differences_ST.mean(0), 0).statistic ** 2
    freedom = (f1 + f2) ** 2 / (f1**2 / (tasks - 1) + f2**2 / (seeds - 1))
    assert found.p_both == pytest.approx(stats.f.sf(f1 * f2 / (f1 + f2), 1, freedom), abs=1e-12)
    assert found.p_seeds == pytest.approx(over_seeds.pvalue)
    assert found.p == max(found.p_both, found.p_seeds)
    assert (found.interval[0] * found.interval[1] > 0) == (found.p < 0.05)


def test_its_variance_is_that_of_a_mixed_model_plus_the_noise_of_the_cells() -> None:
    differences_ST = cells(5, 6, 20)
    seeds, tasks = differences_ST.shape
    columns = {
        "y": differences_ST.ravel(),
        "s": np.repeat(range(seeds), tasks),
        "t": np.tile(range(tasks), seeds),
    }
    table = pd.DataFrame(columns)
    parts = {"s": "0 + C(s)", "t": "0 + C(t)"}
    model = smf.mixedlm("y ~ 1", table, groups=np.ones(seeds * tasks), vc_formula=parts).fit()
    found = crossed_test(differences_ST)
    assert found is not None
    by_seed, by_task = (
        differences_ST.mean(axis).var(ddof=1) / differences_ST.mean(axis).size for axis in (1, 0)
    )
    freedom = (by_seed + by_task) ** 2 / (by_seed**2 / (seeds - 1) + by_task**2 / (tasks - 1))
    error = (found.interval[1] - found.difference) / stats.t.ppf(0.975, freedom)
    noise = model.scale / (seeds * tasks)
    assert found.difference == pytest.approx(model.params["Intercept"])
    assert error**2 - noise == pytest.approx(model.bse["Intercept"] ** 2, rel=0.01)


def test_where_nothing_varies_no_test_is_made() -> None:
    assert crossed_test(np.zeros((3, 4))) is None
    assert crossed_test(np.full((3, 4), 0.25)) is None
    assert crossed_test(cells(0, 1, 8)) is None


def test_a_paired_comparison_is_scipys_and_every_sign_flip() -> None:
    rng = np.random.default_rng(2)
    old = {f"t{i}": float(rng.uniform()) for i in range(10)}
    new = {task: value + float(rng.normal(0.05, 0.1)) for task, value in old.items()}
    found = paired_comparison(new, old)
    differences = np.array([new[task] - old[task] for task in old])
    paired = stats.ttest_rel(list(new.values()), list(old.values()))
    interval = DescrStatsW(differences).tconfint_mean(0.05)
    assert found.interval == pytest.approx(interval)
    assert found.effect == pytest.approx(paired.statistic / np.sqrt(10))
    flipped = np.array(list(product((-1, 1), repeat=10))) @ differences / 10
    assert found.p == pytest.approx(np.mean(np.abs(flipped) >= abs(differences.mean()) - 1e-12))


def test_a_new_generator_is_better_only_where_the_tasks_show_it() -> None:
    old = {f"t{i}": 0.1 * i for i in range(8)}
    higher = {task: value + 0.1 for task, value in old.items()}
    assert paired_comparison(higher, old).is_better
    assert not paired_comparison(old, higher).is_better
    assert not paired_comparison(old, old).is_better
    few = paired_comparison(
        {t: higher[t] for t in list(old)[:5]}, {t: old[t] for t in list(old)[:5]}
    )
    assert not few.is_better and "below 6 tasks" in few.verdict


def test_examples_of_one_task_are_no_evidence_about_tasks() -> None:
    many = paired_comparison(
        {"a": [1.0] * 500, "b": [0.0] * 500}, {"a": [0.0] * 500, "b": [0.0] * 500}
    )
    assert (many.difference, many.n, many.is_better) == (0.5, 2, False)


@pytest.mark.parametrize(
    "old", [{}, {"a": 0.5}, {"a": 0.5, "c": 0.5}, {"a": 0.5, "b": float("nan")}, {"a": [], "b": 1}]
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_cannot_be_paired_is_refused(old: dict) -> None:
    with pytest.raises(ValueError, match="task"):
        paired_comparison({"a": 0.5, "b": 0.5}, old)


def test_two_equal_generators_are_rarely_told_apart() -> None:
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(100):
        rates_T = rng.uniform(size=9)
        new, old = (dict(enumerate(rng.binomial(24, rates_T) / 24)) for _ in range(2))
        alarms += (
            paired_comparison(
                {str(k): v for k, v in new.items()}, {str(k): v for k, v in old.items()}
            ).p
            <= 0.05
        )
    assert alarms <= 5


def test_holm_leaves_out_what_has_no_p() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([None]) == [None]


def test_the_interval_of_a_mean_is_statsmodels() -> None:
    values = (0.60, 0.70, 0.65)
    cell = Cell.of(values)
    assert cell is not None and cell.sd == pytest.approx(np.std(values, ddof=1))
    assert cell.interval == pytest.approx(DescrStatsW(values).tconfint_mean(0.05))


def test_without_numbers_by_task_seeds_alone_are_paired() -> None:
    values = {"multitask": (0.60, 0.70, 0.65), "weight-only": (0.40, 0.52, 0.43)}
    trials = [
        trial(name, seed, value) for name, own in values.items() for seed, value in enumerate(own)
    ]
    (found,) = compare(group_trials(trials))
    paired = stats.ttest_rel(values["multitask"], values["weight-only"])
    assert (found.tasks, found.effect) == (0, None)
    assert found.p == pytest.approx(paired.pvalue)
    assert found.interval == pytest.approx(tuple(paired.confidence_interval(0.95)))


def test_only_tasks_and_seeds_that_both_have_are_compared() -> None:
    first = [trial("multitask", s, 0.8) for s in range(4)]
    second = [trial("weight-only", s, 0.5) for s in range(1, 5)]
    by_task = {t.run_id: {"a": 0.9, "b": 0.6 + 0.1 * (t.seed or 0)} for t in first}
    by_task |= {t.run_id: {"b": 0.5, "c": 0.0, "a": 0.4 + 0.01 * (t.seed or 0)} for t in second}
    (found,) = compare(group_trials([*first, *second], by_task))
    assert (found.n, found.tasks, found.wins, found.losses) == (3, 2, 2, 0)


def test_the_reference_is_chosen_by_validation_and_not_by_held_out_tasks() -> None:
    low = trial("weight-only a", 0, 0.9, metrics={"heldout/accuracy": 0.9, "val/accuracy": 0.1})
    high = trial("weight-only b", 0, 0.2, metrics={"heldout/accuracy": 0.2, "val/accuracy": 0.5})
    groups = group_trials([low, high, trial("multitask", 0, 0.5)])
    chosen = reference_of(groups, "nano")
    assert chosen is not None and chosen.config == "weight-only b"


def test_stopped_superseded_and_failed_trials_do_not_count() -> None:
    kept = trial("multitask", 0, 0.5)
    others = [{"stopped_at": 10}, {"superseded": True}, {"status": "FAILED"}, {"status": "KILLED"}]
    (group,) = group_trials(
        [kept, *(trial("multitask", s + 1, 0.9, **o) for s, o in enumerate(others))]
    )
    assert group.trials == (kept,)


def test_two_seeds_are_compared_without_a_test() -> None:
    accuracy_CST = Scenario(2, 2, 24, 0.1, 0.1, 0.1).draw(np.random.default_rng(0), effect=3.0)
    (found,) = compared(accuracy_CST)
    assert (found.p, found.interval, found.is_clear) == (None, None, False) and found.difference > 0
