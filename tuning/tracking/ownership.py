"""Own studies and trials in the store, so that no two drivers run the same one.

A driver writes only tags of its own study run: a heartbeat, and one hold for each trial. To take a trial it writes its
hold and then reads all holds. Of two drivers that write at once, at least one sees the other and gives way. A hold
counts as long as its driver lives: on the same machine its process shows that, elsewhere its heartbeat.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from llgbm.runtime import UserError, logger, say
from tuning.tracking.runs import PARENT_TAG, STUDY_ID_TAG, find_runs
from tuning.tracking.store import connect, store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from tuning.tracking.study import StudyTracker

DRIVER_TAG = "llgbm.driver."
HOLD_TAG = "llgbm.hold."
BEAT_SECONDS = 15.0
# A heartbeat that did not change for so long, as seen from here, has stopped.
SILENT_SECONDS = 60.0
# Clocks of two machines differ by less than this: an older heartbeat has stopped.
ANCIENT_SECONDS = 600.0
ATTEMPTS = 5


@dataclass(frozen=True)
class Driver:
    """Process of a driver, as its heartbeat describes it; `place` names a machine in one of its lives."""

    session: str
    place: str
    host: str
    pid: int
    started: float
    beat: float

    @classmethod
    def of_this_process(cls) -> Driver:
        started = psutil.Process().create_time()
        session = uuid.uuid4().hex[:8]
        return cls(session, this_place(), socket.gethostname(), os.getpid(), started, time.time())

    @property
    def label(self) -> str:
        return f"process {self.pid} on {self.host}"

    def as_text(self) -> str:
        """Return the content of a tag that is named by the session; `read_drivers` reads it."""
        content = asdict(self)
        del content["session"]
        return json.dumps(content)


@cache
def this_place() -> str:
    """Name what a process id is unique in: this boot of this machine, and the container."""
    name = socket.gethostname()
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        name = f"{name} {boot} {os.readlink('/proc/self/ns/pid')}"
    return name


class Liveness:
    """Tell which drivers are alive; remembers the heartbeats that it has seen change."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[float, float]] = {}

    def is_alive(self, driver: Driver) -> bool:
        """Return False if the process has ended or its heartbeat has stopped; True if that cannot be said yet."""
        if driver.place == this_place():
            return _is_running(driver)
        beat, since = self._seen.get(driver.session, (None, 0.0))
        if beat != driver.beat:
            self._seen[driver.session] = (driver.beat, self._clock())
            return time.time() - driver.beat < ANCIENT_SECONDS
        return self._clock() - since < SILENT_SECONDS


