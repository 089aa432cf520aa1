"""Bases by revision of the hub, and generators with the base and encoder that they were trained with; all offline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import rows, write_rows
from huggingface_hub import snapshot_download
from peft import PeftConfig
from safetensors.torch import load_file, save_file

from llgbm.__main__ import main
from llgbm.generator import GeneratorConfig, make_generator
from llgbm.generator.bundle import GeneratorBundle
from llgbm.generator.conditions import encoder_hash
from llgbm.generator.networks import Standardiser
from llgbm.lora import LoraBatch, LoraSpec
from llgbm.lora.adapters import adapter_config, save_adapter
from llgbm.models.load import Base, BaseSource, find_model, load_base
from llgbm.runtime import UserError
from llgbm.world import WorldConfig
from tuning.studies.spec import TrialSpec

FIRST, SECOND = "a" * 40, "b" * 40


def moved_base(source: Path, folder: Path) -> Path:
    """A base of the same shapes with other weights."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def hub(tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with two commits of one base, `main` at the first, a tag at the second; and no network."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--me--tiny"
    shutil.copytree(tiny_base.path, repository / "snapshots" / FIRST)
    moved_base(Path(tiny_base.path), repository / "snapshots" / SECOND)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(FIRST)
    (repository / "refs" / "v2").write_text(SECOND)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return repository


def trial_id(name: str) -> str:
    from llgbm.training import TrainingConfig

    config = TrainingConfig(model_size="base-tiny")
    return TrialSpec("x", config, WorldConfig("base-tiny", base=BaseSource.find(name))).id


def test_a_name_is_pinned_to_the_commit_that_was_found(hub: Path, tiny_base: Base) -> None:
    wanted = {"": FIRST, "@main": FIRST, "@v2": SECOND, f"@{FIRST}": FIRST, f"@{SECOND}": SECOND}
    for revision, commit in wanted.items():
        source = BaseSource.find(f"me/tiny{revision}")
        assert source.path == f"me/tiny@{commit}"
        assert (source.hash == tiny_base.hash) == (commit == FIRST)
    for unknown in ("@v3", f"@{'c' * 40}"):
        with pytest.raises(UserError, match="not in the hub's cache"):
            BaseSource.find(f"me/tiny{unknown}")


def test_a_hub_that_is_switched_off_is_not_asked(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*names: str, local_files_only: bool, **more: Any) -> str:
        assert local_files_only, names
        return snapshot_download(*names, local_files_only=True, **more)

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    assert find_model(f"me/tiny@{SECOND}") == hub / "snapshots" / SECOND


def test_a_revision_is_part_of_an_id_by_its_content(hub: Path, tiny_base: Base) -> None:
    first, second = trial_id(f"me/tiny@{FIRST}"), trial_id("me/tiny@v2")
    assert first == trial_id("me/tiny") == trial_id(tiny_base.path) != second
    planned = BaseSource.find("me/tiny")
    (hub / "refs" / "main").write_text(SECOND)
    assert trial_id("me/tiny") == second
    # What was planned stays what it was.
    assert planned.load("cpu").hash == tiny_base.hash


def test_an_adapter_keeps_the_revision_of_its_base(
    hub: Path, tiny_spec: LoraSpec, tiny_adapters: LoraBatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = load_base("me/tiny@v2")
    save_adapter(
        Path("adapter"), tiny_adapters.to_state_dicts()[0], adapter_config(tiny_spec, base.path)
    )
    read = PeftConfig.from_pretrained("adapter")
    assert (read.base_model_name_or_path, read.revision) == ("me/tiny", SECOND)
    assert find_model(f"{read.base_model_name_or_path}@{read.revision}").name == SECOND
    write_rows(Path(), "river", rows("river", 40))
    command = ["evaluate", "--data", ".", "--tasks", "river", "--examples", "2"]
    assert main([*command, "--adapter", "adapter", "--max-tokens", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["base"] == f"me/tiny@{SECOND}"


def taken(revision: str, *more: str) -> int:
    command = ["bank", "import", "adapter", "--base", f"me/tiny{revision}", "--task", "river"]
    return main([*command, "--out", "bank", "--trajectories", "1", "--max-tokens", "2", *more])


def test_an_adapter_of_another_revision_is_not_taken_for_one_of_this(
    hub: Path, tiny_spec: LoraSpec, tiny_adapters: LoraBatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = adapter_config(tiny_spec, f"me/tiny@{SECOND}")
    save_adapter(Path("adapter"), tiny_adapters.to_state_dicts()[0], config)
    prompts = {"train": ["a b", "c d"], "evaluation": ["e f"]}
    (Path("adapter") / "prompts.json").write_text(json.dumps(prompts))
    assert taken("") == 2
    said = capsys.readouterr().err
    assert f"made for me/tiny@{SECOND}" in said and not Path("bank").exists()
    assert taken("", "--accept-base", f"me/tiny@{SECOND}") == 0
    shutil.rmtree("bank")
    assert taken("@v2") == 0
    manifest = json.loads((Path("bank") / "manifest.json").read_text())
    assert manifest["base"]["path"] == f"me/tiny@{SECOND}"


def encoder_folder(folder: Path, seed: int) -> Path:
    """A random sentence encoder of two layers."""
    from sentence_transformers import SentenceTransformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    bare = folder.with_name(f"{folder.name}-bert")
    bare.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "reverse", "apple", "river"]
    (bare / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(bare / "vocab.txt")).save_pretrained(bare)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), intermediate_size=32, **sizes)).save_pretrained(
        bare
    )
    SentenceTransformer(str(bare)).save(str(folder))  # of a bare model: its mean
    return folder


