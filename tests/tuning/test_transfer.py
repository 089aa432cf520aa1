"""Stores that were moved, copied, cleaned; studies that are carried to another store."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import sys
import zipfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers import mlflow_server, serving
from made_study import LAMBDAS, TASKS, log_trial, make_study

from tuning.registry import Score, fetch_bundle, register_generator
from tuning.report.__main__ import main as report
from tuning.runs import main
from tuning.tracking.runs import SUPERSEDED_TAG, find_study, read_trials
from tuning.tracking.study import StudyTracker

EFFECTS = {"multitask": 0.3, "weight-only": 0.0}


def address(folder: Path) -> str:
    return f"sqlite:///{folder}/mlruns/mlflow.db"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a finished study, one trial that failed, and a registered version."""
    folder = tmp_path_factory.mktemp("original") / "checkout"
    tracker = make_study(folder, EFFECTS)
    bad = log_trial(tracker, "multitask", 9, dict.fromkeys(TASKS, 0.1), LAMBDAS["multitask"])
    tracker.finish_trial("multitask9", "FAILED", {"llgbm.error": "out of memory"})
    bundle = folder / "bundle"
    bundle.mkdir()
    (bundle / "generator.json").write_text('{"size": "nano"}')
    tags = {"llgbm.val_data": "v", "llgbm.study_id": "made0001", "llgbm.trial_id": "multitask0"}
    run_id = tracker.child_run_id("multitask0")
    score = Score(0.5, "val/accuracy", {"a": 0.5, "b": 0.5})
    assert run_id and bad
    register_generator(tracker.tracking_uri, run_id, bundle, "made", tags, score)
    return folder


def told(uri: str, out: Path) -> tuple[str, dict]:
    """Make the report; return its text without the ids of runs, and its numbers."""
    assert report(["made0001", "--tracking-uri", uri, "--out", str(out)]) == 0
    text = re.sub(r"\b[0-9a-f]{32}\b", "RUN", (out / "report.md").read_text())
    return text, json.loads((out / "results.json").read_text())


@pytest.mark.whole
@pytest.mark.parametrize("keep", [False, True], ids=["moved", "copied"])
def test_a_moved_or_copied_store_gives_the_same_report_and_keeps_to_itself(
    original: Path, tmp_path: Path, keep: bool
) -> None:
    first, second = tmp_path / "first", tmp_path / "the second, 100 %"
    shutil.copytree(original, first)
    wanted = told(address(first), tmp_path / "wanted")
    if keep:
        shutil.copytree(first, second)
    else:
        first.rename(second)
    before = sorted(path for path in first.rglob("*"))
    uri = address(second)
    assert told(uri, tmp_path / "found") == wanted
    tracker = StudyTracker.open(uri, second, "llgbm")
    tracker.begin("later", "later001", {}, {})
    run_id = log_trial(tracker, "delta-only", 0, dict.fromkeys(TASKS, 0.4), LAMBDAS["delta-only"])
    info = tracker.client.get_run(run_id).info
    assert "second" in info.artifact_uri and list(second.rglob(f"{run_id}/artifacts/per_task.json"))
    assert (fetch_bundle("models:/made@champion", uri) / "generator.json").is_file()
    with closing(sqlite3.connect(second / "mlruns" / "mlflow.db")) as store:
        assert str(first) not in "\n".join(store.iterdump())
    assert sorted(path for path in first.rglob("*")) == before


def test_the_copy_of_a_database_alone_reads_the_artifacts_where_they_are(
    original: Path, tmp_path: Path
) -> None:
    shutil.copy(original / "mlruns" / "mlflow.db", tmp_path / "copy.db")
    text, _ = told(f"sqlite:///{tmp_path}/copy.db", tmp_path / "out")
    assert "cannot be read" not in text and "kept no numbers by task" not in text


