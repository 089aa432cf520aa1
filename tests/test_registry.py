"""The registry against a real store: who becomes champion, what a version carries, how it is fetched."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch
from safetensors.torch import load, save_file

from llgbm.runtime import UserError
from tuning.registry import (
    Champion,
    RegisteredVersion,
    current_champion,
    decide_alias,
    fetch_bundle,
    register_generator,
)
from tuning.tracking import StudyTracker, TrialTracker

NAME = "llgbm-generator"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    save_file({"weight": torch.arange(6.0).reshape(2, 3)}, folder / "generator.safetensors")
    described = {"size": "tiny", "base_hash": "base1", "bank_hash": "bank1", "encoder": "minilm", "rank": 4}
    (folder / "generator.json").write_text(json.dumps(described))
    return folder


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyTracker:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    tracker = StudyTracker.open(None, tmp_path, "ablation")
    tracker.begin("study", "id", {}, {})
    return tracker


def register(
    study: StudyTracker, bundle: Path, score: float = 0.5, data: str = "val1", name: str = NAME
) -> RegisteredVersion:
    assert study.target is not None
    run_id = TrialTracker.open(study.target, f"t{score}", "multitask", {"seed": 0}, {}).run_id
    beaten = decide_alias(current_champion(study.tracking_uri, name), score, data, "val/accuracy") == "champion"
    tags = {"llgbm.study": "study", "llgbm.val_data": data}
    return register_generator(study.tracking_uri, run_id, bundle, name, tags, score, "val/accuracy", beaten)


def champion(score: str = "0.5", data: str = "val1") -> Champion:
    return Champion("3", "run", {"llgbm.val_score": score, "llgbm.val_data": data, "llgbm.val_metric": "val/accuracy"})


@pytest.mark.parametrize(
    ("old", "score", "data", "alias"),
    [
        (None, 0.0, "val1", "champion"),
        (champion("0.5"), 0.6, "val1", "champion"),
        (champion("0.5"), 0.5, "val1", "challenger"),
        (champion("0.5"), 0.4, "val1", "challenger"),
        (champion("0.5"), 0.9, "val2", "challenger"),
        (Champion("3", "run", {"llgbm.val_data": "val1"}), 0.9, "val1", "challenger"),
        (Champion("3", "run", {}), 0.9, "", "challenger"),
    ],
)
def test_the_alias_is_decided_on_the_same_data(old: Champion | None, score: float, data: str, alias: str) -> None:
    assert decide_alias(old, score, data, "val/accuracy") == alias


def test_a_champion_by_another_metric_stays() -> None:
    assert decide_alias(champion("0.5"), 0.9, "val1", "val/delta_cosine") == "challenger"


def test_a_score_that_is_no_number_ranks_nothing() -> None:
    with pytest.raises(ValueError, match="finite"):
        decide_alias(None, float("nan"), "val1", "val/accuracy")


def test_a_version_names_where_it_came_from(study: StudyTracker, bundle: Path) -> None:
    made = register(study, bundle, 0.5)
    assert made == RegisteredVersion(NAME, "1", "champion") and made.uri == f"models:/{NAME}/1"
    found = study.client.get_model_version_by_alias(NAME, "champion")
    wanted = {"llgbm.size": "tiny", "llgbm.base_hash": "base1", "llgbm.bank_hash": "bank1"}
    wanted |= {"llgbm.encoder": "minilm", "llgbm.study": "study", "llgbm.run_id": str(found.run_id)}
    wanted |= {"llgbm.val_score": "0.5", "llgbm.val_metric": "val/accuracy", "llgbm.val_data": "val1"}
    assert found.tags == wanted
    for part in ("study", found.run_id, "base1", "bank1", "val/accuracy = 0.5000", "val1"):
        assert part in (found.description or "")
    run = study.client.get_run(found.run_id)
    assert run.data.tags["llgbm.trial_id"] == "t0.5"
    (output,) = run.outputs.model_outputs
    logged = study.client.get_logged_model(output.model_id)
    assert logged.status == "READY" and logged.artifact_location == found.source


def test_the_run_keeps_its_status_and_nothing_becomes_active(study: StudyTracker, bundle: Path) -> None:
    assert study.target is not None
    trial = TrialTracker.open(study.target, "t0.5", "multitask", {"seed": 0}, {})
    study.finish_trial("t0.5", "KILLED")
    before = study.client.get_run(trial.run_id).info
    tags = {"llgbm.val_data": "val1"}
    register_generator(study.tracking_uri, trial.run_id, bundle, NAME, tags, 0.5, "val/accuracy", True)
    after = study.client.get_run(trial.run_id).info
    assert (after.status, after.end_time) == ("KILLED", before.end_time)
    assert mlflow.active_run() is None
    assert len(study.client.search_runs([study.experiment_id])) == 2
    assert list(Path.cwd().iterdir()) == []


def test_champions_follow_one_another_only_when_beaten(study: StudyTracker, bundle: Path) -> None:
    assert current_champion(study.tracking_uri, NAME) is None
    assert register(study, bundle, 0.5).alias == "champion"
    assert register(study, bundle, 0.4).alias == "challenger"
    assert register(study, bundle, 0.9, "val2").alias == "challenger"
    first = current_champion(study.tracking_uri, NAME)
    assert first is not None and (first.version, first.score, first.val_data) == ("1", 0.5, "val1")
    unlike = study.client.get_model_version_by_alias(NAME, "challenger").description or ""
    assert "cannot be compared" in unlike and "val1" in unlike and "val2" in unlike
    assert register(study, bundle, 0.6).alias == "champion"
    last = current_champion(study.tracking_uri, NAME)
    assert last is not None and last.version == "4" and last.run_id != first.run_id
    assert "version 1, had 0.5" in (study.client.get_model_version(NAME, "4").description or "")


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
def test_a_registered_bundle_is_fetched_bit_by_bit(study: StudyTracker, bundle: Path, address: str) -> None:
    register(study, bundle)
    folder = fetch_bundle(address, study.tracking_uri)
    assert folder != bundle and "artifacts/bundle" in folder.as_posix()
    for name in ("generator.safetensors", "generator.json"):
        assert (folder / name).read_bytes() == (bundle / name).read_bytes()
    (folder / "generator.json").write_text("{}")
    assert "tiny" in (fetch_bundle(address, study.tracking_uri) / "generator.json").read_text()


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
def test_what_does_not_exist_is_named(study: StudyTracker, bundle: Path, address: str, message: str) -> None:
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
    assert not study.client.search_registered_models()
    assert not study.client.search_logged_models([study.experiment_id])


class WordBundle:
    """A real generator of adapters, small enough to check by hand: the weight counts the words of the prompts."""

    def generate(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        count = float(sum(len(prompt.split()) for prompt in prompts))
        return {"layer.lora_A.weight": torch.full((3, 2), count).T, "layer.lora_B.weight": torch.ones(3, 2)}

    def adapter_config(self) -> dict[str, object]:
        return {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}


def predict(*prompts: str) -> pd.DataFrame:
    from tuning.pyfunc_generator import GeneratorModel

    model = GeneratorModel()
    model.bundle = WordBundle()  # type: ignore[assignment]
    return model.predict(None, pd.DataFrame({"prompts": list(prompts)}))


def test_each_row_becomes_one_adapter() -> None:
    answer = predict(json.dumps(["one two", "three"]), json.dumps(["one"]))
    states = [load(base64.b64decode(text)) for text in answer["adapter_safetensors_base64"]]
    assert [state["layer.lora_A.weight"].tolist() for state in states] == [[[3.0] * 3] * 2, [[1.0] * 3] * 2]
    assert json.loads(answer["adapter_config"][1]) == WordBundle().adapter_config()


@pytest.mark.parametrize("bad", ["give the first word", "[]", '["a", 3]', '{"a": 1}', '["  "]'])
def test_rows_that_are_no_prompts_are_named(bad: str) -> None:
    with pytest.raises(ValueError, match="row 1: `prompts` must be a JSON list"):
        predict('["fine"]', bad)
