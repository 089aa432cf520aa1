"""The order of trials: never worse than placing the longest first, in the list's order where it makes no difference."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llgbm.training import TrainingConfig
from tuning.search.queue import ListQueue, longest_first
from tuning.studies import STUDIES, StudyOptions
from tuning.studies.spec import TrialSpec

Costs = dict[str, float]


def run(
    trials: Sequence[TrialSpec], costs: Costs, places: int, order: ListQueue, clock: list[float]
) -> float:
    """Run a list on so many places, each trial for the seconds of its configuration; return when the last ends."""
    running: list[tuple[float, int, TrialSpec]] = []
    handed_out = []
    while len(handed_out) < len(trials) or running:
        while len(running) < places and (spec := order.ask()):
            handed_out.append(spec)
            heapq.heappush(running, (clock[0] + costs[spec.name], len(handed_out), spec))
        clock[0], _, spec = heapq.heappop(running)
        order.tell(spec, {"finished": True})
    assert sorted(spec.id for spec in handed_out) == sorted(spec.id for spec in trials)
    return clock[0]


def in_turn(trials: Sequence[TrialSpec], costs: Costs, places: int) -> float:
    """The same with trials in the order of the list."""
    ends = [0.0] * places
    for trial in trials:
        heapq.heapreplace(ends, ends[0] + costs[trial.name])
    return max(ends)


def phase_4_5(costs: Costs, places: int, known: bool) -> float:
    trials = STUDIES["phase_4_5"](StudyOptions()).trials
    by_config = {trial.config: costs[trial.name] for trial in trials}
    clock = [0.0]
    estimate = by_config.get if known else lambda config: None
    order = ListQueue(trials, trials, places, estimate, lambda: clock[0])
    return run(trials, costs, places, order, clock)


@pytest.mark.parametrize("known", [True, False])
def test_nine_trials_on_two_places_end_when_they_can(known: bool) -> None:
    costs = {"multitask": 91.0, "delta-only": 91.0, "weight-only": 57.0}
    trials = STUDIES["phase_4_5"](StudyOptions()).trials
    assert in_turn(trials, costs, 2) == 387
    every = [costs[trial.name] for trial in trials]
    best = min(
        max(
            sum(c for c, place in zip(every, places, strict=True) if place == which)
            for which in (0, 1)
        )
        for places in product((0, 1), repeat=len(every))
    )
    assert phase_4_5(costs, 2, known) == best == 364


@pytest.mark.whole
@settings(deadline=None)
@given(st.tuples(*[st.floats(1, 100)] * 3), st.integers(1, 5))
def test_with_known_times_it_is_within_grahams_bound(
    seconds: tuple[float, ...], places: int
) -> None:
    costs = dict(zip(("multitask", "delta-only", "weight-only"), seconds, strict=True))
    each = [seconds[i] for i in range(3) for _ in range(3)]
    lowest = max(sum(each) / places, max(each))
    graham = longest_first([0.0] * places, sorted(each, reverse=True))
    assert lowest <= phase_4_5(costs, places, True) * (1 + 1e-9)
    assert phase_4_5(costs, places, True) <= graham / 0.99 ** len(each)


def test_trials_of_one_kind_keep_the_order_of_the_list() -> None:
    trials = STUDIES["phase_4_5"](
        StudyOptions(lambda_weight=(0.1, 0.3), lambda_delta=(1.0,), seeds=(0, 1, 2))
    ).trials
    order = ListQueue(trials, trials, 2)
    assert [order.ask() for _ in trials] == list(trials)
    assert order.ask() is None and order.is_done()
    assert order.steps_left() == sum(trial.config.steps for trial in trials)
    for trial in trials[:4]:
        order.tell(trial, {"finished": True})
    assert order.steps_left() == sum(trial.config.steps for trial in trials[4:])
    assert order.describe() == "2 of 6 trials left to run" and order.trials() == trials


def test_one_of_each_unknown_kind_is_started_first() -> None:
    trials = STUDIES["phase_4_5"](StudyOptions()).trials
    order = ListQueue(trials, trials, 4)
    names = [spec.name for _ in range(4) if (spec := order.ask())]
    assert names == ["multitask", "delta-only", "weight-only", "multitask"]


def test_progress_tells_the_time_of_a_kind_that_has_not_ended_yet() -> None:
    clock = [0.0]
    trials = STUDIES["phase_4_5"](StudyOptions()).trials
    short = [trial for trial in trials if trial.name == "weight-only"]
    long = [trial for trial in trials if trial.name == "multitask"]
    order = ListQueue(trials, [*short, *long[:2]], 2, clock=lambda: clock[0])
    assert [order.ask(), order.ask()] == [short[0], long[0]]
    clock[0] = 10.0
    order.progress(long[0], {"step": TrainingConfig().steps // 10})
    order.tell(short[0], {"finished": True})
    # The running one ends at 100, a short one takes 10: one of them before the other long one costs nothing, two do.
    assert order.ask() == short[1]
    clock[0] = 20.0
    order.tell(short[1], {"finished": True})
    assert order.ask() == long[1]


def test_what_was_stopped_or_failed_or_run_before_teaches_nothing() -> None:
    clock = [0.0]
    trials = STUDIES["phase_4_5"](StudyOptions()).trials
    for result in (None, {"failed": "x"}, {"finished": True, "reused": True}, {"step": 3}):
        order = ListQueue(trials, trials, 1, clock=lambda: clock[0])
        first = order.ask()
        assert first is not None
        order.tell(first, result)
        assert not order._measured