@pytest.mark.whole
def test_artifacts_removed_by_hand_cost_what_needs_them_and_are_named_first(
    original: Path, tmp_path: Path
) -> None:
    shutil.copytree(original, tmp_path / "cleaned")
    whole, _ = told(address(tmp_path / "cleaned"), tmp_path / "whole")
    found = trials(address(tmp_path / "cleaned"))
    (gone,) = {trial.run_id for trial in found if trial.trial_id == "multitask1"}
    shutil.rmtree(tmp_path / "cleaned" / "mlruns" / "artifacts" / gone)
    text, _ = told(address(tmp_path / "cleaned"), tmp_path / "some")
    assert "all artifacts of this run are gone" in text.partition("\n## ")[0]
    assert "(multitask, seed 1)" in text and "1 of 6 trials kept no numbers by task" in text
    assert "\n## Results\n" in text and "## Delta maps" in whole
    shutil.rmtree(tmp_path / "cleaned" / "mlruns" / "artifacts")
    text, _ = told(address(tmp_path / "cleaned"), tmp_path / "none")
    assert "\n## Results\n" in text and "## Learning curves" in text


def trials(uri: str) -> list:
    return read_trials(uri, find_study(uri, "made0001").info.run_id)


def numbers(uri: str) -> list:
    return [
        (t.trial_id, t.config, t.seed, t.status, t.metrics, t.curves, t.params, t.cause)
        for t in trials(uri)
    ]


