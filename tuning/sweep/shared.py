"""Share trials with other studies: hand out what nobody else runs, and wait for the rest."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from llgbm.runtime import say
from tuning.search.queue import Result, TrialQueue
from tuning.studies.spec import TrialSpec
from tuning.tracking.ownership import Ownership

RETRY_SECONDS = 5.0


class SharedQueue:
    """Hand out only trials that this driver could take; those of other drivers are tried again later.

    A trial that another driver has finished meanwhile is handed out too: its worker finds it finished. Whoever sets the
    final status of a trial releases it.
    """

    def __init__(
        self,
        queue: TrialQueue,
        ownership: Ownership,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue, self._ownership, self._clock = queue, ownership, clock
        self._held: list[TrialSpec] = []
        self._try_at = 0.0

    def ask(self) -> TrialSpec | None:
        """Return a trial that was taken; None if none can be started now."""
        while (spec := self._queue.ask()) is not None:
            if self._ownership.take(spec.id):
                return spec
            if not self._held:
                say(f"trial {spec.id} is being run by another study: it is waited for")
            self._held.append(spec)
        return self._try_again()

    def _try_again(self) -> TrialSpec | None:
        if self._clock() < self._try_at:
            return None
        for spec in self._held:
            if self._ownership.take(spec.id):
                self._held.remove(spec)
                return spec
        # Two drivers that met each other should not meet again.
        self._try_at = self._clock() + random.uniform(0.5, 1.5) * RETRY_SECONDS
        return None

    def progress(self, trial: TrialSpec, result: Result) -> None:
        """Pass an intermediate result on."""
        self._queue.progress(trial, result)

    def tell(self, trial: TrialSpec, result: Result | None) -> None:
        """Pass the last result on."""
        self._queue.tell(trial, result)

    def trials(self) -> tuple[TrialSpec, ...]:
        """Return all trials of the study that are known so far."""
        return self._queue.trials()

    def is_done(self) -> bool:
        """Return True once every trial has been handed out, held ones too."""
        return not self._held and self._queue.is_done()

    def steps_left(self) -> int:
        """Count the training steps of the trials that have not ended."""
        return self._queue.steps_left()

    def describe(self) -> str:
        """Say in one line how far the study is."""
        return self._queue.describe()
