"""The runs of an experiment: what their tags are called, how they are found, opened again and read back.

An experiment has one run per trial id that counts: a study that needs a trial which another study finished names that
run as a member of its own; a run that a fresh start made obsolete is tagged as superseded and found no more.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llgbm.runtime import UserError
from tuning.history import Curve, read_curves
from tuning.store import all_pages, connect, explained, quiet_mlflow

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT_TAG = "mlflow.parentRunId"
STUDY_TAG = "llgbm.study"
STUDY_ID_TAG = "llgbm.study_id"
TRIAL_TAG = "llgbm.trial_id"
CONFIG_TAG = "llgbm.config"
SUPERSEDED_TAG = "llgbm.superseded"
ATTEMPTS_TAG = "llgbm.attempts"
ERROR_TAG = "llgbm.error"
DEATH_TAG = "llgbm.last_death"
STOPPED_TAG = "llgbm.stopped_at_step"
MEMBER_TAG = "llgbm.member_of."
FINAL_STATUSES = ("FINISHED", "FAILED", "KILLED")

PARAM_LENGTH = 6000
PARAMS_PER_CALL = 100


@dataclass(frozen=True)
class TrialResult:
    """One trial as the store remembers it: last values in `metrics`, (step, value) in `curves`."""

    trial_id: str
    config: str
    seed: int | None
    status: str
    metrics: Mapping[str, float]
    curves: Mapping[str, list[tuple[int, float]]]
    params: Mapping[str, str]
    run_id: str
    stopped_at: int | None = None
    superseded: bool = False

    @property
    def whole(self) -> bool:
        """Whether it was trained to its end and evaluated: neither failed nor stopped early nor obsolete."""
        return self.status == "FINISHED" and self.stopped_at is None and not self.superseded


def measured(run: Run) -> dict[str, float]:
    """The last metrics of a run without what is announced and not measured yet (see `TrialTracker.show_first`)."""
    return {key: value for key, value in run.data.metrics.items() if not math.isnan(value)}


def read_trials(tracking_uri: str, parent_run_id: str, curve_keys: Collection[str] | None = None) -> list[TrialResult]:
    """Read the trials of a study in order of creation, with the curves of `curve_keys` (None: see `read_curves`).

    Trials that another study ran and this one needed are among them, under this study's name for them.

    Raises UserError if the store fails or has no such run.
    """
    quiet_mlflow()
    with explained(tracking_uri):
        client = connect(tracking_uri)
        experiment_id = client.get_run(parent_run_id).info.experiment_id
        own = list(find_runs(client, experiment_id, {PARENT_TAG: parent_run_id}))
        members = list(find_runs(client, experiment_id, {MEMBER_TAG + parent_run_id: None}))
        runs = {run.info.run_id: run for run in (*own, *members)}
        curves = read_curves(client, list(runs.values()), curve_keys)
        return [_trial_result(run, curves[run_id], MEMBER_TAG + parent_run_id) for run_id, run in runs.items()]


def _trial_result(run: Run, curves: Mapping[str, Curve], member_tag: str) -> TrialResult:
    data = run.data
    seed = data.params.get("seed")
    return TrialResult(
        trial_id=data.tags.get(TRIAL_TAG, ""),
        config=data.tags.get(member_tag) or data.tags.get(CONFIG_TAG, run.info.run_name),
        seed=int(seed) if seed not in (None, "None") else None,
        status=run.info.status,
        metrics={**measured(run), **{key: curve[-1][1] for key, curve in curves.items() if curve}},
        curves=curves,
        params=dict(data.params),
        run_id=run.info.run_id,
        stopped_at=int(data.tags[STOPPED_TAG]) if data.tags.get(STOPPED_TAG) else None,
        superseded=not is_live(run),
    )


def is_live(run: Run) -> bool:
    return SUPERSEDED_TAG not in run.data.tags


def trial_run(client: MlflowClient, experiment_id: str, trial_id: str) -> Run | None:
    return next(filter(is_live, find_runs(client, experiment_id, {TRIAL_TAG: trial_id})), None)


def find_runs(client: MlflowClient, experiment_id: str, tags: Mapping[str, str | None]) -> Iterator[Run]:
    """Runs with these tags, oldest first; None stands for any value."""
    where = " and ".join(f"tags.`{k}` LIKE '%'" if v is None else f"tags.`{k}` = '{v}'" for k, v in tags.items())
    return all_pages(
        lambda token: client.search_runs(
            [experiment_id], where, max_results=1000, order_by=["attributes.start_time ASC"], page_token=token
        )
    )


def open_run(client: MlflowClient, experiment_id: str, found: Run | None, name: str, tags: Mapping[str, str]) -> str:
    if found is None:
        return client.create_run(experiment_id, tags=dict(tags), run_name=name).info.run_id
    run_id = found.info.run_id
    client.update_run(run_id, status="RUNNING")
    for key in (ERROR_TAG, STOPPED_TAG):
        if key in found.data.tags:
            client.delete_tag(run_id, key)
    for key, value in tags.items():
        if found.data.tags.get(key) != value:
            client.set_tag(run_id, key, value)
    return run_id


def log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    wanted = dict(flat_params(params))
    changed = sorted(key for key, value in wanted.items() if known.get(key, value) != value)
    if changed:
        key = changed[0]
        raise UserError(
            f"this run was begun with {key} = {known[key]} and is opened again with {wanted[key]}: "
            "restore the old value or start under a new name."
        )
    fresh = [Param(key, value) for key, value in wanted.items() if key not in known]
    for chunk in chunks(fresh, PARAMS_PER_CALL):
        client.log_batch(run_id, params=chunk)


def flat_params(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from flat_params(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)[:PARAM_LENGTH]


def chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
