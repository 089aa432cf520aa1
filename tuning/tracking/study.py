"""Log a study to its parent run, and set the final status of its trials."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from tuning.tracking.location import artifacts_beside
from tuning.tracking.runs import (
    FINAL_STATUSES,
    MEMBER_TAG,
    METRICS_PER_CALL,
    PARENT_TAG,
    STOPPED_BY_TAG,
    STOPPED_TAG,
    STUDY_ID_TAG,
    STUDY_TAG,
    SUPERSEDED_TAG,
    TRIAL_TAG,
    TrackingTarget,
    check_finite,
    chunks,
    find_runs,
    flat_params,
    is_live,
    log_params,
    now_ms,
    open_run,
    parent_runs,
    pick_study,
    trial_run,
)
from tuning.tracking.store import (
    connect,
    local_tracking_uri,
    make_database,
    open_experiment,
    quiet_mlflow,
    redact,
    sqlite_path,
    store_errors,
    usable_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger("tuning.tracking")


class StudyTracker:
    """Driver's view of a study: open the store, begin the parent run, set final statuses."""

    def __init__(self, client: MlflowClient, tracking_uri: str, experiment_id: str) -> None:
        self.client = client
        self.tracking_uri = tracking_uri
        self.experiment_id = experiment_id
        self.target: TrackingTarget | None = None
        self.is_new = False  # its run was made by `begin`, not found

    def __getstate__(self) -> dict[str, Any]:
        """Leave the client out: it holds the login of the store."""
        return {**vars(self), "client": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.client = connect(self.tracking_uri)

    @classmethod
    def open(cls, tracking_uri: str | None, root: Path, experiment: str) -> StudyTracker:
        """Open the store (by default SQLite under `root`) and find or create the experiment.

        Raises UserError if the address is unsupported, silent or not writable, or the experiment was deleted.
        """
        quiet_mlflow()
        uri = usable_uri(tracking_uri or local_tracking_uri(root))
        with store_errors(uri):
            if not uri.startswith("sqlite"):
                client = connect(uri)
                return cls(client, uri, open_experiment(client, experiment, None))
            path = sqlite_path(uri)
            folder = path.parent
            with FileLock(folder / ".mlflow.lock", timeout=60):
                make_database(path)
                client = connect(uri)
                return cls(client, uri, open_experiment(client, experiment, artifacts_beside(path)))

    def begin(
        self, study: str, study_id: str, params: Mapping[str, Any], tags: Mapping[str, str]
    ) -> TrackingTarget:
        """Create the parent run, or continue the one with this `study_id` and the same parameters.

        Raises UserError if the store fails.
        """
        own = {STUDY_TAG: study, STUDY_ID_TAG: study_id, **tags}
        wanted = dict(flat_params(params))
        with store_errors(self.tracking_uri):
            runs = find_runs(self.client, self.experiment_id, {STUDY_ID_TAG: study_id})
            same = [run for run in runs if is_live(run) and run.data.params == wanted]
            self.is_new = not same
            run_id = open_run(
                self.client, self.experiment_id, same[-1] if same else None, study, own
            )
            log_params(self.client, run_id, params)
        self.target = TrackingTarget(self.tracking_uri, self.experiment_id, run_id, study)
        return self.target

    def studies(self, study_id: str | None = None) -> list[Run]:
        """Return live parent runs, oldest first; of one study id if given. Raises UserError if the store fails."""
        with store_errors(self.tracking_uri):
            found = find_runs(self.client, self.experiment_id, {STUDY_ID_TAG: study_id})
            return list(filter(is_live, found))

    def find_study(self, asked: str) -> Run:
        """Return the parent run of a study in this experiment: see `runs.find_study`."""
        with store_errors(self.tracking_uri):
            known = parent_runs(self.client, [self.experiment_id])
        return pick_study(known, asked, redact(self.tracking_uri))

    def live_runs(self) -> dict[str, Run]:
        """Return the live run of every trial in the experiment, by trial id. Raises UserError if the store fails."""
        with store_errors(self.tracking_uri):
            found = find_runs(self.client, self.experiment_id, {TRIAL_TAG: None})
            return {run.data.tags[TRIAL_TAG]: run for run in found if is_live(run)}

    def supersede_study(self, study_id: str) -> None:
        """Mark a study's own runs as obsolete, so that it starts anew under new ones.

        Raises UserError if the store fails.
        """
        old = [run.info.run_id for run in self.studies(study_id)]
        live = self.live_runs().values()
        trials = [run.info.run_id for run in live if run.data.tags.get(PARENT_TAG) in old]
        self.supersede([*old, *trials])

    def supersede(self, run_ids: Collection[str]) -> None:
        """Mark runs as obsolete. Raises UserError if the store fails."""
        with store_errors(self.tracking_uri):
            for run_id in run_ids:
                self.client.set_tag(run_id, SUPERSEDED_TAG, str(now_ms()))

    def adopt(self, trial_id: str, config: str) -> None:
        """Add a trial that another study finished to this one, as configuration `config`.

        Raises UserError if the store fails.
        """
        with store_errors(self.tracking_uri):
            run = trial_run(self.client, self.experiment_id, trial_id)
            if run is not None and run.data.tags.get(PARENT_TAG) != self.parent_run_id:
                self.client.set_tag(run.info.run_id, MEMBER_TAG + self.parent_run_id, config)

    @property
    def parent_run_id(self) -> str:
        """Return the id of the parent run. Raises RuntimeError before `begin`."""
        if self.target is None:
            raise RuntimeError("the study has no run yet: call begin() first")
        return self.target.parent_run_id

    def child_run_id(self, trial_id: str) -> str | None:
        """Return the run id of a trial, None if it never opened a run."""
        run = trial_run(self.client, self.experiment_id, trial_id)
        if run is None:
            return None
        return run.info.run_id

    def finish_trial(
        self,
        trial_id: str,
        status: str,
        tags: Mapping[str, str] | None = None,
        run_id: str | None = None,
    ) -> None:
        """Set how a trial ended, and tags that say why; `run_id` is its run, if that is known.

        Raises ValueError if `status` is not FINISHED, FAILED or KILLED, UserError if the store fails.
        """
        _check_status(status)
        run_id = self.tag_trial(trial_id, tags or {}, run_id)
        if run_id is None:
            logger.warning("trial %s ended as %s before it opened a run", trial_id, status)
            return
        with store_errors(self.tracking_uri):
            if status == "FINISHED" and STOPPED_TAG not in (tags or {}):
                self._forget_stop(run_id)
            self.client.set_terminated(run_id, status)

    def _forget_stop(self, run_id: str) -> None:
        """Drop the record of an earlier stop from a run that went on to its end."""
        known = self.client.get_run(run_id).data.tags
        for key in (STOPPED_TAG, STOPPED_BY_TAG):
            if key in known:
                self.client.delete_tag(run_id, key)

    def tag_trial(
        self, trial_id: str, tags: Mapping[str, str], run_id: str | None = None
    ) -> str | None:
        """Set tags of the run of a trial and return its id, None if there is no run; `run_id` if that is known.

        Raises UserError if the store fails.
        """
        with store_errors(self.tracking_uri):
            run_id = run_id or self.child_run_id(trial_id)
            if run_id is not None:
                for key, value in tags.items():
                    self.client.set_tag(run_id, key, redact(value))
            return run_id

    def finish(self, status: str) -> None:
        """Set the final status of the study; unless FINISHED, mark its running trials KILLED.

        Raises ValueError if `status` is not FINISHED, FAILED or KILLED, UserError if the store fails.
        """
        _check_status(status)
        with store_errors(self.tracking_uri):
            if status != "FINISHED":
                self._kill_running()
            self.client.set_terminated(self.parent_run_id, status)

    def _kill_running(self) -> None:
        children = list(
            find_runs(self.client, self.experiment_id, {PARENT_TAG: self.parent_run_id})
        )
        for run in children:
            if run.info.status not in FINAL_STATUSES:
                self.client.set_terminated(run.info.run_id, "KILLED")

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the parent run. Raises UserError if the store fails."""
        with store_errors(self.tracking_uri):
            return dict(self.client.get_run(self.parent_run_id).data.metrics)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log the metrics that the parent run lacks. Raises ValueError if one is not finite."""
        from mlflow.entities import Metric

        now, values = now_ms(), check_finite(step, metrics)
        with store_errors(self.tracking_uri):
            known = self.client.get_run(self.parent_run_id).data.metrics
            entries = [
                Metric(key, value, now, step) for key, value in values.items() if key not in known
            ]
            for chunk in chunks(entries, METRICS_PER_CALL):
                self.client.log_batch(self.parent_run_id, metrics=chunk)

    def update_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics of the parent run that replace those of a lower step. Raises ValueError if one is not finite."""
        from mlflow.entities import Metric

        now, values = now_ms(), check_finite(step, metrics)
        entries = [Metric(key, value, now, step) for key, value in values.items()]
        with store_errors(self.tracking_uri):
            for chunk in chunks(entries, METRICS_PER_CALL):
                self.client.log_batch(self.parent_run_id, metrics=chunk)

    def log_artifacts(self, folder: Path, artifact_path: str | None = None) -> None:
        """Log a folder as artifacts of the study. Raises UserError if the store fails."""
        with store_errors(self.tracking_uri):
            self.client.log_artifacts(self.parent_run_id, str(folder), artifact_path)

    def download_artifacts(self, run_id: str, path: str, folder: Path | str) -> str:
        """Copy an artifact of a run into a folder and return its path there. Raises UserError if there is none."""
        with store_errors(self.tracking_uri):
            return self.client.download_artifacts(run_id, path, str(folder))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the study. Raises UserError if the store fails."""
        with store_errors(self.tracking_uri):
            for key, value in tags.items():
                self.client.set_tag(self.parent_run_id, key, redact(value))


def _check_status(status: str) -> None:
    if status not in FINAL_STATUSES:
        raise ValueError(
            f"a run cannot end as {status!r}: expected one of {', '.join(FINAL_STATUSES)}"
        )


@contextmanager
def status_on_exit(tracker: StudyTracker):
    """Set the final status of the parent run: FINISHED, KILLED on an interrupt, FAILED on an error."""
    try:
        yield
    except KeyboardInterrupt:
        tracker.finish("KILLED")
        raise
    except BaseException:
        tracker.finish("FAILED")
        raise
    tracker.finish("FINISHED")