def bundle_of(
    folder: Path, base: Base, spec: LoraSpec, adapters: LoraBatch, encoder: str, width: int
) -> Path:
    folder.mkdir()
    config = GeneratorConfig(hidden=8)
    standardiser = Standardiser.fit(adapters.flatten(spec))
    facts = {
        "size": "tiny",
        "base_path": base.path,
        "base_hash": base.hash,
        "bank_hash": "b",
        "encoder": encoder,
        "encoder_hash": encoder_hash(encoder.removeprefix("minilm:")),
    }
    generator = make_generator(config, spec, width, standardiser, seed=0)
    GeneratorBundle.save(folder, generator, config, facts)
    return folder


def served_answer(bundle: GeneratorBundle) -> Any:
    import pandas as pd

    from tuning.registry.served import GeneratorModel

    model = GeneratorModel()
    model.bundle = bundle
    return model.predict(None, pd.DataFrame({"prompts": ['["reverse apple"]']}))


def test_a_generator_needs_the_encoder_that_it_was_trained_with(
    tiny_base: Base, tiny_spec: LoraSpec, tiny_adapters: LoraBatch, tmp_path: Path
) -> None:
    """A folder of the same name and shapes with other weights is refused wherever prompts are encoded."""
    from mlflow.exceptions import MlflowException

    encoder = encoder_folder(tmp_path / "encoder", 0)
    folder = bundle_of(
        tmp_path / "bundle", tiny_base, tiny_spec, tiny_adapters, f"minilm:{encoder}", 16
    )
    before = GeneratorBundle.load(folder).generate(["reverse apple"])
    assert len(served_answer(GeneratorBundle.load(folder))) == 1
    shutil.rmtree(encoder)
    shutil.move(encoder_folder(tmp_path / "other", 1), encoder)
    with pytest.raises(UserError, match="is not the one that this generator was trained with"):
        GeneratorBundle.load(folder).generate(["reverse apple"])
    with pytest.raises(MlflowException, match="is not the one that this generator was trained"):
        served_answer(GeneratorBundle.load(folder))
    (tmp_path / "prompts.txt").write_text("reverse apple\n")
    command = ["generate", "--model", str(folder), "--prompts", str(tmp_path / "prompts.txt")]
    assert main([*command, "--out", str(tmp_path / "made")]) == 2
    assert not (tmp_path / "made").exists() and before


def test_a_generator_that_encodes_by_its_base_needs_that_base(
    tiny_base: Base, tiny_spec: LoraSpec, tiny_adapters: LoraBatch, tmp_path: Path
) -> None:
    own = load_base(shutil.copytree(tiny_base.path, tmp_path / "base"))
    name = f"base:{own.hash}"
    folder = bundle_of(tmp_path / "bundle", own, tiny_spec, tiny_adapters, name, 32)
    assert GeneratorBundle.load(folder).generate(["reverse"])
    shutil.rmtree(tmp_path / "base")
    moved_base(Path(tiny_base.path), tmp_path / "base")
    with pytest.raises(UserError, match=r"trained for the base .* \(other files\)"):
        GeneratorBundle.load(folder).generate(["reverse"])


def test_a_generator_is_not_scored_on_another_base_of_the_same_shapes(
    tiny_base: Base,
    tiny_spec: LoraSpec,
    tiny_adapters: LoraBatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = f"base:{tiny_base.hash}"
    folder = bundle_of(tmp_path / "bundle", tiny_base, tiny_spec, tiny_adapters, own, 32)
    other = moved_base(Path(tiny_base.path), tmp_path / "other")
    write_rows(tmp_path, "river", rows("river", 40))
    command = ["evaluate", "--data", str(tmp_path), "--tasks", "river", "--examples", "2"]
    command += ["--generator", str(folder), "--max-tokens", "2", "--base"]
    assert main([*command, str(other)]) == 2
    assert "trained for the base" in capsys.readouterr().err
    assert main([*command, tiny_base.path]) == 0
