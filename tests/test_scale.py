"""Many trials in one store: processes that log at once, curves read in bulk, a server over PostgreSQL."""

from __future__ import annotations

import multiprocessing
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from servers import free_port, mlflow_server, serving

from tuning import history
from tuning.store import with_driver
from tuning.tracking import StudyTracker, TrackingTarget, TrialTracker, read_trials

PROCESSES, STEPS, KEYS = 16, 60, 4
POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


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
    context.set_forkserver_preload(["tuning.tracking", "mlflow.tracking", "mlflow.store.tracking.sqlalchemy_store"])
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
            assert curve == [(m.step, m.value) for m in study.client.get_metric_history(result.run_id, key)]
    (first, *_) = read_trials(study.tracking_uri, study.parent_run_id, ("system/cpu",))
    assert first.curves == {"system/cpu": [(0, 1.0), (1, 1.0), (2, 1.0)]}


def as_postgres(command: list[str]) -> list[str]:
    """PostgreSQL does not run as root; Debian's package brings a user for it."""
    return (
        ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *command] if not os.getuid() else command
    )


def missing() -> str:
    """Why there can be no PostgreSQL here; empty if there can."""
    if not POSTGRES:
        return "PostgreSQL is not installed (Debian: apt-get install postgresql)"
    try:
        import psycopg2  # noqa: F401
    except ImportError:
        return "psycopg2 is not installed (pip install 'llgbm[postgresql]')"
    try:
        pwd.getpwnam("postgres")
    except KeyError:
        return "root may not run PostgreSQL and there is no user postgres" if not os.getuid() else ""
    return ""


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A private cluster on a free port of 127.0.0.1, with an empty database."""
    if missing():
        pytest.skip(missing())
    folder, port = Path(subprocess.check_output(as_postgres(["mktemp", "-d"]), text=True).strip()), free_port()
    control = [str(POSTGRES[-1] / "pg_ctl"), "-D", str(folder / "data"), "-l", str(folder / "log"), "-w"]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"

    def call(*command: str) -> None:
        subprocess.run(as_postgres(list(command)), check=True, cwd=folder, stdout=subprocess.DEVNULL)

    try:
        call(str(POSTGRES[-1] / "initdb"), "-D", str(folder / "data"), "-U", "llgbm", "--auth=trust", "--no-sync")
        call(*control, "-o", options, "start")
        call(str(POSTGRES[-1] / "createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", "llgbm", "mlflow")
        yield f"postgresql://llgbm@127.0.0.1:{port}/mlflow"
    finally:
        subprocess.run(as_postgres([*control, "-m", "immediate", "stop"]), stdout=subprocess.DEVNULL)
        shutil.rmtree(folder)


def test_sixteen_trials_log_through_a_server_over_postgresql_and_lose_nothing(postgres: str, tmp_path: Path) -> None:
    with serving(mlflow_server(sys.executable, with_driver(postgres), tmp_path), tmp_path / "log", "health") as server:
        study = StudyTracker.open(server, tmp_path, "ablation")
        log_many(study.begin("study", "id", {}, {}))
        check_nothing_is_lost(study)
    study = StudyTracker.open(postgres, tmp_path, "ablation")
    study.begin("study", "id", {}, {})
    check_nothing_is_lost(study)
