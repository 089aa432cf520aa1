"""Find, read and write MLflow runs."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llgbm.runtime import UserError
from tuning.tracking.store import all_pages, connect, quiet_mlflow, redact, store_errors

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
    def is_complete(self) -> bool:
        """Whether it was trained to its end and evaluated: neither failed nor stopped early nor obsolete."""
        return self.status == "FINISHED" and self.stopped_at is None and not self.superseded


def measured(run: Run) -> dict[str, float]:
    """The last metrics of a run without what is announced and not measured yet (see `TrialTracker.show_first`)."""
    return {key: value for key, value in run.data.metrics.items() if not math.isnan(value)}


def read_trials(
    tracking_uri: str, parent_run_id: str, curve_keys: Collection[str] | None = None
) -> list[TrialResult]:
    """Read the trials of a study in order of creation, with the curves of `curve_keys` (None: see `read_curves`).

    Trials that another study ran and this one needed are among them, under this study's name for them.

    Raises UserError if the store fails or has no such run.
    """
    quiet_mlflow()
    with store_errors(tracking_uri):
        client = connect(tracking_uri)
        experiment_id = client.get_run(parent_run_id).info.experiment_id
        own = list(find_runs(client, experiment_id, {PARENT_TAG: parent_run_id}))
        members = list(find_runs(client, experiment_id, {MEMBER_TAG + parent_run_id: None}))
        runs = {run.info.run_id: run for run in (*own, *members)}
        curves = read_curves(client, list(runs.values()), curve_keys)
    # Obsolete in this study is only a run that has a newer one here.
    by_age = sorted(runs.values(), key=lambda run: (is_live(run), run.info.start_time))
    newest = {run.data.tags.get(TRIAL_TAG, ""): run.info.run_id for run in by_age}
    results = [
        _trial_result(run, curves[run_id], MEMBER_TAG + parent_run_id)
        for run_id, run in runs.items()
    ]
    return [replace(one, superseded=newest[one.trial_id] != one.run_id) for one in results]


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
    )


def is_live(run: Run) -> bool:
    return SUPERSEDED_TAG not in run.data.tags


def trial_run(client: MlflowClient, experiment_id: str, trial_id: str) -> Run | None:
    return next(filter(is_live, find_runs(client, experiment_id, {TRIAL_TAG: trial_id})), None)


def find_runs(
    client: MlflowClient, experiment_id: str, tags: Mapping[str, str | None]
) -> Iterator[Run]:
    """Runs with these tags, oldest first; None stands for any value."""
    where = " and ".join(
        f"tags.`{k}` LIKE '%'" if v is None else f"tags.`{k}` = '{v}'" for k, v in tags.items()
    )
    return all_pages(
        lambda token: client.search_runs(
            [experiment_id],
            where,
            max_results=1000,
            order_by=["attributes.start_time ASC"],
            page_token=token,
        )
    )


def open_run(
    client: MlflowClient, experiment_id: str, found: Run | None, name: str, tags: Mapping[str, str]
) -> str:
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


METRICS_PER_CALL = 1000


@dataclass(frozen=True)
class TrackingTarget:
    """Where the trials of one study report to; small and picklable, it travels to the workers."""

    tracking_uri: str
    experiment_id: str
    parent_run_id: str
    study: str


def check_finite(step: int, metrics: Mapping[str, float]) -> dict[str, float]:
    values = {key: float(value) for key, value in metrics.items()}
    for key, value in values.items():
        if not math.isfinite(value):
            raise ValueError(
                f"metric {key!r} is {value} at step {step}: only finite values can be logged"
            )
    return values


def now_ms() -> int:
    return int(time.time() * 1000)


def find_study(tracking_uri: str, asked: str, experiment: str | None = None) -> Run:
    """The parent run of a study, by study id, run id or `latest`, in one experiment or (None) in all.

    Of several runs of one study the newest that was not begun anew counts. Raises UserError if the store fails, or has
    no such experiment or study.
    """
    with store_errors(tracking_uri):
        client = connect(tracking_uri)
        runs = parent_runs(client, _experiment_ids(client, experiment, tracking_uri))
    found = [
        run for run in runs if asked in ("latest", run.data.tags[STUDY_ID_TAG], run.info.run_id)
    ]
    if found:
        return max(
            found, key=lambda run: (SUPERSEDED_TAG not in run.data.tags, run.info.start_time)
        )
    where = f"{redact(tracking_uri)}" + (f", experiment {experiment!r}," if experiment else "")
    raise UserError(f"{where} has no study {asked!r}: it has {_known(runs)}.")


def _known(runs: Sequence[Run]) -> str:
    newest = sorted(runs, key=lambda run: -run.info.start_time)
    named = dict.fromkeys(
        f"{run.data.tags[STUDY_ID_TAG]} ({run.data.tags.get(STUDY_TAG, '?')})" for run in newest
    )
    more = f" and {len(named) - 10} older ones" if len(named) > 10 else ""
    return ", ".join(list(named)[:10]) + more if named else "none at all"


def _experiment_ids(client: MlflowClient, name: str | None, tracking_uri: str) -> list[str]:
    known = {
        experiment.name: experiment.experiment_id for experiment in client.search_experiments()
    }
    if name is None:
        return list(known.values())
    if name not in known:
        raise UserError(
            f"{redact(tracking_uri)} has no experiment {name!r}: it has {', '.join(sorted(known))}."
        )
    return [known[name]]


def parent_runs(client: MlflowClient, experiment_ids: Sequence[str]) -> list[Run]:
    """The parent runs of all studies in these experiments."""
    where = f"tags.`{STUDY_ID_TAG}` LIKE '%'"
    runs = [
        run
        for one in experiment_ids
        for run in client.search_runs([one], where, max_results=10_000)
    ]
    return [run for run in runs if "mlflow.parentRunId" not in run.data.tags]


Curve = list[tuple[int, float]]
RUNS_PER_CALL = 100
POINTS_PER_CALL = 25_000  # what a server gives at most
BULK_ROUTE = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"
# Logged once a trial, or about the machine: no curve unless it is asked for.
NO_CURVES = ("heldout/", "train/", "time/", "system/", "best_step")
Point = tuple[str, int, int, float]  # run id, step, timestamp, value


def read_curves(
    client: MlflowClient, runs: Sequence[Run], keys: Collection[str] | None = None
) -> dict[str, dict[str, Curve]]:
    """The curves of `keys` by run id and key: (step, value), by step, the last written where a step was logged twice.

    Without `keys` all that a run has but for what is logged once a trial (`NO_CURVES`). Raises what the store raises.
    """
    curves: dict[str, dict[str, Curve]] = {run.info.run_id: {} for run in runs}
    for key, run_ids in _runs_by_key(runs, keys).items():
        for run_id, points in _histories(client, run_ids, key).items():
            curves[run_id][key] = _curve(points)
    return curves


def _runs_by_key(runs: Sequence[Run], keys: Collection[str] | None) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for run in runs:
        for key in run.data.metrics:
            if key in keys if keys is not None else not key.startswith(NO_CURVES):
                found.setdefault(key, []).append(run.info.run_id)
    return found


def _curve(points: Iterable[Point]) -> Curve:
    return sorted(
        {step: value for _, step, _, value in sorted(points, key=lambda point: point[1:3])}.items()
    )


def _histories(client: MlflowClient, run_ids: list[str], key: str) -> Mapping[str, list[Point]]:
    found: dict[str, list[Point]] = {run_id: [] for run_id in run_ids}
    for start in range(0, len(run_ids), RUNS_PER_CALL):
        for point in _points(client, run_ids[start : start + RUNS_PER_CALL], key):
            found[point[0]].append(point)
    return found


def _points(client: MlflowClient, run_ids: list[str], key: str) -> Iterator[Point]:
    """All points of these runs; an answer that may have been cut off is asked for again in halves."""
    points = _bulk(client, run_ids, key) if len(run_ids) > 1 else None
    if points is not None and len(points) < POINTS_PER_CALL:
        yield from points
    elif points is None:
        for run_id in run_ids:
            yield from (
                (run_id, m.step, m.timestamp, m.value)
                for m in client.get_metric_history(run_id, key)
            )
    else:
        middle = len(run_ids) // 2
        yield from _points(client, run_ids[:middle], key)
        yield from _points(client, run_ids[middle:], key)


def _bulk(client: MlflowClient, run_ids: list[str], key: str) -> list[Point] | None:
    """Up to `POINTS_PER_CALL` points of several runs in one call; None where the store has no such call."""
    store: Any = client._tracking_client.store
    if hasattr(store, "get_metric_history_bulk"):
        found = store.get_metric_history_bulk(run_ids, key, POINTS_PER_CALL)
        return [(m.run_id, m.step, m.timestamp, m.value) for m in found]
    if hasattr(store, "get_host_creds"):
        return _from_server(store.get_host_creds(), run_ids, key)
    return None


def _from_server(credentials: Any, run_ids: list[str], key: str) -> list[Point] | None:
    from mlflow.utils.rest_utils import http_request

    asked = {"run_id": run_ids, "metric_key": key, "max_results": POINTS_PER_CALL}
    answer = http_request(credentials, BULK_ROUTE, "GET", raise_on_status=False, params=asked)
    if answer.status_code == 404:
        return None
    answer.raise_for_status()
    return [(m["run_id"], m["step"], m["timestamp"], m["value"]) for m in answer.json()["metrics"]]
