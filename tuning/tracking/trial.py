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
    METRICS_PER_CALL,
    PARENT_TAG,
    STUDY_TAG,
    TRIAL_TAG,
    TrackingTarget,
    check_finite,
    log_params,
    measured,
    now_ms,
    open_run,
    trial_run,
)
from tuning.tracking.store import connect, quiet_mlflow, store_errors
from tuning.tracking.study import logger

if TYPE_CHECKING:
    from mlflow import MlflowClient

FLUSH_ENTRIES = 500
FLUSH_SECONDS = 5.0


class TrialTracker:
    """The worker's side: one run, opened once or again, and a buffer of metrics in front of it.

    What the run has at a step already is not logged again, so that each key has one value per step however often a
    trial is resumed. `attempts` counts how often it was opened.
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
        """Find the run of a trial in the experiment or create it, put it below its study and set it running.

        Raises UserError if the store fails or the trial was begun with another value of a parameter.
        """
        quiet_mlflow()
        with store_errors(target.tracking_uri):
            client = connect(target.tracking_uri)
            found = trial_run(client, target.experiment_id, trial_id)
            attempts = int(found.data.tags.get(ATTEMPTS_TAG, 1)) + 1 if found else 1
            key = {PARENT_TAG: target.parent_run_id, TRIAL_TAG: trial_id}
            own = {
                **key,
                STUDY_TAG: target.study,
                CONFIG_TAG: run_name,
                ATTEMPTS_TAG: str(attempts),
                **tags,
            }
            shown_name = f"{run_name}, seed {params['seed']}" if "seed" in params else run_name
            run_id = open_run(client, target.experiment_id, found, shown_name, own)
            log_params(client, run_id, params)
        return cls(
            client, target.tracking_uri, run_id, found.data.metrics if found else (), attempts
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step, sent in batches. Raises ValueError for a value that is not finite."""
        from mlflow.entities import Metric

        now, values = now_ms(), check_finite(step, metrics)
        fresh = (key for key in values if not (key in self._logged and step in self._steps_of(key)))
        self._buffer.extend(Metric(key, values[key], now, step) for key in fresh)
        full = len(self._buffer) >= FLUSH_ENTRIES and not self._failing
        if full or time.monotonic() - self._tried >= FLUSH_SECONDS:
            self._try_flush()

    def show_first(self, key: str) -> None:
        """Give a new run a metric before it is known, NaN at step 0: MLflow's compare page starts with a run's first.

        Raises UserError if the store fails.
        """
        if key not in self._logged:
            with store_errors(self.tracking_uri):
                self.client.log_metric(self.run_id, key, math.nan, step=0)

    def _steps_of(self, key: str) -> set[int]:
        """Steps at which the run had a value of this key when it was opened."""
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
        """Send what is buffered. Raises UserError if the store fails, and then drops nothing."""
        try:
            with store_errors(self.tracking_uri):
                while self._buffer:
                    self.client.log_batch(self.run_id, metrics=self._buffer[:METRICS_PER_CALL])
                    del self._buffer[:METRICS_PER_CALL]
        finally:
            self._tried = time.monotonic()

    def log_artifacts(self, folder: Path, artifact_path: str | None = None) -> None:
        """Keep a folder among the artifacts of the trial. Raises UserError if the store fails."""
        with store_errors(self.tracking_uri):
            self.client.log_artifacts(self.run_id, str(folder), artifact_path)

    def is_flushed(self) -> bool:
        """Try to send what is buffered; say whether the store has it all."""
        self._try_flush()
        return not self._buffer

    def tag(self, key: str) -> str:
        """A tag of the run, empty if it has none such. Raises UserError if the store fails."""
        with store_errors(self.tracking_uri):
            return self.client.get_run(self.run_id).data.tags.get(key, "")

    def set_tag(self, key: str, value: str) -> None:
        """Set a tag of the run. Raises UserError if the store fails."""
        with store_errors(self.tracking_uri):
            self.client.set_tag(self.run_id, key, value)

    def close(self) -> None:
        """Send the rest; how the trial ended is the driver's to say. Raises UserError if the store fails."""
        self.flush()


def finished_metrics(target: TrackingTarget, trial_id: str) -> dict[str, float] | None:
    """The last metrics of a trial that some study finished already; None if there is none such.

    Raises UserError if the store fails.
    """
    quiet_mlflow()
    with store_errors(target.tracking_uri):
        run = trial_run(connect(target.tracking_uri), target.experiment_id, trial_id)
    return measured(run) if run and run.info.status == "FINISHED" else None
