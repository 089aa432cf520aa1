"""Decide which trial of a study is run next.

`TrialQueue` is the interface of the sweep: `ListQueue` serves a list of trials, `points.PointQueue` a search.

Trials of one study take different times: a trial without the delta loss needs no pass through the base. `ListQueue`
orders them so that no machine waits long for the last one. Whenever a place is free, each kind of trial that is left is
tried there and the rest is placed by the better of two rules, longest first (LPT; Graham, "Bounds on multiprocessing
timing anomalies", 1969) and MULTIFIT (Coffman, Garey and Johnson, "An application of bin-packing to multiprocessor
scheduling", 1978). The kind with the earliest end of all is started. Ties, and trials of unknown time, keep the order
of the list. Times come from past runs, and from this sweep once its first trials have ended.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean, median
from typing import Any, Protocol

from llgbm.training import TrainingConfig
from tuning.studies.spec import TrialSpec
from tuning.tracking.costs import Kind, kind_of

WORTH_IT = 0.99
MANY = 100
HALVINGS = 10
Estimate = Callable[[TrainingConfig], float | None]
Result = Mapping[str, Any]


class TrialQueue(Protocol):
    """Hand out the trials of a study, and take what becomes of them."""

    def ask(self) -> TrialSpec | None:
        """Return the next trial to start; None if none can be started now."""

    def progress(self, trial: TrialSpec, result: Result) -> None:
        """Take an intermediate result of a running trial: its `step`."""

    def tell(self, trial: TrialSpec, result: Result | None) -> None:
        """Take the last result of a trial; None, or `failed` in the result, means that it failed."""

    def trials(self) -> tuple[TrialSpec, ...]:
        """Return all trials of the study that are known so far, finished ones included."""

    def is_done(self) -> bool:
        """Return True once every trial has been handed out."""

    def steps_left(self) -> int:
        """Count the training steps of the trials that have not ended."""

    def describe(self) -> str:
        """Say in one line how far the study is."""


def makespan(free_at: Sequence[float], costs: Iterable[float]) -> float:
    """Return the time at which the last cost ends, placed by the better rule on places free at these times.

    More than `MANY` costs are placed longest first: among so many, the last one matters little.
    """
    falling = sorted(costs, reverse=True)
    end = longest_first(free_at, falling)
    if len(falling) > MANY:
        return end
    low = max(*free_at, (sum(free_at) + sum(falling)) / len(free_at))
    for _ in range(HALVINGS):
        middle = (low + end) / 2
        fitted = first_fit(free_at, falling, middle)
        if fitted is None:
            low = middle
        else:
            end = fitted
    return end


def longest_first(free_at: Iterable[float], falling: Iterable[float]) -> float:
    """Place each cost, from the longest on, where a place is free first (LPT); return the last end."""
    ends = list(free_at)
    heapq.heapify(ends)
    for cost in falling:
        heapq.heapreplace(ends, ends[0] + cost)
    return max(ends)


def first_fit(free_at: Iterable[float], falling: Iterable[float], limit: float) -> float | None:
    """Place each cost, from the longest on, on the first place where it ends by `limit` (MULTIFIT's test).

    Returns the last end, or None if a cost fits nowhere.
    """
    ends = sorted(free_at, reverse=True)
    for cost in falling:
        place = next((i for i, end in enumerate(ends) if end + cost <= limit), None)
        if place is None:
            return None
        ends[place] += cost
    return max(ends)


def best_next(
    free_at: Sequence[float], costs: Mapping[Kind, float], left: Mapping[Kind, int]
) -> Kind:
    """Return the kind to start on the place that is free first, so that all that is left ends soonest.

    `left` counts the trials of each kind, in the order of preference. A later kind must save a hundredth of the time.
    """
    first, *others = sorted(free_at)
    best, shortest = next(iter(left)), float("inf")
    for kind in left:
        rest: list[float] = []
        for other, count in left.items():
            rest += [costs[other]] * (count - (other == kind))
        end = makespan([first + costs[kind], *others], rest)
        if end < WORTH_IT * shortest:
            best, shortest = kind, end
    return best


def kind_and_length(config: TrainingConfig) -> Kind:
    """Return all that the time of a whole trial depends on."""
    return (*kind_of(config), config.steps)


@dataclass
class Running:
    """Trial that was started, and its progress: the fraction `done` at the time `seen`."""

    spec: TrialSpec
    started: float
    done: float = 0.0
    seen: float = 0.0


class ListQueue:
    """Hand out those trials of a list that are `left` to run, so that the last one ends early on so many `places`."""

    def __init__(
        self,
        trials: Sequence[TrialSpec],
        left: Sequence[TrialSpec],
        places: int,
        estimate: Estimate = lambda config: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trials, self._left = tuple(trials), list(left)
        self._places, self._estimate, self._clock = places, estimate, clock
        self._running: dict[str, Running] = {}
        self._measured: dict[Kind, list[float]] = {}

    def ask(self) -> TrialSpec | None:
        """Return the trial to start now; None when all were handed out."""
        if not self._left:
            return None
        kind = self._choose()
        spec = next(trial for trial in self._left if kind_and_length(trial.config) == kind)
        self._left.remove(spec)
        self._running[spec.id] = Running(spec, self._clock())
        return spec

    def progress(self, trial: TrialSpec, result: Result) -> None:
        """Take the `step` of a running trial."""
        if running := self._running.get(trial.id):
            running.done = result.get("step", 0) / trial.config.steps
            running.seen = self._clock()

    def tell(self, trial: TrialSpec, result: Result | None) -> None:
        """Take the end of a trial; its time counts if it was run to its end here."""
        running = self._running.pop(trial.id, None)
        if running and result and result.get("finished") and not result.get("reused"):
            seconds = result.get("time/seconds", self._clock() - running.started)
            self._measured.setdefault(kind_and_length(trial.config), []).append(seconds)

    def trials(self) -> tuple[TrialSpec, ...]:
        """Return the whole list."""
        return self._trials

    def is_done(self) -> bool:
        """Return True once every trial has been handed out."""
        return not self._left

    def steps_left(self) -> int:
        """Count the training steps of the trials that have not ended."""
        running = (one.spec for one in self._running.values())
        return sum(trial.config.steps for trial in (*self._left, *running))

    def describe(self) -> str:
        """Say how many trials have not ended."""
        left = len(self._left) + len(self._running)
        return f"{left} of {len(self._trials)} trials left to run"

    def _choose(self) -> Kind:
        left = Counter(kind_and_length(trial.config) for trial in self._left)
        if unseen := next((kind for kind in left if self._is_unseen(kind)), None):
            return unseen
        known = {kind: self._seconds(kind) for kind in left}
        usual = fmean([cost for cost in known.values() if cost] or [1.0])
        now = self._clock()
        busy = [self._remaining(running, usual, now) for running in self._running.values()]
        free_at = [*busy, *[0.0] * max(1, self._places - len(busy))]
        return best_next(free_at, {kind: cost or usual for kind, cost in known.items()}, left)

    def _is_unseen(self, kind: Kind) -> bool:
        return not self._running_of(kind) and self._seconds(kind) is None

    def _running_of(self, kind: Kind) -> list[Running]:
        return [one for one in self._running.values() if kind_and_length(one.spec.config) == kind]

    def _seconds(self, kind: Kind) -> float | None:
        """Return the seconds of a whole trial: as measured here, else in past runs, else by the progress so far."""
        if kind in self._measured:
            return median(self._measured[kind])
        running = self._running_of(kind)
        waiting = (trial for trial in self._left if kind_and_length(trial.config) == kind)
        example = next(chain((one.spec for one in running), waiting))
        rates = [(one.seen - one.started) / one.done for one in running if one.done]
        past = self._estimate(example.config)
        if past or not rates:
            return past
        return median(rates)

    def _remaining(self, running: Running, usual: float, now: float) -> float:
        whole = self._seconds(kind_and_length(running.spec.config)) or usual
        return max(0.0, running.started + whole - now)
