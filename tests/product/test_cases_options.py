"""Options from the command line: values that nothing can be made of, and paths as people type them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import rows, write_rows
from output_checks import tree

from llgbm.__main__ import main
from llgbm.models.load import Base
from tuning.run_ablation import main as ablation_main

STEP = ["--steps", "3", "--checkpoints", "1", "--every", "1", "--max-tokens", "1"]
TEACHERS = ["teachers", "--data", "data", "--tasks", "river", "--out", "new", *STEP]
EVALUATE = ["evaluate", "--data", "data", "--tasks", "river", "--max-tokens", "1"]
IMPORT = ["bank", "import", "source", "--out", "new", "--trajectories", "1"]
WRONG: list[tuple[Sequence[str], str]] = [
    ([*TEACHERS, "--learning-rate", "nan"], "the learning rate of teachers is nan"),
    ([*TEACHERS, "--learning-rate", "-1"], "the learning rate of teachers is -1"),
    ([*TEACHERS, "--learning-rate", "1e30"], "lower the learning rate"),
    ([*TEACHERS, "--limit", "-3"], "-3 rows of each dataset"),
    ([*TEACHERS, "--rank", "0"], "the LoRA rank is 0"),
    ([*TEACHERS, "--alpha", "inf"], "the LoRA alpha is inf"),
    ([*TEACHERS, "--max-tokens", "-1"], "one trajectory of one token"),
    ([*TEACHERS, "--device", "nonsense"], "the device 'nonsense' cannot be used"),
    ([*TEACHERS, "--device", "cuda:99"], "the device 'cuda:99' cannot be used"),
    ([*TEACHERS, "--device", "meta"], "the device 'meta' cannot be used"),
    ([*IMPORT, "--device", "cuda:99"], "the device 'cuda:99' cannot be used"),
    ([*IMPORT, "--trajectories", "0"], "at least 1"),
    ([*EVALUATE, "--shots", "-1"], "--shots is -1; it must be at least 0"),
    ([*EVALUATE, "--examples", "0"], "--examples is 0; it must be at least 1"),
    ([*EVALUATE, "--longest-row", "0"], "at least 1"),
    ([*EVALUATE, "--adapter", "data/river.json"], "name the folder of a PEFT adapter"),
]


@pytest.fixture
def folder(user: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, which is the home too, with datasets and adapters."""
    (user / "data").mkdir()
    for topic in ("river", "stone", "cloud"):
        write_rows(user / "data", topic, rows(topic, 32))
    shutil.copytree(source, user / "source")
    monkeypatch.setenv("HOME", str(user))
    return user


@pytest.mark.parametrize(("command", "words"), WRONG, ids=[words for _, words in WRONG])
def test_a_value_that_means_nothing_is_one_sentence_and_leaves_nothing(
    command: Sequence[str],
    words: str,
    folder: Path,
    tiny_base: Base,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = tree(folder)
    assert main([*command, "--base", tiny_base.path]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and words in said[0]
    assert tree(folder) == before


def test_a_home_is_expanded_in_every_path(
    folder: Path,
    tiny_base: Base,
    commands: dict[str, list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A shell leaves `--data=~/data` as it is."""
    shutil.copytree(tiny_base.path, folder / "base")
    shutil.copy(commands["generate"][-1], folder / "prompts.txt")
    (folder / "given.json").write_text(
        json.dumps({task: ["a", "b", "c"] for task in ("one", "two")})
    )
    sweep = ["--data=~/data", "--tasks", "river", "stone", "--held-out", "cloud", "--base=~/base"]
    assert ablation_main([*sweep, "--seeds=0", "--cache=~/cache", "--dry-run"]) == 0
    taken = ["bank", "import", "~/source", "--out=~/bank", *IMPORT[-2:], "--prompts=~/given.json"]
    for command in (
        ["teachers", "--data=~/data", "--tasks=river", "--out=~/trained", "--base=~/base", *STEP],
        ["evaluate", "--data=~/data", "--tasks=river", "--max-tokens=1", "--base=~/base"],
        ["evaluate", "--task=copy-plain", "--examples=1", "--adapter", "~/source/one"],
        [*taken, "--base=~/base", "--accept-base", Path(tiny_base.path).name],
        ["bank", "show", "~/bank"],
        [*commands["generate"][:-1], "~/prompts.txt", "--out=~/made"],
    ):
        assert main(command) == 0, command
    assert not (folder / "~").exists() and (folder / "made").is_dir()


def test_the_current_folder_is_an_adapter_with_its_own_name(
    folder: Path,
    tiny_base: Base,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder / "source" / "one")
    command = ["evaluate", "--data=../../data", "--tasks=river", "--max-tokens=1", "--examples=1"]
    assert main([*command, "--adapter", ".", "--base", tiny_base.path]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert "one" in result["systems"]
