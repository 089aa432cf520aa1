"""Real tokenizer, real rows, real commands on a Qwen2.5 of two narrow layers: from files to an evaluated adapter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, SHARED
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from llgbm.functional import FunctionalLoRA
from llgbm.lora import LoraBatch, LoraSpec
from llgbm.lora.adapters import load_adapter
from llgbm.models.load import ModelSize, load_base, qwen2_config
from llgbm.models.scoring import adapter_losses, encode_examples, token_losses
from llgbm.tasks.files import FileSuite
from llgbm.teachers.bank import read_manifest

NARROW = ModelSize(hidden=32, layers=2, heads=4, kv_heads=2, intermediate=64)
QWEN_VOCABULARY = 151_936
TASKS, HELD_OUT = ["ARC-e", "OBQA", "GSM8K"], "ARC-c"

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not ((SHARED / "qwen2.5").is_dir() and (SHARED / "data").is_dir()),
        reason="../shared/qwen2.5 or ../shared/data is absent: no real tokenizer and rows to go through the pipeline",
    ),
]


def command(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run one in a folder; return the JSON object of its last line."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=870,
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "said": done.stderr}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the Hugging Face layout: random weights of two layers under Qwen2.5's whole vocabulary."""
    folder = tmp_path_factory.mktemp("models") / "narrow"
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "qwen2.5")
    torch.manual_seed(0)
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    config = qwen2_config(NARROW, vocab_size=QWEN_VOCABULARY, initializer_range=0.2, **special)
    Qwen2ForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def swept(narrow: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("run")
    (folder / "tuning").symlink_to(ROOT / "tuning")
    data = [
        "--data",
        str(SHARED / "data"),
        "--tasks",
        *TASKS,
        "--held-out",
        HELD_OUT,
        "--rows",
        "64",
    ]
    settings = [
        "--adapters-per-task",
        "2",
        "--teacher-steps",
        "5",
        "--teacher-rate",
        "0.05",
        "--rank",
        "4",
        "--trajectories",
        "4",
        "--trajectory-tokens",
        "8",
    ]
    trial = ["--lambda-weight", "0.3", "--lambda-delta", "1", "--steps", "8", "--smoke"]
    arguments = ["tuning/run_ablation.py", "--base", str(narrow), *data, *settings, *trial]
    return folder, command(folder, *arguments)


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


@pytest.mark.whole
def test_a_qwen_goes_from_files_to_a_registered_generator_and_an_evaluated_adapter(
    swept: tuple[Path, dict[str, Any]], narrow: Path
) -> None:
    folder, result = swept
    assert [trial["status"] for trial in result["trials"]] == ["FINISHED"]
    assert result["registered"] == [
        {"name": "llgbm-generator-base-narrow-smoke", "version": "1", "alias": "champion"}
    ]
    teacher = only(folder, f".llgbm/banks/*/checkpoints/{HELD_OUT}/{HELD_OUT}_0")
    bank = teacher.parents[2]
    listed = read_manifest(bank)["adapters"]
    assert {i: entry["task"] for i, entry in listed.items()} == {
        f"{t}_{i}": t for t in (*TASKS, HELD_OUT) for i in range(2)
    }
    written = only(folder, f"mlruns/**/adapters/test/{HELD_OUT}")

    scored = command(
        folder,
        *(
            "-m",
            "llgbm",
            "evaluate",
            "--base",
            str(narrow),
            "--data",
            str(SHARED / "data"),
            "--tasks",
            HELD_OUT,
            "GSM8K",
        ),
        *(
            "--adapter",
            f"teacher={teacher}",
            f"generated in the sweep={written}",
            "--examples",
            "12",
            "--max-tokens",
            "8",
        ),
        *("--generator", "models:/llgbm-generator-base-narrow-smoke@champion", "--shots", "2"),
    )
    for found, kind in zip(scored["results"], ("choice", "number"), strict=True):
        assert found["kind"] == kind and found["examples"] == 12
        names = ["base", "2 examples in context", "teacher", "generated in the sweep", "generated"]
        assert list(found["systems"]) == names
    check_that_peft_runs_it(narrow, written)
    check_that_responses_became_likelier(narrow, [teacher, written])


def check_that_peft_runs_it(narrow: Path, adapter: Path) -> None:
    """A generated adapter moves the base, under plain PEFT as under the batched pass."""
    base = load_base(narrow)
    ids = base.tokenizer(["Which gas do plants take in?"], return_tensors="pt")["input_ids"]
    lora_model = FunctionalLoRA(base.model, 4, 8.0)
    with torch.no_grad():
        plain = base.model(ids).logits
        own = lora_model.forward_with_lora(
            LoraBatch.from_state_dicts([load_adapter(adapter, lora_model.spec)]), ids
        )[0]
        theirs = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(narrow), str(adapter)
        )(ids).logits
    torch.testing.assert_close(own, theirs, atol=1e-5, rtol=0)
    assert (own - plain).abs().max() > 1e-3


def check_that_responses_became_likelier(narrow: Path, adapters: list[Path]) -> None:
    """Teacher and generated adapter of the held-out dataset lower the loss of its responses by more than a tenth."""
    base = load_base(narrow)
    spec = LoraSpec.from_model(base.model, 4, 8.0)
    suite = FileSuite.open(SHARED / "data", test=[HELD_OUT], limit=64)
    texts = encode_examples(base, suite.examples(HELD_OUT, "evaluation", 16, "loss"))
    for adapter in adapters:
        batch = LoraBatch.from_state_dicts([load_adapter(adapter, spec)])
        with torch.no_grad():
            without = token_losses(base.model, texts).sum()
            under = adapter_losses(base.model, spec, batch, texts) * (texts.targets_ST >= 0).sum()
        assert under.item() < 0.9 * without.item(), adapter


@pytest.mark.whole
def test_held_out_rows_condition_nothing_in_training(swept: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = swept
    bank = only(folder, ".llgbm/banks/*/manifest.json").parent
    held_out = {row["prompt"] for part in ("train", "test") for row in read(f"{HELD_OUT}_{part}")}
    seen: dict[str, set[str]] = {}
    for path in bank.glob("checkpoints/*/*/prompts.json"):
        prompts = json.loads(path.read_text())
        assert not set(prompts["train"]) & set(prompts["evaluation"])
        if path.parents[1].name != HELD_OUT:
            assert not set(prompts["train"] + prompts["evaluation"]) & held_out
            seen.setdefault(path.parents[1].name, set()).update(prompts["train"])
    assert {name: len(prompts) for name, prompts in seen.items()} == dict.fromkeys(TASKS, 16)


def read(name: str) -> list[dict[str, str]]:
    return json.loads((SHARED / "data" / f"{name}.json").read_text(encoding="utf-8"))
