"""Promises of a sweep that no other file holds: heartbeats, ends by run id, lost artifacts, turns, tokens, tables."""

from __future__ import annotations

import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_study import accuracies
from test_ownership import begun, owner, trial

from llgbm.runtime import UserError, redact
from tuning.arguments import parse_arguments
from tuning.registry import Score, register_generator
from tuning.registry.best import read_candidates
from tuning.registry.champions import champion_history, promote
from tuning.registry.commands import list_models
from tuning.registry.turns import TURN_TAG, turn
from tuning.registry.versions import aliases_of
from tuning.report import StudyRecord, tables, write_report
from tuning.report.groups import group_trials
from tuning.search.queue import ListQueue
from tuning.studies import Study
from tuning.studies.options import Options, RunOptions, StoreOptions
from tuning.studies.spec import TrialSpec
from tuning.sweep import places
from tuning.sweep.cluster import connect_ray
from tuning.sweep.resume import begin_anew
from tuning.sweep.run import Job, open_queue, trials_lost
from tuning.tracking import ownership as own
from tuning.tracking.ownership import Driver, drivers_of, own_study
from tuning.tracking.runs import MEMBER_TAG, TrialResult, read_trials
from tuning.tracking.store import usable_uri
from tuning.tracking.study import StudyTracker
from tuning.tracking.trial import TrialTracker

SECRET = "pa55/word"


def opened(tracker: StudyTracker, spec: TrialSpec) -> str:
    assert tracker.target is not None
    return TrialTracker.open(tracker.target, spec.id, spec.name, {}, {}).run_id


def status(study: StudyTracker, run_id: str) -> str:
    return str(study.client.get_run(run_id).info.status)


def test_a_heart_beats_in_the_store_until_the_study_is_released(
    study: StudyTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "BEAT_SECONDS", 0.02)

    def beats() -> list[float]:
        run = study.client.get_run(study.parent_run_id)
        return [driver.beat for driver in drivers_of(run)]

    with own_study(study, "id"):
        first = beats()
        for _ in range(200):
            if beats() != first:
                break
            time.sleep(0.05)
        assert len(beats()) == 1 and beats() > first
    assert beats() == []


def test_who_gives_way_deletes_no_study_that_was_there(study: StudyTracker) -> None:
    """Two drivers go on with one study, and each sees the other for a moment."""
    again = StudyTracker(study.client, study.tracking_uri, study.experiment_id)
    again.begin("study", "id", {}, {})
    assert again.parent_run_id == study.parent_run_id
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "ATTEMPTS", 1)
        patch.setattr(own.Ownership, "_other_driver", lambda *_: Driver.of_this_process())
        with pytest.raises(UserError, match="is being run by"), own_study(again, "id"):
            pass
    assert study.client.get_run(study.parent_run_id).info.lifecycle_stage == "active"


def test_a_trial_ends_by_the_run_that_its_worker_wrote_to(
    study: StudyTracker, tmp_path: Path
) -> None:
    """Another study began the trial anew meanwhile: that run is not this driver's to end."""
    from tuning.sweep.ray_tune import Watcher

    mine = opened(study, trial(0))
    study.supersede([mine])
    theirs = opened(begun(study, "other"), trial(0))
    watcher = Watcher(study, owner(study), None, 1)
    ended = SimpleNamespace(config={"trial": trial(0)}, last_result={"step": 1, "finished": True})
    watcher.on_trial_result(1, [], ended, {"step": 1, "run_id": mine})
    watcher.on_trial_complete(1, [], ended)
    watcher.close()
    assert (status(study, mine), status(study, theirs)) == ("FINISHED", "RUNNING")


def test_a_trial_that_another_finished_meanwhile_is_adopted(study: StudyTracker) -> None:
    from tuning.sweep.ray_tune import Watcher

    other = begun(study, "other")
    run_id = opened(other, trial(0))
    other.finish_trial(trial(0).id, "FINISHED")
    watcher = Watcher(study, owner(study), None, 1)
    ended = SimpleNamespace(config={"trial": trial(0)}, last_result={"step": 1, "reused": True})
    watcher.on_trial_complete(1, [], ended)
    watcher.close()
    (found,) = read_trials(study.tracking_uri, study.parent_run_id)
    assert (found.run_id, found.status) == (run_id, "FINISHED")
    assert MEMBER_TAG + study.parent_run_id in study.client.get_run(run_id).data.tags


