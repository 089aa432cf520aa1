"""In which order a list of trials is run, so that no machine waits long for the last one.

Trials of one study take different times: a trial without the delta loss needs no pass through the base. Whenever a
place is free, each kind of trial that is left is tried there and the rest is placed by the better of two rules, longest
first (LPT; Graham, "Bounds on multiprocessing timing anomalies", 1969) and MULTIFIT (Coffman, Garey and Johnson, "An
application of bin-packing to multiprocessor scheduling", 1978); the kind is started with which all would end soonest.
Where it makes no difference, and where nothing is known of any time, the order of the list is kept. Times are those of
past runs, and from the first trials on those of this sweep.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from ray.tune.search import Searcher

from llgbm.training import TrainingConfig
from tuning.studies.spec import TrialSpec
from tuning.tracking.costs import Kind, kind_of

WORTH_IT = 0.99
MANY = 100
HALVINGS = 10
Estimate = Callable[[TrainingConfig], float | None]


def makespan(free_at: Sequence[float], costs: Iterable[float]) -> float:
    """When the last of these costs ends, placed by the better rule on places that are free at these times.

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
    """LPT: each cost, from the longest on, goes where a place is free first."""
    ends = list(free_at)
    heapq.heapify(ends)
    for cost in falling:
        heapq.heapreplace(ends, ends[0] + cost)
    return max(ends)


def first_fit(free_at: Iterable[float], falling: Iterable[float], limit: float) -> float | None:
    """MULTIFIT's test: each cost, from the longest on, goes to the first place where it ends by `limit`; the last end.

    None if one fits nowhere.
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
    """The kind to start on the place that is free first, so that all that is left ends soonest.

    `left` counts the trials of each kind, in the order of preference. A kind is preferred to an earlier one only if
    that saves a hundredth.
    """
    first, *others = sorted(free_at)
    best, shortest = next(iter(left)), float("inf")
    for kind in left:
        rest = [
            costs[other] for other, count in left.items() for _ in range(count - (other == kind))
        ]
        end = makespan([first + costs[kind], *others], rest)
        if end < WORTH_IT * shortest:
            best, shortest = kind, end
    return best


def kind_and_length(config: TrainingConfig) -> Kind:
    """What the whole time of a trial depends on."""
    return (*kind_of(config), config.steps)


@dataclass
class Running:
    """A trial that was started, and how far it is."""

    spec: TrialSpec
    started: float
    done: float = 0.0
    seen: float = 0.0


class TrialOrder:
    """Hands out the trials of a list; hears of their progress and of their ends. `names` are the caller's own."""

    def __init__(
        self,
        trials: Sequence[TrialSpec],
        places: int,
        estimate: Estimate = lambda config: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._left, self._places, self._estimate, self._clock = (
            list(trials),
            places,
            estimate,
            clock,
        )
        self._running: dict[str, Running] = {}
        self._measured: dict[Kind, list[float]] = {}

    def next(self, name: str) -> TrialSpec | None:
        """The trial to start now under this name; None when all were handed out."""
        if not self._left:
            return None
        kind = self._choose()
        spec = next(trial for trial in self._left if kind_and_length(trial.config) == kind)
        self._left.remove(spec)
        self._running[name] = Running(spec, self._clock())
        return spec

    def _choose(self) -> Kind:
        left: dict[Kind, int] = {}
        for trial in self._left:
            kind = kind_and_length(trial.config)
            left[kind] = left.get(kind, 0) + 1
        if unseen := next((kind for kind in left if self._is_unseen(kind)), None):
            return unseen
        known = {kind: self._seconds(kind) for kind in left}
        usual = fmean([cost for cost in known.values() if cost] or [1.0])
        now = self._clock()
        busy = [self._remaining(running, usual, now) for running in self._running.values()]
        free_at = [*busy, *[0.0] * max(1, self._places - len(busy))]
        return best_next(free_at, {kind: cost or usual for kind, cost in known.items()}, left)

    def _is_unseen(self, kind: Kind) -> bool:
        running = any(kind_and_length(r.spec.config) == kind for r in self._running.values())
        return not running and self._seconds(kind) is None

    def _seconds(self, kind: Kind) -> float | None:
        """Seconds of a whole trial: as measured in this sweep, else in past runs, else by the progress so far."""
        if kind in self._measured:
            return median(self._measured[kind])
        running = [
            one for one in self._running.values() if kind_and_length(one.spec.config) == kind
        ]
        alike = [trial for trial in self._left if kind_and_length(trial.config) == kind]
        past = self._estimate([*(one.spec for one in running), *alike][0].config)
        rates = [(one.seen - one.started) / one.done for one in running if one.done]
        return past if past or not rates else median(rates)

    def _remaining(self, running: Running, usual: float, now: float) -> float:
        whole = self._seconds(kind_and_length(running.spec.config)) or usual
        return max(0.0, running.started + whole - now)

    def progress(self, name: str, result: Mapping[str, Any]) -> None:
        """Take what a running trial reports: its `step`."""
        if running := self._running.get(name):
            running.done, running.seen = (
                result.get("step", 0) / running.spec.config.steps,
                self._clock(),
            )

    def ended(self, name: str, result: Mapping[str, Any] | None) -> None:
        """Take the end of a trial; its time counts if it was run to its end here."""
        running = self._running.pop(name, None)
        if running and result and result.get("finished") and not result.get("reused"):
            seconds = result.get("time/seconds", self._clock() - running.started)
            self._measured.setdefault(kind_and_length(running.spec.config), []).append(seconds)


class ListSearcher(Searcher):
    """Gives the trials of a list, each once, in an order that ends the sweep soon."""

    def __init__(self, order: TrialOrder) -> None:
        super().__init__()
        self._order = order

    def suggest(self, trial_id: str) -> Any:
        """The next trial; `Searcher.FINISHED` when all were given."""
        spec = self._order.next(trial_id)
        return {"trial": spec} if spec else Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        """How far a trial is says how long it will take."""
        self._order.progress(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict | None = None, error: bool = False
    ) -> None:
        """How long a trial took is what others of its kind will take."""
        self._order.ended(trial_id, result)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is left to run is read off the tracked runs."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as for `save`."""
