"""The tracker against real stores: SQLite files and, once, a real server."""

from __future__ import annotations

import json
import math
import multiprocessing
import pickle
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from helpers import mlflow_server, serving

from llgbm.runtime import UserError
from tuning.registry import Score, fetch_bundle, register_generator
from tuning.tracking.runs import TrackingTarget, read_trials
from tuning.tracking.store import connect, local_tracking_uri
from tuning.tracking.study import StudyTracker
from tuning.tracking.trial import FLUSH_ENTRIES, TrialTracker, finished_result


@pytest.fixture
def study(tmp_path: Path, empty_store: Path) -> StudyTracker:
    shutil.copytree(empty_store, tmp_path / "mlruns")
    tracker = StudyTracker.open(None, tmp_path, "ablation")
    tracker.begin(
        "phase_4_5", "id-1", {"seeds": 2, "model": {"size": "tiny"}}, {"llgbm.commit": "abc"}
    )
    return tracker


def open_trial(study: StudyTracker, trial_id: str = "t1", **params: object) -> TrialTracker:
    assert study.target is not None
    return TrialTracker.open(
        study.target, trial_id, "weight-only", {"seed": 3, **params}, {"llgbm.gpu": "no"}
    )


def test_children_are_nested_below_the_study_and_carry_its_tags(
    study: StudyTracker, tmp_path: Path
) -> None:
    assert study.child_run_id("t1") is None
    trial = open_trial(study)
    client = connect(local_tracking_uri(tmp_path))
    parent, child = client.get_run(study.parent_run_id), client.get_run(trial.run_id)
    assert parent.info.run_name == "phase_4_5"
    assert parent.data.tags["llgbm.study"] == "phase_4_5"
    assert parent.data.tags["llgbm.study_id"] == "id-1"
    assert parent.data.tags["llgbm.commit"] == "abc"
    assert parent.data.params == {"seeds": "2", "model.size": "tiny"}
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.tags["llgbm.trial_id"] == "t1"
    assert child.data.tags["llgbm.config"] == "weight-only"
    assert child.info.run_name == f"weight-only, seed {child.data.params['seed']}"
    assert child.data.tags["llgbm.study"] == "phase_4_5"
    assert child.data.tags["llgbm.gpu"] == "no"
    assert child.info.status == "RUNNING"
    assert study.child_run_id("t1") == trial.run_id
    assert str(tmp_path / "mlruns" / "artifacts") in child.info.artifact_uri


def test_the_target_travels_and_is_small(study: StudyTracker) -> None:
    data = pickle.dumps(study.target)
    assert len(data) < 1000 and pickle.loads(data) == study.target


def test_params_are_flattened_cut_and_sent_in_batches(study: StudyTracker) -> None:
    many = {f"p{index}": index for index in range(250)}
    trial = open_trial(
        study, text="x" * 7000, loss={"lambda": {"w": 0.3}}, none=None, empty="", many=many
    )
    params = trial.client.get_run(trial.run_id).data.params
    assert params["loss.lambda.w"] == "0.3" and params["none"] == "None" and params["empty"] == ""
    assert len(params["text"]) == 6000
    assert [params[f"many.p{index}"] for index in range(250)] == [
        str(index) for index in range(250)
    ]


def test_an_abandoned_trial_is_opened_again_as_one_run_with_one_value_per_step(
    study: StudyTracker,
) -> None:
    first = open_trial(study)
    for step in range(8):
        first.log(step, {"loss/total": 100.0 + step})
    first.flush()
    study.finish_trial("t1", "FAILED")
    time.sleep(0.01)
    second = open_trial(study)
    assert second.client.get_run(second.run_id).info.status == "RUNNING"
    for step in range(5, 12):
        second.log(step, {"loss/total": float(step)})
    second.close()
    study.finish_trial("t1", "FINISHED")
    (result,) = read_trials(study.tracking_uri, study.parent_run_id)
    assert second.run_id == first.run_id == result.run_id
    assert result.curves["loss/total"] == [(s, 100.0 + s if s < 8 else float(s)) for s in range(12)]
    assert len(study.client.get_metric_history(result.run_id, "loss/total")) == 12
    assert (result.status, result.seed, result.config) == ("FINISHED", 3, "weight-only")
    assert result.metrics == {"loss/total": 11.0}