@pytest.mark.whole
@pytest.mark.parametrize("target", ["sqlite", "server"])
def test_a_study_is_carried_to_another_store_with_all_that_it_has(
    original: Path, tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "study.zip"
    assert (
        main(["export", "made0001", "--out", str(file), "--tracking-uri", address(original)]) == 0
    )
    said = {"study": "made0001", "trials": 7, "versions": 1}
    assert json.loads(capsys.readouterr().out) == said
    if target == "sqlite":
        check_import(original, file, address(tmp_path / "new"), tmp_path)
        return
    command = mlflow_server(sys.executable, f"sqlite:///{tmp_path}/server.db", tmp_path)
    with serving(command, tmp_path / "log", "health") as server:
        check_import(original, file, server, tmp_path)


def check_import(original: Path, file: Path, uri: str, tmp_path: Path) -> None:
    assert main(["import", str(file), "--tracking-uri", uri]) == 0
    assert numbers(uri) == numbers(address(original))
    assert told(uri, tmp_path / "found") == told(address(original), tmp_path / "wanted")
    assert (fetch_bundle("models:/made@champion", uri) / "generator.json").is_file()
    assert main(["import", str(file), "--tracking-uri", uri]) == 2


def test_a_trial_that_the_store_has_is_shared_and_not_doubled(
    original: Path, tmp_path: Path
) -> None:
    tracker = StudyTracker.open(None, tmp_path, "llgbm")
    tracker.begin("other", "other001", {}, {})
    own = log_trial(tracker, "multitask", 0, dict.fromkeys(TASKS, 0.9), LAMBDAS["multitask"])
    file = tmp_path / "study.zip"
    assert main(["export", "latest", "--out", str(file), "--tracking-uri", address(original)]) == 0
    assert main(["import", str(file), "--tracking-uri", tracker.tracking_uri]) == 0
    found = trials(tracker.tracking_uri)
    assert len(found) == 7 and own in {trial.run_id for trial in found}


def test_an_import_that_was_cut_short_counts_nowhere_and_can_be_made_again(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "study.zip"
    assert main(["export", "latest", "--out", str(file), "--tracking-uri", address(original)]) == 0
    uri = address(tmp_path / "new")
    tracker = StudyTracker.open(uri, tmp_path, "llgbm")
    with monkeypatch.context() as patch:
        patch.setattr(type(tracker.client), "log_artifacts", _no_space)
        assert main(["import", str(file), "--tracking-uri", uri]) == 2
    assert tracker.studies("made0001") == [] and tracker.live_runs() == {}
    left = tracker.client.search_runs([tracker.experiment_id])
    assert left and all(SUPERSEDED_TAG in run.data.tags for run in left)
    assert main(["import", str(file), "--tracking-uri", uri]) == 0
    assert numbers(uri) == numbers(address(original))


def _no_space(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


def test_what_is_no_export_is_refused_and_changes_nothing(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good.zip"
    source = ["--tracking-uri", address(original)]
    assert main(["export", "latest", "--out", str(good), *source]) == 0
    capsys.readouterr()
    with zipfile.ZipFile(good) as archive:
        content = archive.read("study.json").decode()
    bad = {
        "text.zip": b"no archive",
        "cut.zip": good.read_bytes()[:2000],
        "empty.zip": None,
        "escape.zip": {"study.json": content, "../../escaped": "x"},
        "newer.zip": {"study.json": content.replace("llgbm study 1", "llgbm study 9")},
        "other.zip": {"study.json": '{"runs": 3}'},
    }
    for name, made in bad.items():
        path = tmp_path / name
        if isinstance(made, bytes):
            path.write_bytes(made)
        else:
            with zipfile.ZipFile(path, "w") as archive:
                for member, text in (made or {}).items():
                    archive.writestr(member, text)
        assert main(["import", str(path), "--tracking-uri", address(tmp_path / "new")]) == 2, name
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert name in line and "Traceback" not in line
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob("**/escaped"))
    assert main(["import", str(tmp_path / "none.zip"), *source]) == 2
    assert main(["export", "latest", "--out", str(good), *source]) == 2
    assert main(["export", "nobody", "--out", str(tmp_path / "x.zip"), *source]) == 2
    assert not (tmp_path / "x.zip").exists() and not list(tmp_path.glob(".*.writing"))


def test_a_study_is_exported_without_the_versions_whose_files_are_gone(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(original, tmp_path / "cleaned")
    uri = address(tmp_path / "cleaned")
    assert trials(uri)  # the copy is on its own now
    shutil.rmtree(tmp_path / "cleaned" / "mlruns" / "artifacts")
    (tmp_path / "cleaned" / "mlruns" / "artifacts").mkdir()
    file = tmp_path / "study.zip"
    assert main(["export", "latest", "--out", str(file), "--tracking-uri", uri]) == 0
    told_so = capsys.readouterr()
    assert json.loads(told_so.out)["versions"] == 0
    assert "the files of made version 1 are gone: it is left out" in told_so.err
    assert main(["import", str(file), "--tracking-uri", address(tmp_path / "new")]) == 0
    assert numbers(address(tmp_path / "new")) == numbers(address(original))


def spoiled(content: dict, **changes: Any) -> dict:
    """The content of an export with other values in its last run, or without those that are None."""
    *others, last = content["runs"]
    kept = {key: value for key, value in {**last, **changes}.items() if value is not None}
    return {**content, "runs": [*others, kept]}


def test_an_export_of_another_hand_reads_nothing_beside_it_and_is_refused_before_a_run_is_made(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good.zip"
    source = ["--tracking-uri", address(original)]
    assert main(["export", "latest", "--out", str(good), *source]) == 0
    with zipfile.ZipFile(good) as archive:
        content = json.loads(archive.read("study.json"))
    (version,) = content["versions"]
    bad = [
        spoiled(content, id="../../../secrets"),
        spoiled(content, id="/etc"),
        {**content, "versions": [{**version, "folder": "../../secrets"}]},
        {**content, "versions": [{**version, "folder": "/etc"}]},
        spoiled(content, params=None),
        spoiled(content, status="MAYBE"),
        spoiled(content, metrics={"loss": [[0, 0, "high"]]}),
    ]
    capsys.readouterr()
    for number, one in enumerate(bad):
        path = tmp_path / f"bad{number}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("study.json", json.dumps(one))
        assert main(["import", str(path), "--tracking-uri", address(tmp_path / "new")]) == 2, number
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert path.name in line
    assert not (tmp_path / "new").exists()
