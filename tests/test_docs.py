"""The commands of the documentation: each is one that the programs take, and plans are made for real."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED, ROOT

import llgbm.__main__ as command_line
import tuning.report.__main__ as report
from llgbm.models import Base
from tuning import run_ablation

DOCS = [ROOT / "docs" / name for name in ("qwen2.5.md", "reproduce_reference.md")]
PROGRAMS = {"python", "hf", "mlflow", "make", "export"}
PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "tuning/run_ablation.py": run_ablation.parse_arguments,
    "-m llgbm": command_line.parse_arguments,
    "-m tuning.report": report.parse_arguments,
}


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands(path: Path) -> list[list[str]]:
    lines = [line for block in blocks(path, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


EVERY = [(path, words) for path in DOCS for words in commands(path)]


def program_of(words: list[str]) -> tuple[str, list[str]]:
    """The program of a `python` command and its arguments."""
    return (" ".join(words[1:3]), words[3:]) if words[1] == "-m" else (words[1], words[2:])


@pytest.mark.parametrize(("path", "words"), EVERY, ids=[f"{p.stem}: {' '.join(w)[:60]}" for p, w in EVERY])
def test_every_option_of_a_command_exists(path: Path, words: list[str]) -> None:
    assert words[0] in PROGRAMS
    if words[0] == "python":
        program, arguments = program_of(words)
        PARSERS[program](arguments)


def test_links_point_at_files() -> None:
    for path in DOCS:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
