"""Many trials in one store: processes that log at once, curves read in bulk, a server over PostgreSQL and MySQL."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from databases import DATABASES, missing
from helpers import mlflow_server, serving

from tuning.tracking import curves as history
from tuning.tracking.runs import TrackingTarget, read_trials
from tuning.tracking.store import with_driver
from tuning.tracking.study import StudyTracker
from tuning.tracking.trial import TrialTracker

PROCESSES, STEPS, KEYS = 16, 60, 4


def log_trial(target: TrackingTarget, number: int) -> None:
    """What a worker of a sweep does to the store, metrics in several batches."""
    trial = TrialTracker.open(target, f"t{number}", "config", {"seed": number}, {"llgbm.bank": "b"})
    for step in range(STEPS):
        trial.log(step, {f"metric/{key}": number + step + key / 10 for key in range(KEYS)})
        if step % 20 == 19:
            trial.flush()
    trial.close()


def log_many(target: TrackingTarget) -> None:
    """Sixteen processes at once; they are made by fork from one that has imported all but opened no store."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tuning.tracking.trial", "mlflow.tracking", "mlflow.store.tracking.sqlalchemy_store"]
    )
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        for future in [pool.submit(log_trial, target, number) for number in range(PROCESSES)]:
            future.result()


def check_nothing_is_lost(study: StudyTracker) -> None:
    results = read_trials(study.tracking_uri, study.parent_run_id)
    assert sorted(result.seed or 0 for result in results) == list(range(PROCESSES))
    for result in results:
        for key in range(KEYS):
            wanted = [(step, (result.seed or 0) + step + key / 10) for step in range(STEPS)]
            assert result.curves[f"metric/{key}"] == wanted
            rows = study.client.get_metric_history(result.run_id, f"metric/{key}")
            assert len(rows) == STEPS


@pytest.mark.whole
def test_sixteen_trials_log_into_one_sqlite_file_and_lose_nothing(study: StudyTracker) -> None:
    assert study.target is not None
    log_many(study.target)
    check_nothing_is_lost(study)


@pytest.mark.parametrize(("points", "runs"), [(25_000, 100), (25_000, 2), (13, 100), (5, 3)])
def test_curves_read_in_bulk_are_those_read_one_by_one(
    points: int, runs: int, study: StudyTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert study.target is not None
    for number in range(5):
        trial = TrialTracker.open(study.target, f"t{number}", "config", {"seed": number}, {})
        for step in range(3 + number):
            trial.log(step, {"loss/total": step * number, "val/accuracy": 0.5, "system/cpu": 1.0})
        trial.close()
    monkeypatch.setattr(history, "POINTS_PER_CALL", points)
    monkeypatch.setattr(history, "RUNS_PER_CALL", runs)
    for result in read_trials(study.tracking_uri, study.parent_run_id):
        assert set(result.curves) == {"loss/total", "val/accuracy"}
        for key, curve in result.curves.items():
            assert curve == [
                (m.step, m.value) for m in study.client.get_metric_history(result.run_id, key)
            ]
    (first, *_) = read_trials(study.tracking_uri, study.parent_run_id, ("system/cpu",))
    assert first.curves == {"system/cpu": [(0, 1.0), (1, 1.0), (2, 1.0)]}


@pytest.fixture(params=["postgresql", pytest.param("mysql", marks=pytest.mark.slow)])
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of an empty database of each kind."""
    if reason := missing(request.param):
        pytest.skip(reason)
    with DATABASES[request.param]() as address:
        yield address


@pytest.mark.whole
def test_sixteen_trials_log_through_a_server_over_a_database_and_lose_nothing(
    database: str, tmp_path: Path
) -> None:
    with serving(
        mlflow_server(sys.executable, with_driver(database), tmp_path), tmp_path / "log", "health"
    ) as server:
        study = StudyTracker.open(server, tmp_path, "ablation")
        log_many(study.begin("study", "id", {}, {}))
        check_nothing_is_lost(study)
    study = StudyTracker.open(database, tmp_path, "ablation")
    study.begin("study", "id", {}, {})
    check_nothing_is_lost(study)
