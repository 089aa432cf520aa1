"""The registry against a real store: who becomes champion, what a version carries, how it is fetched."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import torch
from formats import FOLDER
from made_study import accuracies
from safetensors.torch import save_file

from llgbm.runtime import UserError
from tuning.registry import Score, fetch_bundle, load_bundle, register_generator
from tuning.registry.champions import (
    champion_history,
    promote,
    rollback,
)
from tuning.registry.fetch import COPY, LOCK
from tuning.registry.versions import RegisteredVersion, aliases_of
from tuning.tracking.study import StudyTracker
from tuning.tracking.trial import TrialTracker

NAME = "llgbm-generator"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    save_file({"weight": torch.arange(6.0).reshape(2, 3)}, folder / "generator.safetensors")
    described = {
        "size": "tiny",
        "base_hash": "base1",
        "bank_hash": "bank1",
        "encoder": "minilm",
        "rank": 4,
    }
    (folder / "generator.json").write_text(json.dumps(described))
    return folder


@pytest.fixture
def study(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> StudyTracker:
    shutil.copytree(empty_store, tmp_path / "mlruns")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    tracker = StudyTracker.open(None, tmp_path, "ablation")
    tracker.begin("study", "id", {}, {})
    return tracker


def register(
    study: StudyTracker,
    bundle: Path,
    score: float = 0.5,
    data: str = "val1",
    name: str = NAME,
    **changed: object,
) -> RegisteredVersion:
    assert study.target is not None
    run_id = TrialTracker.open(study.target, f"t{score}", "multitask", {"seed": 0}, {}).run_id
    tags = {
        "llgbm.study": "study",
        "llgbm.val_data": data,
        "llgbm.study_id": "id",
        "llgbm.trial_id": f"t{score}",
    }
    given: dict = {"metric": "val/accuracy", "per_task": accuracies(score), **changed}
    return register_generator(study.tracking_uri, run_id, bundle, name, tags, Score(score, **given))


def champion(study: StudyTracker, alias: str = "champion") -> str:
    return str(study.client.get_model_version_by_alias(NAME, alias).version)


def test_a_deleted_champion_is_still_the_one_to_beat(study: StudyTracker, bundle: Path) -> None:
    register(study, bundle, 0.4)
    register(study, bundle, 0.6)
    assert champion(study) == "2"
    study.client.delete_model_version(NAME, "2")
    assert register(study, bundle, 0.5).alias == "challenger"
    text = study.client.get_model_version(NAME, "3").description or ""
    assert "version 2 (deleted since)" in text and "not shown to be better: -0.100" in text
    assert champion_history(study.client, NAME) == ["1", "2"]
    assert register(study, bundle, 0.7).alias == "champion"
    assert champion_history(study.client, NAME) == ["1", "2", "4"]
    assert rollback(study.client, NAME).version == "1"


def test_a_deleted_champion_of_an_older_store_is_not_replaced_untested(
    study: StudyTracker, bundle: Path
) -> None:
    register(study, bundle, 0.4)
    study.client.delete_registered_model_tag(NAME, "llgbm.last_champion")
    study.client.delete_model_version(NAME, "1")
    assert register(study, bundle, 0.5).alias == "challenger"
    assert promote(study.client, f"{NAME}/2").version == "2" and champion(study) == "2"


def test_a_version_names_where_it_came_from(study: StudyTracker, bundle: Path) -> None:
    made = register(study, bundle, 0.5)
    assert made == RegisteredVersion(NAME, "1", "champion") and made.uri == f"models:/{NAME}/1"
    found = study.client.get_model_version_by_alias(NAME, "champion")
    wanted = {"llgbm.size": "tiny", "llgbm.base_hash": "base1", "llgbm.bank_hash": "bank1"}
    wanted |= {"llgbm.encoder": "minilm", "llgbm.study": "study", "llgbm.run_id": str(found.run_id)}
    wanted |= {
        "llgbm.val_score": "0.5",
        "llgbm.val_metric": "val/accuracy",
        "llgbm.val_data": "val1",
    }
    wanted |= {"llgbm.study_id": "id", "llgbm.trial_id": "t0.5", "llgbm.registered_as": "champion"}
    assert json.loads(found.tags.pop("llgbm.val_per_task")) == pytest.approx(accuracies(0.5))
    assert found.tags == wanted
    for part in ("study", found.run_id, "base1", "bank1", "val/accuracy = 0.5000", "val1"):
        assert part in (found.description or "")
    run = study.client.get_run(found.run_id)
    assert run.data.tags["llgbm.trial_id"] == "t0.5"
    (output,) = run.outputs.model_outputs
    logged = study.client.get_logged_model(output.model_id)
    assert logged.status == "READY" and logged.artifact_location == found.source


def test_the_run_keeps_its_status_and_nothing_becomes_active(
    study: StudyTracker, bundle: Path
) -> None:
    assert study.target is not None
    trial = TrialTracker.open(study.target, "t0.5", "multitask", {"seed": 0}, {})
    study.finish_trial("t0.5", "KILLED")
    before = study.client.get_run(trial.run_id).info
    tags = {"llgbm.val_data": "val1", "llgbm.study_id": "id", "llgbm.trial_id": "t0.5"}
    register_generator(
        study.tracking_uri,
        trial.run_id,
        bundle,
        NAME,
        tags,
        Score(0.5, "val/accuracy", accuracies(0.5)),
    )
    after = study.client.get_run(trial.run_id).info
    assert (after.status, after.end_time) == ("KILLED", before.end_time)
    assert mlflow.active_run() is None
    assert len(study.client.search_runs([study.experiment_id])) == 2
    assert list(Path.cwd().iterdir()) == []


def test_champions_follow_one_another_only_when_beaten(study: StudyTracker, bundle: Path) -> None:
    assert register(study, bundle, 0.5).alias == "champion"
    assert register(study, bundle, 0.4).alias == "challenger"
    assert register(study, bundle, 0.9, "val2").alias == "challenger"
    assert champion(study) == "1" and champion(study, "challenger") == "3"
    study.client.delete_run(study.client.get_model_version(NAME, "1").run_id)
    assert register(study, bundle, 0.6).alias == "champion"
    assert champion(study) == "4" and champion_history(study.client, NAME) == ["1", "4"]
    texts = [study.client.get_model_version(NAME, number).description or "" for number in "1234"]
    assert "Registered as champion. There was no champion before." in texts[0]
    assert (
        "Registered as challenger" in texts[1]
        and "not shown to be better: -0.100 over 8 tasks" in texts[1]
    )
    assert "other validation data (val1)" in texts[2] and "val2" in texts[2]
    assert (
        "version 1, had val/accuracy = 0.5000; this one is better: +0.100 over 8 tasks" in texts[3]
    )


def test_the_same_trial_is_registered_once(study: StudyTracker, bundle: Path) -> None:
    first = register(study, bundle, 0.5)
    register(study, bundle, 0.6)
    assert register(study, bundle, 0.5) == first and champion(study) == "2"
    assert len(study.client.search_model_versions(f"name = '{NAME}'")) == 2
    assert len(study.client.search_logged_models([study.experiment_id])) == 2


# Every call that changes the store is a place to die: before call k the process ends as if killed.
_KILLED = """
import os, sys
from pathlib import Path
from mlflow import MlflowClient
from tuning.registry import Score, register_generator
uri, run_id, bundle, other = sys.argv[1:]
calls = 0
def register(uri, run_id, name):
    tags = {"llgbm.val_data": "val1", "llgbm.study_id": "id", "llgbm.trial_id": name}
    register_generator(uri, run_id, Path(bundle), name, tags, Score(0.5, "val/accuracy", {"a": 0.5, "b": 0.5}))
