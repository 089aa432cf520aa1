"""Banks and the scripts of dnd: nothing outside the folder named is touched, nothing half is left behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from dnd.commands import exit_status, generate_command, train_command
from dnd.output import RECORD, STAGE
from dnd.training import TrainSettings, newest_checkpoint
from safetensors.torch import save_file
from stopping import tree
from test_dnd_training import options_of

from llgbm.__main__ import main
from llgbm.banks import BankFolder, find_adapters, read_manifest
from llgbm.lora import LoraBatch, LoraSpec, adapter_config, save_adapter
from llgbm.models import Base
from llgbm.runtime import UserError
from llgbm.world import World

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PROMPTS = {"train": ["count : a b =>", "count : c =>"], "evaluation": ["count : d e =>"]}


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in captured.err and captured.out == "", captured.err
    return lines[0]


@pytest.fixture(scope="module")
def source(
    tiny_base: Base, tiny_spec: LoraSpec, tiny_adapters: LoraBatch, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Adapters of two tasks with prompts, as someone else left them."""
    root = tmp_path_factory.mktemp("source")
    for place, state in zip(("one", "two"), tiny_adapters.to_state_dicts(), strict=False):
        save_adapter(root / place, state, adapter_config(tiny_spec, tiny_base.path))
        (root / place / RECORD).unlink()
        (root / place / "prompts.json").write_text(json.dumps(PROMPTS))
    return root


