"""Read metric curves of many runs, in bulk where the store can."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Curve = list[tuple[int, float]]  # (step, value)
Point = tuple[str, int, int, float]  # run id, step, timestamp, value
RUNS_PER_CALL = 100
POINTS_PER_CALL = 25_000  # the most that an MLflow server returns
BULK_ROUTE = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"
# Logged once per trial, or about the machine: read as curves only when named.
NO_CURVES = ("heldout/", "train/", "time/", "system/", "best_step")


def read_curves(
    client: MlflowClient, runs: Sequence[Run], keys: Collection[str] | None = None
) -> dict[str, dict[str, Curve]]:
    """Return curves by run id and key, sorted by step; of a step logged twice the later value counts.

    `keys` None reads every metric except `NO_CURVES`.
    """
    curves: dict[str, dict[str, Curve]] = {run.info.run_id: {} for run in runs}
    for key, run_ids in _runs_by_key(runs, keys).items():
        for run_id, points in _histories(client, run_ids, key).items():
            curves[run_id][key] = _curve(points)
    return curves


def read_points(
    client: MlflowClient, runs: Sequence[Run]
) -> dict[str, dict[str, list[tuple[int, int, float]]]]:
    """Return every logged value as (step, timestamp, value), by run id and key."""
    found: dict[str, dict[str, list[tuple[int, int, float]]]] = {
        run.info.run_id: {} for run in runs
    }
    for key, run_ids in _runs_by_key(runs, None, ()).items():
        for run_id, points in _histories(client, run_ids, key).items():
            found[run_id][key] = [point[1:] for point in sorted(points, key=itemgetter(1, 2))]
    return found


def _runs_by_key(
    runs: Sequence[Run], keys: Collection[str] | None, without: tuple[str, ...] = NO_CURVES
) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for run in runs:
        for key in run.data.metrics:
            if _is_wanted(key, keys, without):
                found.setdefault(key, []).append(run.info.run_id)
    return found


def _is_wanted(key: str, keys: Collection[str] | None, without: tuple[str, ...]) -> bool:
    if keys is None:
        return not key.startswith(without)
    return key in keys


def _curve(points: Iterable[Point]) -> Curve:
    by_time = sorted(points, key=itemgetter(1, 2))
    return sorted({step: value for _, step, _, value in by_time}.items())


def _histories(client: MlflowClient, run_ids: list[str], key: str) -> Mapping[str, list[Point]]:
    found: dict[str, list[Point]] = {run_id: [] for run_id in run_ids}
    for start in range(0, len(run_ids), RUNS_PER_CALL):
        for point in _points(client, run_ids[start : start + RUNS_PER_CALL], key):
            found[point[0]].append(point)
    return found


def _points(client: MlflowClient, run_ids: list[str], key: str) -> Iterator[Point]:
    """Yield every point of these runs; halve the request while the answer may be cut off."""
    points = _bulk(client, run_ids, key) if len(run_ids) > 1 else None
    if points is None:
        for run_id in run_ids:
            yield from _points_of(client, run_id, key)
    elif len(points) < POINTS_PER_CALL:
        yield from points
    else:
        middle = len(run_ids) // 2
        yield from _points(client, run_ids[:middle], key)
        yield from _points(client, run_ids[middle:], key)


def _points_of(client: MlflowClient, run_id: str, key: str) -> Iterator[Point]:
    for metric in client.get_metric_history(run_id, key):
        yield run_id, metric.step, metric.timestamp, metric.value


def _bulk(client: MlflowClient, run_ids: list[str], key: str) -> list[Point] | None:
    """Return up to `POINTS_PER_CALL` points of several runs in one call; None if the store has no such call."""
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