def dies(method, last):
    def call(*arguments, **named):
        global calls
        calls += 1
        if calls == last:
            os._exit(9)
        return method(*arguments, **named)
    return call
def attempt(stage, last):
    if not (pid := os.fork()):
        verbs = ("create_", "log_model_artifacts", "finalize_", "log_outputs", "set_", "update_", "delete_")
        for name in dir(MlflowClient):
            if name.startswith(verbs):
                setattr(MlflowClient, name, dies(getattr(MlflowClient, name), last))
        register(uri, run_id, f"model-{stage}")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
register(other, MlflowClient(other).create_run("0").info.run_id, "imports-what-is-needed")
stage, killed = 0, True
while killed:
    stage += 1
    killed = attempt(stage, stage) == 9
    assert attempt(stage, None) == 0, stage
print(stage - 1)
"""


@pytest.mark.whole
def test_a_registration_killed_at_any_point_is_finished_by_the_next(
    study: StudyTracker, bundle: Path, empty_store: Path, tmp_path: Path
) -> None:
    shutil.copytree(empty_store, tmp_path / "other")
    run_id = TrialTracker.open(study.target, "t", "multitask", {"seed": 0}, {}).run_id  # type: ignore[arg-type]
    other = f"sqlite:///{tmp_path}/other/mlflow.db"
    command = [sys.executable, "-c", _KILLED, study.tracking_uri, run_id, str(bundle), other]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    stages = int(done.stdout)
    assert stages >= 10
    models = study.client.search_logged_models([study.experiment_id])
    outputs = [output.model_id for output in study.client.get_run(run_id).outputs.model_outputs]
    assert len(models) == len(set(outputs)) == len(outputs) == stages + 1
    for stage in range(1, stages + 2):
        (version,) = study.client.search_model_versions(f"name = 'model-{stage}'")
        registered = study.client.get_registered_model(f"model-{stage}")
        assert aliases_of(study.client, registered.name) == {"champion": str(version.version)}
        assert registered.tags["llgbm.champions"] == '["1"]'
        assert version.status == "READY" and version.tags["llgbm.registered_as"] == "champion"
        (model,) = [model for model in models if model.name == f"model-{stage}"]
        assert model.status == "READY" and model.artifact_location == version.source
        assert (
            fetch_bundle(f"models:/model-{stage}@champion", study.tracking_uri)
            / "generator.safetensors"
        ).is_file()


def test_a_failed_upload_is_not_used_and_leaves_nothing(
    study: StudyTracker, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(type(study.client), "log_model_artifacts", _no_space)
        with pytest.raises(UserError, match="free some disk space"):
            register(study, bundle)
    assert [model.status for model in study.client.search_logged_models([study.experiment_id])] == [
        "FAILED"
    ]
    assert register(study, bundle).alias == "champion"
    assert [model.status for model in study.client.search_logged_models([study.experiment_id])] == [
        "READY"
    ]


def _no_space(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


def test_promotion_by_hand_and_back(study: StudyTracker, bundle: Path) -> None:
    for score in (0.5, 0.4, 0.7):
        register(study, bundle, score)
    assert champion(study) == "3" and champion_history(study.client, NAME) == ["1", "3"]
    assert promote(study.client, f"{NAME}@challenger").version == "2" and champion(study) == "2"
    assert aliases_of(study.client, NAME) == {"champion": "2"}
    assert rollback(study.client, NAME).version == "3"
    assert rollback(study.client, NAME).version == "1" and champion(study) == "1"
    with pytest.raises(UserError, match="no earlier champion"):
        rollback(study.client, NAME)
    with pytest.raises(UserError, match="version 1 .* champion already"):
        promote(study.client, f"{NAME}/1")
    with pytest.raises(UserError, match="no model 'nobody'"):
        rollback(study.client, "nobody")
    assert (
        promote(study.client, f"models:/{NAME}/3").version == "3"
        and champion_history(study.client, NAME)[-1] == "3"
    )


def test_rollback_passes_over_what_is_gone_and_mends_a_history_that_a_kill_left(
    study: StudyTracker, bundle: Path
) -> None:
    for score in (0.4, 0.5, 0.6):
        register(study, bundle, score)
    study.client.delete_model_version(NAME, "2")
    study.client.set_registered_model_tag(NAME, "llgbm.champions", '["1", "2", "3", "9"]')
    assert champion_history(study.client, NAME) == ["1", "2", "3"]
    assert rollback(study.client, NAME).version == "1"


def test_the_model_carries_its_code_pins_and_signature(study: StudyTracker, bundle: Path) -> None:
    register(study, bundle)
    folder = fetch_bundle(f"models:/{NAME}/1", study.tracking_uri).parent.parent
    assert (folder / "code/llgbm/runtime.py").is_file()
    assert not list(folder.rglob("*.pyc")) and not list(folder.rglob("*.pkl"))
    pins = (folder / "requirements.txt").read_text().splitlines()
    assert f"torch=={torch.__version__.partition('+')[0]}" in pins
    assert all("==" in pin for pin in pins)
    signature = mlflow.models.Model.load(str(folder / "MLmodel")).signature
    assert signature is not None
    assert signature.inputs.input_names() == ["prompts"]
    assert signature.outputs.input_names() == ["adapter_safetensors_base64", "adapter_config"]
    assert (folder / "input_example.json").is_file()


@pytest.mark.parametrize("address", [f"models:/{NAME}@champion", f"models:/{NAME}/1"])
def test_a_registered_bundle_is_fetched_bit_by_bit(
    study: StudyTracker, bundle: Path, address: str
) -> None:
    register(study, bundle)
    folder = fetch_bundle(address, study.tracking_uri)
    assert folder != bundle and "artifacts/bundle" in folder.as_posix()
    for name in ("generator.safetensors", "generator.json"):
        assert (folder / name).read_bytes() == (bundle / name).read_bytes()
    (folder / "generator.json").write_text("{}")
    assert "tiny" in (fetch_bundle(address, study.tracking_uri) / "generator.json").read_text()


def test_no_copy_of_a_generator_outlives_its_use(
    study: StudyTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = register(study, FOLDER / "bundles" / "default").uri
    place, uri = tmp_path / "temporary", study.tracking_uri
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    assert load_bundle(address, uri).facts["registered"] == f"{NAME}/1"
    with pytest.raises(UserError, match="no version 7"):
        load_bundle(f"models:/{NAME}/7", uri)
    assert not list(place.iterdir())
    (place / f"{COPY}left").mkdir()
    (place / f"{COPY}left{LOCK}").touch()  # the system gave it back when its process was killed
    fetched = [fetch_bundle(address, uri) for _ in range(2)]
    assert fetched[0] != fetched[1] and all((own / "generator.json").is_file() for own in fetched)
    kept = {path.name for path in place.iterdir()}
    assert len(kept) == 4 and not kept & {f"{COPY}left", f"{COPY}left{LOCK}"}


def test_the_store_can_come_from_the_environment_or_the_folder(
    study: StudyTracker, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = register(study, bundle).uri
    with pytest.raises(UserError, match="no MLflow store at sqlite:///"):
        fetch_bundle(address, None)
    assert list(Path.cwd().iterdir()) == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", study.tracking_uri)
    assert (fetch_bundle(address, None) / "generator.json").is_file()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    assert (fetch_bundle(address, None) / "generator.json").is_file()


def test_a_folder_is_its_own_bundle(bundle: Path) -> None:
    assert fetch_bundle(str(bundle), None) == bundle


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("models:/nobody@champion", f"no model 'nobody': it has {NAME}"),
        (f"models:/{NAME}@winner", "no alias 'winner'.*versions 1 and the aliases champion"),
        (f"models:/{NAME}/7", "no version 7.*versions 1"),
        (f"models:/{NAME}", "no model address"),
        (f"models:/{NAME}/latest", "no model address"),
        ("models:/a'b@champion", "cannot be named"),
        ("nowhere/at/all", "holds no generator.*generator.json"),
    ],
)
def test_what_does_not_exist_is_named(
    study: StudyTracker, bundle: Path, address: str, message: str
) -> None:
    register(study, bundle)
    with pytest.raises(UserError, match=message) as error:
        fetch_bundle(address, study.tracking_uri)
    assert "\n" not in str(error.value)


def test_what_cannot_be_registered_is_refused_before_anything_is_stored(
    study: StudyTracker, bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="holds no generator"):
        register(study, tmp_path)
    with pytest.raises(UserError, match="cannot be named"):
        register(study, bundle, name="a/b")
    with pytest.raises(ValueError, match="llgbm.val_data"):
        register(study, bundle, data="")
    for per_task in ({}, {"a": float("nan")}):
        with pytest.raises(ValueError, match="finite score"):
            register(study, bundle, per_task=per_task)
    assert not study.client.search_registered_models()
    assert not study.client.search_logged_models([study.experiment_id])
