"""Published sizes from config alone, and bases found by folder or hub id."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dnd.tokenizer.register import Qwen2505LoRA_Tokenizer2D, Qwen2515LoRA_Tokenizer2D
from dnd.tokenizer.tokenizer import LoraTokenizer2D
from helpers import ROOT, SHARED
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from llgbm.lora import LoraBatch, LoraSpec
from llgbm.models.load import (
    SIZES,
    Base,
    BaseSource,
    PublishedSize,
    check_size,
    find_model,
    load_base,
    weightless_model,
)
from llgbm.runtime import UserError, content_hash
from llgbm.training import TrainingConfig
from llgbm.world import WorldConfig

PUBLISHED = {
    "qwen2.5-0.5b": (Qwen2505LoRA_Tokenizer2D, "adapter_config_0.5b.json", 4296),
    "qwen2.5-1.5b": (Qwen2515LoRA_Tokenizer2D, "adapter_config_1.5b.json", 4508),
}


def spec_of(name: str) -> LoraSpec:
    size = SIZES[name]
    assert isinstance(size, PublishedSize)
    return LoraSpec.from_model(weightless_model(name), size.rank, size.alpha)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_full_size_spec_has_the_keys_and_shapes_that_peft_gives_it(name: str) -> None:
    file = SHARED / "qwen2.5" / PUBLISHED[name][1]
    if not file.is_file():
        pytest.skip(
            "../shared/qwen2.5 is absent: no published adapter config to hold the sizes against"
        )
    published = json.loads(file.read_text())
    config = LoraConfig(
        r=published["r"],
        lora_alpha=published["lora_alpha"],
        target_modules=published["target_modules"],
    )
    theirs = get_peft_model_state_dict(get_peft_model(weightless_model(name), config))
    spec = spec_of(name)
    ours = {
        f"base_model.model.{module}.lora_{side}.weight": shape
        for module, side, shape in spec.pieces
    }
    assert ours == {key: tuple(tensor.shape) for key, tensor in theirs.items()}
    assert (spec.rank, spec.alpha) == (published["r"], published["lora_alpha"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_full_size_adapter_has_as_many_tokens_as_published_and_survives_them(name: str) -> None:
    make, _, count = PUBLISHED[name]
    spec = spec_of(name)
    values = torch.randn(1, spec.n_values, generator=torch.Generator().manual_seed(0)) * 0.02
    state = LoraBatch.unflatten(spec, values).to_state_dicts()[0]
    tokenizer: LoraTokenizer2D = make()
    tokens = tokenizer.tokenize(state)
    assert len(tokens) == tokenizer.n_tokens(state) == count
    back = LoraBatch.from_state_dicts([tokenizer.detokenize(state, tokens)]).flatten(spec)
    assert (back - values).abs().max() < 1e-3


def test_use_small_model_picks_within_the_family() -> None:
    assert TrainingConfig(model_family="qwen2.5", use_small_model=True).model_size == "qwen2.5-0.5b"
    assert (
        TrainingConfig(model_family="qwen2.5", use_small_model=False).model_size == "qwen2.5-1.5b"
    )
    assert TrainingConfig(use_small_model=True).model_size == "nano"
    assert TrainingConfig(model_size="base-mine").model_size == "base-mine"
    with pytest.raises(UserError, match="embedded, qwen2.5"):
        TrainingConfig(model_family="llama")


def test_a_published_size_is_never_pretrained_here() -> None:
    with pytest.raises(UserError, match="Qwen/Qwen2.5-0.5B-Instruct"):
        WorldConfig("qwen2.5-0.5b")


def test_a_base_is_known_by_its_files_and_dtype_wherever_it_lies(
    tiny_base: Base, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base.path, copy)
    here, there = BaseSource.find(tiny_base.path), BaseSource.find(str(copy))
    assert here == there and here.path != there.path and here.hash == tiny_base.hash
    assert content_hash(here) == content_hash(there)
    assert WorldConfig("base-x", base=here).hash == WorldConfig("base-x", base=there).hash
    half = BaseSource.find(str(copy), "bfloat16")
    assert half.hash != here.hash
    assert (
        half.load("cpu").model.dtype == torch.bfloat16
        and here.load("cpu").model.dtype == torch.float32
    )
    (copy / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert BaseSource.find(str(copy)) != here
    with pytest.raises(UserError, match="changed since"):
        there.load("cpu")
    with pytest.raises(UserError, match="float32, bfloat16"):
        BaseSource.find(str(copy), "int3")


def test_decoding_is_greedy_whatever_the_folder_says(tiny_base: Base, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base.path, copy)
    settings = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0, "top_k": 3}
    (copy / "generation_config.json").write_text(json.dumps(settings))
    config = load_base(copy).model.generation_config
    assert config is not None and not config.do_sample and config.repetition_penalty in (None, 1.0)


def test_a_size_is_checked_against_the_folder(tiny_base: Base) -> None:
    with pytest.raises(UserError, match=r"\(32, 2, 48\).*\(896, 24, 4864\)"):
        check_size("qwen2.5-0.5b", Path(tiny_base.path))


def test_a_folder_that_is_no_model_is_one_sentence(tmp_path: Path, tiny_base: Base) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        load_base(tmp_path)
    shutil.copytree(tiny_base.path, tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no base model can be loaded"):
        load_base(tmp_path / "torn")
    with pytest.raises(UserError, match="no hub id"):
        find_model("two words/here/there")


@pytest.mark.parametrize("download", [True, False])
def test_a_model_that_is_nowhere_says_what_to_fetch(download: bool) -> None:
    with pytest.raises(UserError, match="hf download Qwen/Qwen2.5-Nowhere --local-dir DIR"):
        find_model("Qwen/Qwen2.5-Nowhere", download)


def test_offline_is_respected_and_a_missing_model_fails_in_one_line(tmp_path: Path) -> None:
    script = ROOT / "tuning" / "run_ablation.py"
    done = subprocess.run(
        [sys.executable, str(script), "--model-size", "qwen2.5-0.5b", "--dry-run"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "hf download Qwen/Qwen2.5-0.5B-Instruct" in done.stderr.splitlines()[-1]