def _is_running(driver: Driver) -> bool:
    try:
        process = psutil.Process(driver.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return abs(process.create_time() - driver.started) < 1.0
    except psutil.NoSuchProcess:
        return False


def drivers_of(run: Run) -> list[Driver]:
    """Read the drivers that a study run names; one that cannot be read is left out."""
    return read_drivers(run.data.tags, DRIVER_TAG)


def read_drivers(tags: Mapping[str, str], prefix: str) -> list[Driver]:
    """Read the drivers in tags with this prefix; one that cannot be read is left out."""
    found = []
    for key, value in tags.items():
        if key.startswith(prefix):
            with suppress(TypeError, ValueError):
                found.append(Driver(key.removeprefix(prefix), **json.loads(value)))
    return found


class Ownership:
    """Hold one study and trials of it, for as long as this process lives or until `close`.

    Opened on the study's run, whose heartbeat it writes from a thread. It may be pickled; the copy has no thread.
    """

    def __init__(self, tracking_uri: str, experiment_id: str, parent_run_id: str) -> None:
        self._uri, self._experiment, self._parent = tracking_uri, experiment_id, parent_run_id
        self._driver = Driver.of_this_process()
        self._live = Liveness()
        self._stop: threading.Event | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_stop": None}

    @property
    def _client(self) -> MlflowClient:
        return connect(self._uri)

    def claim(self, study_id: str) -> None:
        """Become the one driver of the study, and start the heartbeat.

        Waits for the heartbeat of another machine to stop, where that is not known yet. Raises UserError if another
        driver runs the study, or if the store fails.
        """
        with store_errors(self._uri):
            for _ in range(ATTEMPTS):
                self._beat()
                other = self._other_driver(study_id)
                if other is None:
                    self._forget_dead()
                    self._start_thread()
                    return
                self._client.delete_tag(self._parent, DRIVER_TAG + self._driver.session)
                wait_for_silence(other, lambda: self._other_driver(study_id), self._live)
                time.sleep(random.uniform(0.0, 0.5))
        raise _is_run(study_id, other)

    def _other_driver(self, study_id: str) -> Driver | None:
        return living_driver(
            self._client, self._experiment, study_id, self._live, self._driver.session
        )

    def _forget_dead(self) -> None:
        """Delete what dead drivers of this study left at its run."""
        for key in self._client.get_run(self._parent).data.tags:
            dead = key.startswith(DRIVER_TAG) and not key.endswith(self._driver.session)
            if dead or key.startswith(HOLD_TAG):
                self._client.delete_tag(self._parent, key)

    def _start_thread(self) -> None:
        self._stop = threading.Event()
        threading.Thread(
            target=self._keep_beating, args=(self._stop,), name="heartbeat", daemon=True
        ).start()

    def _keep_beating(self, stop: threading.Event) -> None:
        while not stop.wait(BEAT_SECONDS):
            try:
                with store_errors(self._uri):
                    self._beat()
            except UserError as error:
                logger.warning("the heartbeat of this study is late: %s", error)

    def _beat(self) -> None:
        beating = replace(self._driver, beat=time.time())
        self._client.set_tag(self._parent, DRIVER_TAG + beating.session, beating.as_text())

    def take(self, trial_id: str) -> bool:
        """Try to hold a trial; return False if a living driver holds it. Raises UserError if the store fails."""
        with store_errors(self._uri):
            self._client.set_tag(self._parent, HOLD_TAG + trial_id, self._driver.session)
            if self._holder(trial_id) is None:
                return True
        self.release(trial_id)
        return False

    def _holder(self, trial_id: str) -> Driver | None:
        """Return the living driver of another study that holds the trial, None if there is none."""
        for run in find_runs(self._client, self._experiment, {HOLD_TAG + trial_id: None}):
            session = run.data.tags.get(HOLD_TAG + trial_id)  # None: released since the search
            for driver in drivers_of(run):
                if session == driver.session != self._driver.session and self._live.is_alive(
                    driver
                ):
                    return driver
        return None

    def release(self, trial_id: str) -> None:
        """Hold a trial no more. Raises UserError if the store fails."""
        with store_errors(self._uri):
            _delete_tag(self._client, self._parent, HOLD_TAG + trial_id)

    def close(self) -> None:
        """Release all and end the heartbeat. Raises UserError if the store fails."""
        if self._stop is not None:
            self._stop.set()
        with store_errors(self._uri):
            for key in self._client.get_run(self._parent).data.tags:
                if key.startswith(HOLD_TAG):
                    _delete_tag(self._client, self._parent, key)
            _delete_tag(self._client, self._parent, DRIVER_TAG + self._driver.session)


def _delete_tag(client: MlflowClient, run_id: str, key: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.delete_tag(run_id, key)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def living_driver(
    client: MlflowClient, experiment_id: str, study_id: str, live: Liveness, besides: str = ""
) -> Driver | None:
    """Return a living driver of a study, other than the session `besides`; None if there is none."""
    for run in find_runs(client, experiment_id, {STUDY_ID_TAG: study_id}):
        for driver in drivers_of(run):
            if driver.session != besides and live.is_alive(driver):
                return driver
    return None


def check_not_run(tracking_uri: str, experiment_id: str, study_id: str) -> None:
    """Raise UserError if another driver runs the study."""
    with store_errors(tracking_uri):
        client, live = connect(tracking_uri), Liveness()

        def other() -> Driver | None:
            return living_driver(client, experiment_id, study_id, live)

        found = other()
        if found is None:
            return
        wait_for_silence(found, other, live)
        if found := other():
            raise _is_run(study_id, found)


def wait_for_silence(driver: Driver, look: Callable[[], Driver | None], live: Liveness) -> None:
    """Wait until the heartbeat of another machine changes or counts as stopped; return at once for this machine."""
    if driver.place == this_place():
        return
    say(f"{driver.label} ran this study: waiting up to {SILENT_SECONDS:.0f} s for its heartbeat")
    deadline = time.monotonic() + SILENT_SECONDS + 5
    while time.monotonic() < deadline:
        time.sleep(1)
        found = look()
        if found is None or found.beat != driver.beat:
            return


def _is_run(study_id: str, driver: Driver | None) -> UserError:
    who = driver.label if driver else "another process"
    return UserError(f"study {study_id} is being run by {who}: wait for its end, or stop it first")


@contextmanager
def own_study(tracker: StudyTracker, study_id: str) -> Iterator[Ownership]:
    """Be the one driver of a study that was begun; release it and all its trials at the end.

    Raises UserError if another driver runs the study; a run that was begun beside the other's is deleted.
    """
    ownership = Ownership(tracker.tracking_uri, tracker.experiment_id, tracker.parent_run_id)
    try:
        ownership.claim(study_id)
    except UserError:
        with store_errors(tracker.tracking_uri):
            if tracker.is_new and not drivers_of(tracker.client.get_run(tracker.parent_run_id)):
                tracker.client.delete_run(tracker.parent_run_id)
        raise
    try:
        yield ownership
    finally:
        ownership.close()


def reap(tracking_uri: str, experiment_id: str, undriven: bool = False) -> list[Run]:
    """Mark as KILLED the runs that dead drivers left running; return the runs of their studies.

    A study without any driver was begun by an older version; it is marked only if `undriven` says so. Raises UserError
    if the store fails.
    """
    with store_errors(tracking_uri):
        client, live = connect(tracking_uri), Liveness()
        dead = [
            run
            for run in find_runs(client, experiment_id, {STUDY_ID_TAG: None})
            if run.info.status == "RUNNING" and _is_dead(run, live, undriven)
        ]
        for study in dead:
            beats = [int(driver.beat * 1000) for driver in drivers_of(study)]
            for run in find_runs(client, experiment_id, {PARENT_TAG: study.info.run_id}):
                if run.info.status == "RUNNING":
                    client.set_terminated(run.info.run_id, "KILLED", max(beats, default=None))
            client.set_terminated(study.info.run_id, "KILLED", max(beats, default=None))
    return dead


def _is_dead(study: Run, live: Liveness, undriven: bool) -> bool:
    drivers = drivers_of(study)
    if not drivers:
        return undriven
    return not any(live.is_alive(driver) for driver in drivers)
