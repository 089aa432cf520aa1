"""The commands of the documentation: each has options that its program takes, and its plans are made for real."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from torch import nn

import llgbm.__main__ as command_line
import tuning.report.__main__ as report
from llgbm.estimate import ProbeSize, estimate_trial, human
from llgbm.lora import LoraSpec
from llgbm.models.load import SIZES, Base, PublishedSize, weightless_model
from llgbm.training import TrainingConfig
from tuning import run_ablation
from tuning.arguments import parse_arguments

DOCS = [ROOT / "docs" / name for name in ("qwen2.5.md", "reproduce_reference.md")]
PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "tuning/run_ablation.py": parse_arguments,
    "-m llgbm": command_line.parse_arguments,
    "-m tuning.report": report.parse_arguments,
}
OTHER_PROGRAMS = {"hf", "mlflow", "make", "export"}
DATASETS = ("ARC-e", "ARC-c", "BoolQ", "OBQA", "WinoGrande", "GSM8K")


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.M | re.S
    )


def commands(path: Path) -> list[list[str]]:
    lines = [
        line for block in blocks(path, "bash") for line in block.replace("\\\n", " ").splitlines()
    ]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


EVERY = [words for path in DOCS for words in commands(path)]
NOT_PLANNED = {
    "--resume",
    "--bank",
}  # They need what an earlier run left; `--estimate` is a plan of its own.
PLANS = [
    w[2:]
    for w in EVERY
    if w[:2] == ["python", "tuning/run_ablation.py"] and not NOT_PLANNED & set(w)
]


def label(words: list[str]) -> str:
    return " ".join(words)[:70]


@pytest.mark.parametrize("words", EVERY, ids=label)
def test_every_option_of_a_command_exists(words: list[str]) -> None:
    if words[0] == "python":
        program, arguments = (
            (" ".join(words[1:3]), words[3:]) if words[1] == "-m" else (words[1], words[2:])
        )
        PARSERS[program](arguments)
    else:
        assert words[0] in OTHER_PROGRAMS


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages ask for, in small: a model's folder, a few rows of each dataset, the study in a file."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "Qwen2.5-0.5B-Instruct").symlink_to(tiny_base.path)
    (tmp_path / "data").mkdir()
    for name in DATASETS:
        rows = [
            {"prompt": f"{name}: is {i} plus {i} even?", "response": "True", "system": ""}
            for i in range(24)
        ]
        (tmp_path / "data" / f"{name}_train.json").write_text(json.dumps(rows))
    (tmp_path / "reference.py").write_text(
        blocks(ROOT / "docs" / "reproduce_reference.md", "python")[0]
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def without(arguments: list[str], *options: str) -> list[str]:
    """The arguments less some options of one value, which need weights of full size or a GPU."""
    places = {
        place + step for place, word in enumerate(arguments) for step in (0, 1) if word in options
    }
    return [word for place, word in enumerate(arguments) if place not in places]


@pytest.mark.parametrize("arguments", PLANS, ids=label)
def test_the_sweeps_can_be_planned(
    arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = "--model-size" if "--base" in arguments else ""
    planned = [
        *without(arguments, size, "--gpus-per-trial"),
        *([] if "--dry-run" in arguments else ["--dry-run"]),
    ]
    assert run_ablation.main(planned) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    wanted = 3 if "--lambda-weight" in arguments else 9
    assert len(re.findall(r"^[0-9a-f]{12} ", printed, flags=re.M)) == wanted
    assert not (folder / ".llgbm").exists() and not (folder / "mlruns").exists()


def test_the_study_of_the_reference_reads_the_delta_as_the_page_says(folder: Path) -> None:
    from tuning.arguments import study_of

    study = study_of(
        parse_arguments(["--study", "reference.py:reference", "--seeds", "0", "1", "2"])
    )
    readings = {
        (t.config.delta_probes, t.config.delta_reading, t.config.delta_loss) for t in study.trials
    }
    assert readings == {("generic", "mean", "mse")} and len(study.trials) == 9


def table_row(size: str, adapters: int, tokens: int) -> str:
    """A row of the page's table of memory, computed."""
    base = nn.Module.to(weightless_model(size), torch.bfloat16)
    published = SIZES[size]
    assert isinstance(published, PublishedSize)
    spec = LoraSpec.from_model(base, published.rank, published.alpha)
    config = TrainingConfig(model_size=size, batch_size=adapters, n_probes=5)
    plain, saving = (
        estimate_trial(
            replace(config, activation_checkpointing=on), base, spec, 20, 384, ProbeSize(tokens)
        )
        for on in (False, True)
    )
    counts = [
        human(n) for n in (plain.base_parameters, plain.adapter_values, plain.generator_parameters)
    ]
    costs = [
        cell
        for e in (plain, saving)
        for cell in (human(e.step_flops, "FLOP"), human(e.peak_bytes, "B"))
    ]
    return f"| {' | '.join([size, f'{adapters} × 5 × {tokens}', *counts, *costs])} |"


@pytest.mark.parametrize("tokens", [64, 256])
@pytest.mark.parametrize(("size", "adapters"), [("qwen2.5-0.5b", 16), ("qwen2.5-1.5b", 8)])
def test_the_table_of_memory_is_what_the_formulas_say(
    size: str, adapters: int, tokens: int
) -> None:
    assert table_row(size, adapters, tokens) in DOCS[0].read_text(encoding="utf-8").splitlines()


def test_links_point_at_files() -> None:
    for path in DOCS:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