def test_the_metric_to_show_first_is_announced_once_and_read_when_it_is_measured(
    study: StudyTracker,
) -> None:
    for _ in range(2):
        trial = open_trial(study)
        trial.show_first("heldout/accuracy")
        trial.log(1, {"loss/total": 1.0})
        trial.close()
    assert list(trial.client.get_run(trial.run_id).data.metrics) == [
        "heldout/accuracy",
        "loss/total",
    ]
    (result,) = read_trials(study.tracking_uri, study.parent_run_id)
    assert result.metrics == {"loss/total": 1.0}
    trial.log(2, {"heldout/accuracy": 0.5})
    trial.close()
    study.finish_trial("t1", "FINISHED")
    found = finished_result(study.target, "t1")
    assert found is not None
    assert found.metrics == {"heldout/accuracy": 0.5, "loss/total": 1.0}
    history = trial.client.get_metric_history(trial.run_id, "heldout/accuracy")
    assert [metric.step for metric in history] == [0, 2] and math.isnan(history[0].value)


def test_a_study_is_continued_under_the_run_that_it_has(tmp_path: Path) -> None:
    first = StudyTracker.open(None, tmp_path, "ablation").begin("study", "id", {"steps": 5}, {})
    study = StudyTracker.open(None, tmp_path, "ablation")
    assert study.begin("study", "id", {"steps": 5}, {}) == first
    study.finish("KILLED")
    assert study.begin("study", "id", {"steps": 5}, {}) == first
    assert study.client.get_run(first.parent_run_id).info.status == "RUNNING"
    assert study.begin("study", "other", {"steps": 5}, {}) != first
    assert study.begin("study", "id", {"steps": 6}, {}) != first
    study.begin("study", "id", {"steps": 5}, {})
    study.finish("FINISHED")
    assert study.begin("study", "id", {"steps": 5}, {}) == first
    study.supersede_study("id")
    assert study.begin("study", "id", {"steps": 5}, {}) != first


def test_a_trial_opened_again_with_other_values_is_refused(study: StudyTracker) -> None:
    open_trial(study, steps=5)
    open_trial(study, steps=5, more=1)
    with pytest.raises(UserError, match="steps = 5 and is opened again with 6"):
        open_trial(study, steps=6)


def test_metrics_wait_for_a_full_buffer(study: StudyTracker) -> None:
    trial = open_trial(study)
    for step in range(FLUSH_ENTRIES - 1):
        trial.log(step, {"m": 1.0})
    assert "m" not in trial.client.get_run(trial.run_id).data.metrics
    trial.log(FLUSH_ENTRIES, {"m": 2.0})
    assert trial.client.get_run(trial.run_id).data.metrics["m"] == 2.0
    trial.close()


