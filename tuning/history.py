"""Curves of many runs at once. MLflow's client has a call for one key of one run; a study of 500 trials has thousands.

A database is asked through MLflow's own store, a server through the route that its own pages use; both take up to a
hundred runs a call. A store that has neither is asked run by run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

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
    return sorted({step: value for _, step, _, value in sorted(points, key=lambda point: point[1:3])}.items())


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
            yield from ((run_id, m.step, m.timestamp, m.value) for m in client.get_metric_history(run_id, key))
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
