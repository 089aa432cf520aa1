"""Log one trial to its MLflow run."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llgbm.runtime import UserError
from tuning.tracking.runs import (
    ATTEMPTS_TAG,
    CONFIG_TAG,
    MEMBER_TAG,
    METRICS_PER_CALL,
    NO_SCHEDULER,
    PARENT_TAG,
    STUDY_TAG,
    TRIAL_TAG,
    TrackingTarget,
    TrialResult,
    check_finite,
    log_params,
    now_ms,
    open_run,
    trial_run,
)
from tuning.tracking.store import connect, quiet_mlflow, redact, store_errors
from tuning.tracking.study import logger

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

FLUSH_ENTRIES = 500
FLUSH_SECONDS = 5.0


class TrialTracker:
    """Worker's view of a trial: one run, reopened on every restart, behind a buffer of metrics.

    A value that the run already has at a step is not logged again: each key keeps one value per step, however often
    the trial restarts. `attempts` counts how often the run was opened.
    """

    def __init__(
        self,
        client: MlflowClient,
        tracking_uri: str,
        run_id: str,
        logged: Collection[str] = (),
        attempts: int = 1,
    ) -> None:
        self.client = client
        self.tracking_uri = tracking_uri
        self.run_id = run_id
        self.attempts = attempts
        self._logged = set(logged)
        self._steps: dict[str, set[int]] = {}
        self._buffer: list[Any] = []
        self._tried = time.monotonic()
        self._failing = False

    @classmethod
    def open(
        cls,
        target: TrackingTarget,
        trial_id: str,
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> TrialTracker:
        """Find or create the run of a trial, nest it under its study and set it RUNNING.

        Raises UserError if the store fails or the trial was begun with another value of a parameter.
        """
        quiet_mlflow()
        with store_errors(target.tracking_uri):
            client = connect(target.tracking_uri)
            found = trial_run(client, target.experiment_id, trial_id)
            attempts = 1 + _attempts(found)
            key = {PARENT_TAG: target.parent_run_id, TRIAL_TAG: trial_id}
            own = {
                **_membership(found, target.parent_run_id),
                **key,
                STUDY_TAG: target.study,
                CONFIG_TAG: run_name,
                ATTEMPTS_TAG: str(attempts),
                **tags,
            }
            seed = params.get("seed")
            shown_name = run_name if seed is None else f"{run_name}, seed {seed}"
            run_id = open_run(client, target.experiment_id, found, shown_name, own)
            log_params(client, run_id, params)
        logged = found.data.metrics if found else ()
        return cls(client, target.tracking_uri, run_id, logged, attempts)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Buffer the metrics of a step and send them in batches. Raises ValueError if one is not finite."""
        from mlflow.entities import Metric

        now, values = now_ms(), check_finite(step, metrics)
        fresh = (key for key in values if not (key in self._logged and step in self._steps_of(key)))
        self._buffer.extend(Metric(key, values[key], now, step) for key in fresh)
        full = len(self._buffer) >= FLUSH_ENTRIES and not self._failing
        if full or time.monotonic() - self._tried >= FLUSH_SECONDS:
            self._try_flush()

    def show_first(self, key: str) -> None:
        """Log NaN for a metric at step 0 of a new run: MLflow's compare page opens on the first metric of a run.

        Raises UserError if the store fails.
        """
        if key not in self._logged:
            with store_errors(self.tracking_uri):
                self.client.log_metric(self.run_id, key, math.nan, step=0)

    def _steps_of(self, key: str) -> set[int]:
        """Return the steps at which the run already had a value of this key when it was opened."""
        if key not in self._steps:
            with store_errors(self.tracking_uri):
                self._steps[key] = {
                    metric.step for metric in self.client.get_metric_history(self.run_id, key)
                }
        return self._steps[key]

    def _try_flush(self) -> None:
        try:
            self.flush()
            self._failing = False
        except UserError as error:
            self._failing = True
            logger.warning("%d metrics are kept and sent later: %s", len(self._buffer), error)

    def flush(self) -> None:
        """Send the buffer. Raises UserError if the store fails; nothing is dropped then."""
        try:
            with store_errors(self.tracking_uri):
                while self._buffer:
                    self.client.log_batch(self.run_id, metrics=self._buffer[:METRICS_PER_CALL])
                    del self._buffer[:METRICS_PER_CALL]
        finally:
            self._tried = time.monotonic()

    def log_artifacts(self, folder: Path, artifact_path: str | None = None) -> None:
        """Log a folder as artifacts of the trial. Raises UserError if the store fails."""
        with store_errors(self.tracking_uri):
            self.client.log_artifacts(self.run_id, str(folder), artifact_path)

    def is_flushed(self) -> bool:
        """Try to send the buffer; return True if nothing is left in it."""
        self._try_flush()
        return not self._buffer

    def tag(self, key: str) -> str:
        """Return a tag of the run, "" if it is not set. Raises UserError if the store fails."""
        with store_errors(self.tracking_uri):
            return self.client.get_run(self.run_id).data.tags.get(key, "")

    def set_tag(self, key: str, value: str) -> None:
        """Set a tag of the run. Raises UserError if the store fails."""
        with store_errors(self.tracking_uri):
            self.client.set_tag(self.run_id, key, redact(value))

    def close(self) -> None:
        """Send the rest of the buffer; the driver sets the final status. Raises UserError if the store fails."""
        self.flush()


def finished_result(
    target: TrackingTarget, trial_id: str, scheduler: str = NO_SCHEDULER
) -> TrialResult | None:
    """Return a trial that any study finished, or that this scheduler stopped; None if there is none.

    Raises UserError if the store fails.
    """
    quiet_mlflow()
    with store_errors(target.tracking_uri):
        run = trial_run(connect(target.tracking_uri), target.experiment_id, trial_id)
    if run is None:
        return None
    found = TrialResult.of(run)
    return found if found.is_done(scheduler) else None


def _membership(run: Run | None, parent_run_id: str) -> dict[str, str]:
    """Return the tag that keeps a run in the study that began it, where another one goes on with it."""
    if run is None:
        return {}
    before = run.data.tags.get(PARENT_TAG, parent_run_id)
    if before == parent_run_id:
        return {}
    return {MEMBER_TAG + before: run.data.tags.get(CONFIG_TAG, run.info.run_name)}


def _attempts(run: Run | None) -> int:
    if run is None:
        return 0
    return int(run.data.tags.get(ATTEMPTS_TAG, 1))