@pytest.mark.parametrize("what", ["models list", "a sweep in another experiment"])
def test_whatever_starts_on_a_store_marks_what_dead_drivers_left(
    study: StudyTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    from tuning import run_ablation

    run_id = opened(study, trial(0))
    study.set_tags({f"{own.DRIVER_TAG}dead": _gone().as_text()})
    if what == "models list":
        list_models(study.tracking_uri)
    else:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(run_ablation, "check_not_run", _enough)
        asked = ["--smoke", "--experiment", "elsewhere", "--cache", str(tmp_path)]
        with pytest.raises(UserError, match="enough"):
            run_ablation.run(parse_arguments(asked))
    assert status(study, run_id) == status(study, study.parent_run_id) == "KILLED"


def _enough(*_: object) -> None:
    raise UserError("enough was seen")


def remove_artifacts(folder: Path, run_id: str) -> None:
    (place,) = folder.rglob(f"artifacts/{run_id}")
    shutil.rmtree(place)


def test_a_trial_whose_artifacts_are_gone_is_passed_over_and_run_again_if_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = StudyTracker.open(None, tmp_path, "llgbm")
    tracker.begin("made", "made0001", {}, {})
    study = Study("made", (trial(0), trial(1)))
    runs = {}
    for spec in study.trials:
        runs[spec.id] = opened(tracker, spec)
        folder = tmp_path / spec.id
        (folder / "generator").mkdir(parents=True)
        (folder / "deltas").mkdir()
        (folder / "generator" / "generator.json").write_text("{}")
        (folder / "deltas" / "test.safetensors").touch()
        (folder / "per_task.json").write_text('{"val": {"accuracy": {"a": 0.5}}}')
        tracker.client.log_artifacts(runs[spec.id], str(folder))
        tracker.finish_trial(spec.id, "FINISHED")
    remove_artifacts(tmp_path / "mlruns", runs[trial(0).id])
    results = read_trials(tracker.tracking_uri, tracker.parent_run_id)
    found = read_candidates(tracker, results, "val/accuracy")
    assert [one.trial_id for one, _ in found] == [trial(1).id]
    assert f"trial {trial(0).id} (multitask, seed None) cannot be read" in capsys.readouterr().err

    monkeypatch.chdir(tmp_path)
    stores = StoreOptions(tracking_uri=tracker.tracking_uri)
    asked = Options(run=RunOptions(retry_lost=True), stores=stores)
    assert trials_lost(study, Options(stores=stores)) == []
    assert trials_lost(study, asked) == [trial(0)]
    with own_study(tracker, "made0001") as ownership:
        begin_anew(trials_lost(study, asked), tracker, str(tmp_path), ownership)
    resources: Any = SimpleNamespace(concurrent=1)
    queue = open_queue(Job(study, asked, {}, tracker, "", resources))
    assert queue.ask() == trial(0) and queue.ask() is None
    (whole,) = [run for key, run in runs.items() if key == trial(1).id]
    assert [run.info.run_id for run in tracker.live_runs().values()] == [whole]
    assert isinstance(queue, ListQueue)


@pytest.mark.parametrize("others", (["--fresh"], ["--retry-failed"], ["--search", "random"]))
def test_a_retry_of_what_was_lost_goes_with_nothing_that_contradicts_it(
    others: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuning import run_ablation

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_ablation, "choose_resources", _enough)
    with pytest.raises(UserError, match="--retry-lost"):
        run_ablation.run(parse_arguments(["--retry-lost", *others]))


def registered(study: StudyTracker, bundle: Path, name: str, score: float) -> str:
    run_id = opened(study, replace(trial(0), name=name))
    tags = {"llgbm.val_data": "v", "llgbm.study_id": name, "llgbm.trial_id": name}
    figures = Score(score, "val/accuracy", accuracies(score))
    return register_generator(study.tracking_uri, run_id, bundle, "model", tags, figures).alias


def test_only_one_process_at_a_time_says_who_is_champion(
    study: StudyTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "generator.json").write_text('{"size": "nano"}')
    client = study.client
    client.create_registered_model("model")
    client.set_registered_model_tag("model", f"{TURN_TAG}dead", _gone().as_text())
    done: list[str] = []
    with turn(client, "model"):
        late = threading.Thread(target=lambda: done.append(registered(study, bundle, "a", 0.7)))
        late.start()
        late.join(3)
        assert not done and not aliases_of(client, "model")
    late.join()
    assert done == ["champion"] and registered(study, bundle, "b", 0.5) == "challenger"
    assert aliases_of(client, "model") == {"champion": "1", "challenger": "2"}
    assert champion_history(client, "model") == ["1"]
    assert not [key for key in client.get_registered_model("model").tags if TURN_TAG in key]
    monkeypatch.setattr("tuning.registry.turns.PATIENCE_SECONDS", 0.0)
    with turn(client, "model"), pytest.raises(UserError, match="is being changed by process"):
        promote(client, "model@challenger")


def _gone() -> Driver:
    """A driver of this machine whose process has ended."""
    return replace(Driver.of_this_process(), started=1.0)


@pytest.mark.parametrize(
    "uri", [f"http://me:{SECRET}@host:5000/x", "postgresql://me:pa55#word@127.0.0.1:9/db"]
)
def test_a_password_that_is_not_encoded_is_told_and_not_shown(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(UserError, match="write the characters / # . and @ of a password") as error:
        usable_uri(uri)
    assert "pa55" not in str(error.value) + redact(f"no answer at {uri} (timeout)")
    assert redact("see http://host:5000/x@y") == "see http://host:5000/x@y"


def test_a_cluster_is_shown_the_default_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setattr(places, "TOKEN", tmp_path / "auth_token")
    places.show_token()
    assert "RAY_AUTH_MODE" not in os.environ
    (tmp_path / "auth_token").write_text("0" * 64)
    places.show_token()
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_a_token_that_a_cluster_does_not_accept_is_called_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the answer of Ray is put in here."""
    import ray

    def refuse(**_: Any) -> None:
        raise ray.exceptions.AuthenticationError("InvalidAuthToken: Authentication failed")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr("tuning.sweep.cluster.check_cluster", lambda address: None)
    monkeypatch.setattr("tuning.sweep.cluster.show_token", lambda: None)
    with pytest.raises(UserError, match="does not accept this machine's token, so copy") as error:
        connect_ray("head:6379")
    assert "\n" not in str(error.value)


def test_trials_on_a_cluster_log_in_as_the_driver_does(
    study: StudyTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import cloudpickle

    from tuning.sweep import ray_tune, worker

    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ["MLFLOW_TRACKING_PASSWORD"] = "cluster-password"
    made: dict[str, Any] = {}
    monkeypatch.setattr(ray_tune.tune, "with_parameters", lambda f, **given: made.update(given))
    monkeypatch.setattr(ray_tune.tune, "with_resources", lambda bound, share: bound)
    resources: Any = SimpleNamespace(threads=1, gpus=0.0, cpus=1.0)
    for address in (None, "auto"):
        options = Options(run=RunOptions(address=address))
        job = Job(Study("s", (trial(0),)), options, {}, study, "", resources)
        ray_tune._trainable(job, "session")
        sent = made["setting"].environment
        assert ("MLFLOW_TRACKING_PASSWORD" in sent) == bool(address)
        assert b"cluster-password" not in cloudpickle.dumps(job)
    assert "cluster-password" not in repr(made["setting"])
    del os.environ["MLFLOW_TRACKING_PASSWORD"]
    world = SimpleNamespace(to=lambda device: None)
    worlds: Any = {trial(0).world.hash: world}
    monkeypatch.setattr(worker, "take_share", lambda *_: None)
    monkeypatch.setattr(worker, "attempt", lambda *_: {})
    monkeypatch.setattr("ray.tune.report", lambda found: None)
    worker.ray_trainable({"trial": trial(0)}, worlds, made["setting"])
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "cluster-password"


def test_the_final_value_of_the_best_generator_is_no_point_of_its_curve() -> None:
    curve = {"val/accuracy": [(10, 0.2), (20, 0.3), (21, 0.9)]}
    one = TrialResult("t", "c", 0, "FINISHED", {}, curve, {"steps": "20"})
    (group,) = group_trials([one])
    assert one.metrics == {} and group.curves("val/accuracy") == [{10: 0.2, 20: 0.3}]


def test_a_report_of_many_configurations_shows_the_best_and_what_they_are_compared_with(
    tmp_path: Path,
) -> None:
    trials, by_task = [], {}
    for place in range(26):
        params = {"model_size": "nano", "lambda_weight": "1", "lambda_delta": str(place)}
        accuracy = place / 100
        metrics = {"heldout/accuracy": accuracy, "val/accuracy": accuracy}
        curves = {"val/accuracy": [(1, accuracy)]}
        by_task[f"run{place}"] = {"a": accuracy}
        one = TrialResult(f"t{place}", f"c{place}", 0, "FINISHED", metrics, curves, params)
        trials.append(replace(one, run_id=f"run{place}"))
    record = StudyRecord("study", tuple(trials), {}, by_task)
    shown = [group.config for group in tables.notable(record.by_rank)]
    assert shown == [*(f"c{place}" for place in range(25, 17, -1)), "c0"]
    write_report(tmp_path, record)
    text = (tmp_path / "report.md").read_text()
    assert text.count("Shown are 9 of 26 configurations") == 2
    assert "| c18 " in text and len(text.partition("\n## ")[0]) < 6000


def test_the_tables_of_the_pages_are_sorted_by_the_number_that_decides() -> None:
    from tuning.ui import curves_state, summary_state, view_state

    for state in (view_state(flat=True), curves_state(), summary_state()):
        assert state["orderByKey"] == "metrics.`heldout/accuracy`" and not state["orderByAsc"]
        assert state["selectedColumns"][0] == "metrics.`heldout/accuracy`"
    assert curves_state()["groupBy"]["aggregateFunction"] == "average"
    assert all(chart["type"] == "LINE" for chart in curves_state()["compareRunCharts"])