def test_metrics_do_not_wait_for_long(study: StudyTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuning.tracking.trial.FLUSH_SECONDS", 0.05)
    trial = open_trial(study)
    time.sleep(0.06)
    trial.log(0, {"m": 1.0})
    assert trial.client.get_run(trial.run_id).data.metrics == {"m": 1.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_by_name(study: StudyTracker, value: float) -> None:
    trial = open_trial(study)
    with pytest.raises(ValueError, match="'loss/delta' is .* at step 7"):
        trial.log(7, {"loss/weight": 1.0, "loss/delta": value})
    with pytest.raises(ValueError, match="'loss/delta'"):
        study.log_metrics({"loss/delta": value})
    trial.close()
    assert read_trials(study.tracking_uri, study.parent_run_id)[0].metrics == {}


def test_the_driver_decides_how_runs_end(study: StudyTracker) -> None:
    ids = {name: open_trial(study, name).run_id for name in ("good", "bad", "stopped", "left")}
    study.finish_trial("good", "FINISHED")
    study.finish_trial("bad", "FAILED")
    study.finish_trial("stopped", "KILLED")
    study.finish_trial("never-started", "FAILED")
    statuses = {
        trial.trial_id: trial.status
        for trial in read_trials(study.tracking_uri, study.parent_run_id)
    }
    assert statuses == {"good": "FINISHED", "bad": "FAILED", "stopped": "KILLED", "left": "RUNNING"}
    study.finish("FAILED")
    assert study.client.get_run(study.parent_run_id).info.status == "FAILED"
    assert study.client.get_run(ids["left"]).info.status == "KILLED"
    assert study.client.get_run(ids["good"]).info.status == "FINISHED"
    with pytest.raises(ValueError, match="DONE"):
        study.finish_trial("good", "DONE")


def test_a_study_that_ends_well_leaves_its_children_alone(study: StudyTracker) -> None:
    run_id = open_trial(study).run_id
    study.finish("FINISHED")
    assert study.client.get_run(run_id).info.status == "RUNNING"


def test_only_children_of_this_study_are_killed(study: StudyTracker, tmp_path: Path) -> None:
    other = StudyTracker.open(None, tmp_path, "ablation")
    other.begin("other", "id-2", {}, {})
    bystander = open_trial(other, "t2")
    assert bystander.run_id != open_trial(study).run_id
    study.finish("KILLED")
    assert other.client.get_run(bystander.run_id).info.status == "RUNNING"


def test_artifacts_and_tags_are_kept(study: StudyTracker, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "report.md").write_text("hello")
    trial = open_trial(study)
    trial.log_artifacts(folder, "generated")
    study.log_artifacts(folder, "report")
    study.set_tags({"llgbm.verdict": "none"})
    study.log_metrics({"baseline/teacher/accuracy": 1.0})
    parent = study.client.get_run(study.parent_run_id)
    assert [f.path for f in study.client.list_artifacts(trial.run_id, "generated")] == [
        "generated/report.md"
    ]
    assert [f.path for f in study.client.list_artifacts(parent.info.run_id, "report")] == [
        "report/report.md"
    ]
    assert parent.data.tags["llgbm.verdict"] == "none"
    assert parent.data.metrics == {"baseline/teacher/accuracy": 1.0}
    trial.log_artifacts(folder, "")
    copy = study.download_artifacts(trial.run_id, "generated", tmp_path)
    assert (Path(copy) / "report.md").read_text() == "hello"
    assert [f.path for f in study.client.list_artifacts(trial.run_id)] == ["generated", "report.md"]
    with pytest.raises(UserError):
        study.download_artifacts(trial.run_id, "nothing", tmp_path)


def _log_steps(target: TrackingTarget, trial_id: str, steps: int) -> None:
    trial = TrialTracker.open(target, trial_id, "config", {"seed": 0}, {})
    for step in range(steps):
        trial.log(step, {f"metric/{index}": step + index / 10 for index in range(8)})
    trial.close()


@pytest.mark.whole
def test_four_processes_lose_nothing(study: StudyTracker) -> None:
    assert study.target is not None
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(4, mp_context=context) as pool:
        for future in [
            pool.submit(_log_steps, study.target, f"t{index}", 200) for index in range(4)
        ]:
            future.result()
    results = read_trials(study.tracking_uri, study.parent_run_id)
    assert sorted(result.trial_id for result in results) == ["t0", "t1", "t2", "t3"]
    for result in results:
        for index in range(8):
            assert result.curves[f"metric/{index}"] == [
                (step, step + index / 10) for step in range(200)
            ]


def test_curves_can_be_limited(study: StudyTracker) -> None:
    trial = open_trial(study)
    trial.log(1, {"a": 1.0, "b": 2.0})
    trial.close()
    (result,) = read_trials(study.tracking_uri, study.parent_run_id, curve_keys=("a",))
    assert result.curves == {"a": [(1, 1.0)]} and result.metrics == {"a": 1.0, "b": 2.0}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    command = mlflow_server(sys.executable, f"sqlite:///{tmp_path}/server.db", tmp_path)
    with serving(command, tmp_path / "log", "health") as url:
        yield url


@pytest.mark.whole
def test_a_server_takes_a_study_its_artifacts_and_a_generator(server: str, tmp_path: Path) -> None:
    study = StudyTracker.open(server + "/", tmp_path, "ablation")
    study.begin("study", "id", {"a": {"b": 1}}, {})
    trial = open_trial(study)
    for step in range(1500):
        trial.log(step, {"loss/total": 1.0 / (step + 1)})
    trial.close()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/x.json").write_text(json.dumps({"x": 1}))
    trial.log_artifacts(tmp_path / "out", "out")
    study.finish_trial("t1", "FINISHED")
    study.finish("FINISHED")
    (result,) = read_trials(server, study.parent_run_id)
    assert result.curves["loss/total"] == [(step, 1.0 / (step + 1)) for step in range(1500)]
    assert result.status == "FINISHED"
    assert [file.path for file in study.client.list_artifacts(result.run_id, "out")] == [
        "out/x.json"
    ]
    assert not (tmp_path / "mlruns").exists()
    assert json.loads(_register_and_fetch(server, result.run_id, tmp_path).read_text()) == {
        "size": "tiny"
    }
    assert study.client.get_run(result.run_id).info.status == "FINISHED"


def _register_and_fetch(server: str, run_id: str, folder: Path) -> Path:
    (folder / "bundle").mkdir()
    (folder / "bundle/generator.json").write_text(json.dumps({"size": "tiny"}))
    tags = {"llgbm.val_data": "val1", "llgbm.study_id": "id", "llgbm.trial_id": "t1"}
    made = [
        register_generator(
            server,
            run_id,
            folder / "bundle",
            "generator",
            tags,
            Score(0.5, "val/accuracy", {"a": 0.5}),
        )
        for _ in range(2)
    ]
    assert made[0] == made[1] and made[0].alias == "champion"
    return fetch_bundle("models:/generator@champion", server) / "generator.json"