@pytest.fixture(scope="module")
def command(source: Path, tiny_base: Base) -> list[str]:
    """An import but for its `--out`."""
    return ["bank", "import", str(source), "--base", tiny_base.path, "--trajectories", "1", "--max-tokens", "2"]


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, which is the current one."""
    folder = tmp_path / "user"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("place", ["..", ".", "../one/.."])
def test_no_adapter_is_taken_over_to_a_place_outside_the_bank(
    place: str, source: Path, tiny_base: Base, user: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(source / "one", user / "work" / "one")
    inside = user / "work" / "one" / "deeper"
    inside.mkdir()
    monkeypatch.chdir(inside if place == ".." else inside.parent)
    before = tree(user)
    command = ["bank", "import", place, "--base", tiny_base.path, "--trajectories", "1", "--max-tokens", "2"]
    odd = ("../../x", "/abs", "", "..", "a/b", "x\0", "nul")
    for more in ([], *(["--task", task] for task in odd)) if place != "../one/.." else (["--task", "../../x"],):
        assert main([*command, "--out", str(user / "bank"), *more]) == 2
        one_sentence(capsys)
        assert tree(user) == before
    if place != "../one/..":
        assert main([*command, "--out", str(user / "bank"), "--task", "one"]) == 0
        assert set(read_manifest(user / "bank")["adapters"]) == {"one_0"}


def test_a_bank_inside_its_own_source_is_found_again(
    source: Path, tiny_base: Base, user: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(source, user / "src")
    command = ["--base", tiny_base.path, "--trajectories", "1", "--max-tokens", "2", "--out"]
    said = []
    for place, out in (("src", "src/bank"), (str(user / "src"), "src/bank"), ("./src/../src", str(user / "src/bank"))):
        assert main(["bank", "import", place, *command, out]) == 0
        said.append(json.loads(capsys.readouterr().out))
        left = tree(user)
    assert [s["adapters"] for s in said] == [2, 2, 2] and said[0]["sources"] == said[2]["sources"]
    monkeypatch.chdir(user / "src")
    assert main(["bank", "import", ".", *command, "bank"]) == 0
    capsys.readouterr()
    assert tree(user) == left
    assert main(["bank", "import", "bank", *command, "bank"]) == 2
    assert "outside bank" in one_sentence(capsys)
    changed = [*command[:-2], "3", "--out"]
    assert main(["bank", "import", ".", *changed, "bank"]) == 2
    assert "another settings" in one_sentence(capsys) and tree(user) == left


def test_what_a_killed_import_left_is_finished_by_the_next(command: list[str], user: Path) -> None:
    assert main([*command, "--out", "whole"]) == 0
    program = [sys.executable, "-m", "llgbm", *command, "--out", "bank"]
    process = subprocess.Popen(program, stderr=subprocess.DEVNULL)
    while not (user / "bank" / "checkpoints").exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (user / "bank" / "bank.json").exists()
    (user / "bank" / ".manifest.json.writing").write_text("{")
    assert main([*command, "--out", "bank"]) == 0
    assert tree(user / "bank") == tree(user / "whole")


def test_what_lies_in_an_adapters_place_without_its_line_is_not_touched(
    tiny_base: Base, tiny_spec: LoraSpec, tiny_adapters: LoraBatch, tmp_path: Path
) -> None:
    bank = BankFolder(tmp_path / "bank", tiny_base, tiny_spec, {})
    state = tiny_adapters.to_state_dicts()[0]
    with bank.opened():
        bank.add("one_0", "one", state, PROMPTS, {})
        mine = tmp_path / "bank" / "checkpoints" / "one" / "one_1"
        mine.mkdir()
        (mine / WEIGHTS).write_text("mine")
        with pytest.raises(UserError, match="none of the bank's adapters"):
            bank.add("one_1", "one", state, PROMPTS, {})
        with pytest.raises(UserError, match="cannot name a folder"):
            bank.add("one_2", "../../one", state, PROMPTS, {})
        assert (mine / WEIGHTS).read_text() == "mine"
        (mine.parent / "one_0" / "notes.txt").write_text("mine")
        (mine.parent / "one_0" / WEIGHTS).write_bytes(b"torn")
        bank.add("one_0", "one", state, PROMPTS, {})
        assert bank.missing(["one_0"]) == [] and (mine.parent / "one_0" / "notes.txt").read_text() == "mine"


def test_a_refused_command_leaves_no_half_bank(
    source: Path, tiny_base: Base, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["bank", "import", str(source), "--base", tiny_base.path, "--out", "new/bank"]

    def refuse(*_: Any) -> None:
        raise UserError("the chat template has no system turn: leave --chat out")

    # Stands for whatever is found out late; today a template that refuses the prompts.
    monkeypatch.setattr("llgbm.banks.greedy_answers", refuse)
    assert main(command) == 2
    assert tree(user) == {}
    (user / "new").mkdir()
    (user / "new" / "bank").mkdir()
    assert main(command) == 2
    assert tree(user) == {"new": None, "new/bank": None}
    (user / "new" / "bank" / "notes").write_text("mine")
    assert main(command) == 2
    assert tree(user) == {"new": None, "new/bank": None, "new/bank/notes": b"mine"}


def test_a_bank_keeps_the_adapters_of_a_training_that_stops(
    tiny_base: Base, tiny_spec: LoraSpec, tiny_adapters: LoraBatch, tmp_path: Path
) -> None:
    bank = BankFolder(tmp_path / "new" / "bank", tiny_base, tiny_spec, {})
    with pytest.raises(UserError), bank.opened():
        raise UserError("one run needs more memory than there is")
    assert not (tmp_path / "new").exists()
    with pytest.raises(KeyboardInterrupt), bank.opened():
        bank.add("one_0", "one", tiny_adapters.to_state_dicts()[0], PROMPTS, {})
        raise KeyboardInterrupt
    assert bank.missing(["one_0", "one_1"]) == ["one_1"]


def test_adapters_that_a_command_is_writing_are_none(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "src")
    shutil.copytree(source / "one", tmp_path / "src" / f"{STAGE}1-x" / "new")
    assert [f.task for f in find_adapters(str(tmp_path / "src"), None)] == ["one", "two"]


@pytest.fixture
def small(world: World) -> TrainSettings:
    return TrainSettings(
        encoder=world.base.path,
        n_prompts=3,
        max_length=16,
        features=((8, 12, 66),),
        kernel_size=3,
        batch_size=4,
        seed=0,
    )


def test_a_second_training_into_one_folder_is_refused(
    world: World, small: TrainSettings, user: Path, capsys: Any
) -> None:
    options = options_of(small, world.bank.folder / "checkpoints", Path("out"))
    resumed = [*options, "--steps=2", "--save-every=1"]
    write_foreign(user / "out" / "checkpoint-500")
    write_foreign(user / "out" / "checkpoint-000001")
    assert exit_status(lambda: train_command(small, "", "", (), resumed)) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"] == "out/checkpoint-000002"
    before = tree(user)
    for more in (["--steps=1"], ["--steps=1", "--dry-run"], ["--steps=4", "--seed=7"]):
        assert exit_status(lambda more=more: train_command(small, "", "", (), [*options, *more])) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert "checkpoint-000002 of an earlier training" in said[0] and "--resume" in said[0]
        assert tree(user) == before
    assert exit_status(lambda: train_command(small, "", "", (), [*resumed, "--resume"])) == 0
    assert newest_checkpoint(user / "out").name == "checkpoint-000002"
    assert tree(user) == before


def write_foreign(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_text("mine")


def test_generated_adapters_of_dnd_replace_only_their_own(
    world: World, small: TrainSettings, user: Path, capsys: Any
) -> None:
    bank = world.bank.folder / "checkpoints"
    options = [*options_of(small, bank, Path("out")), "--steps=1", "--save-every=1"]
    assert exit_status(lambda: train_command(small, "", "", (), options)) == 0
    prompts = next(bank.glob("*/*/prompts.json")).parent
    command = ["--checkpoint=out", f"--prompts={prompts}", "--count=2", "--out=made"]

    def generate(*more: str) -> int:
        return exit_status(lambda: generate_command(small, "", "", "task", [*command, *more]))

    assert [generate(), generate()] == [0, 0]
    assert set(tree(user / "made" / "task_1")) == {WEIGHTS, CONFIG, RECORD}
    save_file({"mine": torch.ones(1)}, user / "made" / "task_1" / WEIGHTS)
    before = tree(user)
    capsys.readouterr()
    for more in ([], ["--task=../../x"], ["--task="], ["--out=" + "x" * 256]):
        assert generate(*more) == 2
        assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]) == 1
        assert tree(user) == before
