"""Addresses and files of stores: those that work, and one sentence for each that does not."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import free_port
from mlflow import MlflowClient
from mlflow.entities import Experiment

from llgbm.runtime import UserError
from tuning.tracking.runs import read_trials
from tuning.tracking.store import connect, local_tracking_uri, open_experiment, redact
from tuning.tracking.study import StudyTracker


def test_two_who_create_an_experiment_at_once_share_it(
    study: StudyTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a server no lock is held between looking and creating."""
    other = connect(study.tracking_uri)
    find = type(study.client).get_experiment_by_name

    def find_then_create(client: MlflowClient, name: str) -> Experiment | None:
        found = find(client, name)
        if found is None:
            other.create_experiment(name)
        return found

    monkeypatch.setattr(type(study.client), "get_experiment_by_name", find_then_create)
    own = open_experiment(study.client, "shared", None)
    monkeypatch.undo()
    assert own == open_experiment(other, "shared", None)


def one_sentence(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and ". " not in text
    return text


def test_a_silent_address_is_refused_soon(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        StudyTracker.open(f"http://me:secret@127.0.0.1:{free_port()}", tmp_path, "ablation")
    assert time.monotonic() - began < 10
    assert "no MLflow server answers at http://127.0.0.1" in one_sentence(error)
    assert "secret" not in str(error.value)


def test_an_address_that_accepts_and_never_answers_is_refused_soon(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        with pytest.raises(UserError) as error:
            StudyTracker.open(f"http://127.0.0.1:{server.getsockname()[1]}", tmp_path, "ablation")
    assert time.monotonic() - began < 10
    one_sentence(error)


@pytest.mark.parametrize(
    "address", ["file:/tmp/mlruns", "mlruns", "databricks", "ftp://host/x", "sqlite:"]
)
def test_an_unsupported_address_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(UserError, match="sqlite:///path") as error:
        StudyTracker.open(address, tmp_path, "ablation")
    one_sentence(error)


def test_a_database_that_does_not_answer_is_refused_soon(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no database answers"):
        StudyTracker.open(
            f"postgresql://me:secret@127.0.0.1:{free_port()}/db", tmp_path, "ablation"
        )


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written") as error:
        StudyTracker.open(None, tmp_path / "file", "ablation")
    one_sentence(error)


def test_a_read_only_database_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="cannot be written .*choose a folder that you may write to"
    ):
        StudyTracker.open("sqlite:////proc/mlflow.db", tmp_path, "ablation")


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("these are my notes, not a database " * 50)
    with pytest.raises(UserError, match="not a database") as error:
        StudyTracker.open(f"sqlite:///{tmp_path}/notes.db", tmp_path, "ablation")
    one_sentence(error)


_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from llgbm.runtime import UserError
from tuning.tracking.study import StudyTracker
from tuning.tracking.trial import TrialTracker
root = Path(sys.argv[1])
study = StudyTracker.open(None, root, "ablation")
target = study.begin("study", "id", {}, {})
trial = TrialTracker.open(target, "t", "config", {}, {})
size = (root / "mlruns/mlflow.db").stat().st_size
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
for step in range(3000):
    trial.log(step, {"m": float(step)})
try:
    trial.close()
except UserError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
trial.close()
"""


def test_a_file_that_cannot_grow_is_told_and_nothing_is_dropped(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _FULL_DISK, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "cannot be used" in result.stdout and len(result.stdout.splitlines()) == 1
    uri = local_tracking_uri(tmp_path)
    parent = StudyTracker.open(uri, tmp_path, "ablation").begin("study", "id", {}, {})
    (trial,) = read_trials(uri, parent.parent_run_id)
    assert trial.curves["m"] == [(step, float(step)) for step in range(3000)]


def test_a_deleted_experiment_says_how_to_bring_it_back(
    study: StudyTracker, tmp_path: Path
) -> None:
    study.client.delete_experiment(study.experiment_id)
    with pytest.raises(UserError, match=f"--experiment-id {study.experiment_id}") as error:
        StudyTracker.open(None, tmp_path, "ablation")
    one_sentence(error)


@pytest.mark.parametrize(
    ("schema", "remedy"),
    [("451aebb31d03", "mlflow db upgrade"), ("ffffffffffff", "a newer MLflow made it")],
)
def test_a_schema_of_another_version_is_refused(
    study: StudyTracker, tmp_path: Path, schema: str, remedy: str
) -> None:
    copy = tmp_path / "other.db"
    with (
        sqlite3.connect(copy) as database,
        sqlite3.connect(tmp_path / "mlruns/mlflow.db") as source,
    ):
        source.backup(database)
        database.execute("UPDATE alembic_version SET version_num = ?", (schema,))
    with pytest.raises(UserError, match=remedy) as error:
        StudyTracker.open(f"sqlite:///{copy}", tmp_path, "ablation")
    one_sentence(error)


def test_a_relative_database_is_the_same_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        StudyTracker.open("sqlite:///mine.db", tmp_path, "a").tracking_uri
        == f"sqlite:///{tmp_path}/mine.db"
    )


def test_addresses_are_shown_without_secrets() -> None:
    assert redact("https://me:secret@host:5000/x") == "https://host:5000/x"
    assert redact("sqlite:////a@b/c.db") == "sqlite:////a@b/c.db"


_OPEN = """
import sys
from pathlib import Path
from tuning.tracking.study import StudyTracker
study = StudyTracker.open(None, Path(sys.argv[1]), "ablation")
study.begin("study", sys.argv[2], {}, {})
import mlflow, os
from mlflow.telemetry import get_telemetry_client
assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true" and get_telemetry_client() is None
assert mlflow.active_run() is None
study.finish("FINISHED")
"""


@pytest.mark.whole
def test_two_drivers_can_make_the_store_at_once_and_in_silence(tmp_path: Path) -> None:
    env = {
        key: value for key, value in os.environ.items() if key not in ("CI", "PYTEST_CURRENT_TEST")
    }
    commands = [[sys.executable, "-c", _OPEN, str(tmp_path), name] for name in ("a", "b")]
    pipe = subprocess.PIPE
    drivers = [
        subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env)
        for command in commands
    ]
    assert [driver.communicate(timeout=120) for driver in drivers] == [("", ""), ("", "")]
    assert [driver.returncode for driver in drivers] == [0, 0]
