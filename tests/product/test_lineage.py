"""An adapter says where it comes from, in its weights and on its card, and is checked against that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from output_checks import CONFIG, WEIGHTS, one_sentence
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from scipy import stats
from transformers import AutoModelForCausalLM

from llgbm.__main__ import main
from llgbm.generator.bundle import GeneratorBundle
from llgbm.lora import LoraBatch
from llgbm.lora.adapters import adapter_config
from llgbm.lora.apply import adapters_applied
from llgbm.lora.external import read_external
from llgbm.models.load import Base
from llgbm.system.lineage import card, config_hash, portable_base, weights_hash
from tuning.sweep.artifacts import heldout_facts

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HELDOUT = {"accuracy": 0.53, "interval": [0.45, 0.61], "tasks": 24}


@pytest.fixture
def adapter(commands: Any, user: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """An adapter as `generate` writes it."""
    assert main([*commands["generate"], "--out", "adapter"]) == 0
    capsys.readouterr()
    return user / "adapter"


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["show", *arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_show_reads_back_what_generate_wrote(
    adapter: Path, bundle: Path, tiny_base: Base, capsys: Any
) -> None:
    found = shown(capsys, str(adapter))
    lineage = found["lineage"]
    assert found["files"] == "weights and config are those that the lineage names"
    assert found["base_files"].endswith("are the ones that the adapter was made for")
    assert lineage["base"]["hash"] == tiny_base.hash and lineage["bank"] == {"hash": "b"}
    assert lineage["base"]["name"] == Path(tiny_base.path).name
    assert lineage["prompts"]["count"] == 1 and len(lineage["prompts"]["sha256"]) == 64
    assert lineage["generator"]["hash"] == GeneratorBundle.load(bundle).facts["generator_hash"]
    with safe_open(adapter / WEIGHTS, "pt") as file:
        assert json.loads(file.metadata()["llgbm"]) == lineage
    assert main(["show", str(adapter)]) == 0
    text = capsys.readouterr().out
    assert lineage["generator"]["hash"] in text and "generator hash" in text


def test_the_card_is_read_by_the_hubs_own_reader(adapter: Path, tiny_base: Base) -> None:
    read = ModelCard.load(adapter / "README.md")
    assert read.data.library_name == "peft" and read.data.tags == ["llgbm", "lora"]
    assert read.data.base_model is None and tiny_base.hash in read.text


def test_a_card_of_a_hub_base_names_it_with_licence_and_accuracy(
    bundle: Path, tiny_spec: Any
) -> None:
    made = GeneratorBundle.load(bundle)
    made.facts.update(
        base_path=f"Qwen/Qwen2.5-0.5B@{COMMIT}", base_license="apache-2.0", heldout=HELDOUT
    )
    made.facts.update(registered="llgbm-generator-nano/3", study="phase|4", study_id="abc")
    lineage = made.lineage(["a b", "c d"])
    assert lineage["base"]["commit"] == COMMIT and lineage["base"]["name"] == "Qwen/Qwen2.5-0.5B"
    read = ModelCard(card(lineage, made.adapter_config()))
    assert (read.data.base_model, read.data.license) == ("Qwen/Qwen2.5-0.5B", "apache-2.0")
    assert read.data.to_dict()["base_model_relation"] == "adapter"
    assert "0.530 (95 % interval 0.450 to 0.610), the mean over 24 tasks" in read.text
    assert "| generator registered | `llgbm-generator-nano/3` |" in read.text
    assert "phase\\|4" in read.text and f"revision='{COMMIT}'" in read.text


def test_a_folder_of_the_hubs_cache_is_named_by_its_id() -> None:
    folder = f"/home/me/.cache/huggingface/hub/models--Qwen--Qwen2.5-0.5B/snapshots/{COMMIT}"
    assert portable_base(folder) == f"Qwen/Qwen2.5-0.5B@{COMMIT}"
    assert portable_base("/models/mine") == "/models/mine"


def test_the_licence_of_a_base_is_read_off_its_card(
    bundle: Path, tiny_base: Base, tmp_path: Path
) -> None:
    made = GeneratorBundle.load(bundle)
    shutil.copytree(tiny_base.path, tmp_path / "base")
    made.facts["base_path"] = str(tmp_path / "base")
    assert made.lineage(["a"])["base"]["license"] is None
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n# a model\n")
    assert made.lineage(["a"])["base"]["license"] == "mit"
    for odd in (
        "---\nlicense: [a\n---\n",
        "---\nlicense: [mit]\n---\n",
        "---\n",
        "---\n- a\n---\n",
        "license: mit",
    ):
        (tmp_path / "base" / "README.md").write_text(odd)
        assert made.lineage(["a"])["base"]["license"] is None


def edit_weights(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-2] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(content))


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **values}))


def edit_lineage(folder: Path, text: str) -> None:
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"llgbm": text})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (edit_weights, "the weights of the adapter"),
        (lambda f: edit_config(f, lora_alpha=7), "the config of the adapter"),
        (lambda f: edit_lineage(f, "{"), "lineage is"),
        (lambda f: edit_lineage(f, '{"version": 99}'), "newer llgbm"),
        (lambda f: edit_lineage(f, '{"version": 1, "base": "x"}'), "no table of base"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-4]), "truncated"),
    ],
)
def test_what_was_changed_is_refused(edit: Any, words: str, adapter: Path, capsys: Any) -> None:
    edit(adapter)
    for command in (["show"], ["evaluate", "--task", "reverse-plain", "--adapter"]):
        assert main([*command, str(adapter)]) == 2
        assert words in one_sentence(capsys)


def test_the_name_of_the_base_may_be_written_anew(
    adapter: Path, tiny_base: Base, capsys: Any
) -> None:
    edit_config(adapter, base_model_name_or_path="someone/else", revision="main")
    found = shown(capsys, str(adapter))
    assert found["base_files"].startswith("not checked: the base is not here")
    found = shown(capsys, str(adapter), "--base", tiny_base.path)
    assert found["base_files"].endswith("are the ones that the adapter was made for")


def test_another_base_is_told(adapter: Path, tiny_base: Base, user: Path, capsys: Any) -> None:
    shutil.copytree(tiny_base.path, user / "base")
    (user / "base" / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert main(["show", str(adapter), "--base", "base"]) == 2
    assert "base is not the base of the adapter" in one_sentence(capsys)
    edit_config(adapter, base_model_name_or_path=str(user / "base"))
    assert "OTHERS" in shown(capsys, str(adapter))["base_files"]
    assert main(["evaluate", "--task", "reverse-plain", "--adapter", str(adapter)]) == 2
    assert "made for another base" in one_sentence(capsys)


def test_an_adapter_of_others_is_shown_without_a_lineage(source: Path, capsys: Any) -> None:
    found = shown(capsys, str(source / "one"))
    assert found["lineage"] is None and found["files"].startswith("whole")
    assert found["base_files"] == "not checked: no hash of the base is known"


def test_a_readme_of_the_users_own_stays(commands: Any, user: Path, capsys: Any) -> None:
    (user / "README.md").write_text("mine")
    for name in ("generate", "fetch"):
        assert main([*commands[name], "--out", "."]) == 0
        assert "no card is written" in capsys.readouterr().err
    assert (user / "README.md").read_text() == "mine"
    assert main([*commands["generate"], "--out", "new"]) == 0
    assert main([*commands["generate"], "--out", "new"]) == 0
    assert "LoRA adapter" in (user / "new" / "README.md").read_text()


def test_hashes_know_content_and_not_metadata(
    tmp_path: Path, adapter: Path, tiny_spec: Any
) -> None:
    before = weights_hash((adapter / WEIGHTS).read_bytes())
    save_file(load_file(adapter / WEIGHTS), adapter / WEIGHTS, {"format": "pt"})
    assert weights_hash((adapter / WEIGHTS).read_bytes()) == before
    state = load_file(adapter / WEIGHTS)
    values = torch.arange(6.0)
    others = [{"a": values.view(2, 3)}, {"a": values.view(3, 2)}, {"b": values.view(2, 3)}]
    assert len({weights_hash(save(other)) for other in (state, *others)}) == 4
    one, other = (adapter_config(tiny_spec, name) for name in ("a/b", "c/d@main"))
    assert config_hash(one) == config_hash(other)
    assert config_hash({**one, "r": 5}) != config_hash(one)


def test_the_date_can_be_given(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    made = GeneratorBundle.load(bundle)
    assert made.lineage(["a"])["made"] == "1970-01-02T00:00:00+00:00"
    assert made.pack_adapter(["a b"]) == made.pack_adapter(["a b"])


def test_held_out_accuracy_has_the_interval_of_its_tasks() -> None:
    values = [0.4, 0.5, 0.6, 0.5]
    found = heldout_facts(dict(zip("abcd", values, strict=True)))
    half = stats.t.ppf(0.975, 3) * np.std(values, ddof=1) / 2
    assert found["accuracy"] == pytest.approx(0.5) and found["tasks"] == 4
    assert found["interval"] == pytest.approx((0.5 - half, 0.5 + half))
    assert heldout_facts({"a": 1.0})["interval"] is None
    # Few tasks that differ much: Student's t alone goes from below 0 to above 1.
    assert heldout_facts({"a": 0.0, "b": 1.0})["interval"] == (0.0, 1.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_adapter_of_half_the_size_is_the_rounded_one(
    dtype: str, commands: Any, user: Path, tiny_base: Base, capsys: Any
) -> None:
    assert main([*commands["generate"], "--out", "whole"]) == 0
    assert main([*commands["generate"], "--dtype", dtype, "--out", "half"]) == 0
    capsys.readouterr()
    whole, half = (load_file(user / name / WEIGHTS) for name in ("whole", "half"))
    assert shown(capsys, "half")["kind"] == dtype
    for key, value in half.items():
        assert value.dtype == getattr(torch, dtype)
        assert torch.equal(value, whole[key].to(value.dtype))
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_base.path, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(model, str(user / "half")).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        wanted = loaded(input_ids=ids, use_cache=False).logits
    plain = read_external(user / "half", tiny_base.model)
    batch = LoraBatch.from_state_dicts([plain.state])
    with adapters_applied(tiny_base.model, batch, plain.spec.scaling), torch.no_grad():
        got = tiny_base.model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    assert main([*commands["generate"], "--dtype", "int8", "--out", "no"]) == 2
    assert "unknown dtype 'int8'" in one_sentence(capsys)
