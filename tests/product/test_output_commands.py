"""Commands touch nothing of a user's beside their own outputs, wherever they fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dnd.commands import exit_status, generate_command, train_command
from dnd.errors import DndError
from dnd.output import RECORD, STAGE, Output
from dnd.training import TrainSettings, newest_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from output_checks import (
    CARD,
    CONFIG,
    OTHERS,
    STOPS,
    WEIGHTS,
    one_sentence,
    prepare,
    tree,
    write_foreign,
)
from safetensors.torch import save_file
from stopping import disk_full, interrupt, kill, stopped_at
from test_dnd_training import options_of
from test_report import record, trial

from llgbm.__main__ import main
from llgbm.lora.adapters import LoraBatch, LoraSpec, adapter_config, load_adapter, save_adapter
from llgbm.runtime import UserError
from llgbm.world import World
from tuning.report import write_report
from tuning.report.__main__ import main as report_main

NAMES = ("generate", "fetch", "bank")


@pytest.mark.parametrize("name", NAMES)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    others=OTHERS,
    at=st.integers(0, 120),
    stop=STOPS.filter(lambda s: s is not kill),
    out=st.sampled_from("nb."),
)
def test_no_command_that_fails_anywhere_loses_a_file(
    name: str,
    others: Any,
    at: int,
    stop: Any,
    out: str,
    commands: Any,
    user: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`n`: a new folder, `b`: one beside which and in which the user has files, `.`: the current one."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")  # twice the same is the same, but for the date
    for path in user.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    prepare_in = user / "b" if out == "b" else user
    for place, content in others.items():
        (prepare_in / place).parent.mkdir(parents=True, exist_ok=True)
        (prepare_in / place).write_bytes(content)
    before = tree(user)
    with stopped_at(user, at, stop):
        status = main([*commands[name], "--out", out])
    after = tree(user)
    assert {k: after.get(k) for k in before} == before
    assert status in (0, 2, 130)
    left = {k for k in set(after) - set(before) if STAGE not in k}
    if left:  # the new one is whole
        assert main([*commands[name], "--out", out]) == 0
        assert {k: v for k, v in tree(user).items() if k in left} == {k: after[k] for k in left}
    assert stop is interrupt or left == set(after) - set(before)


def without_a_source(name: str, command: list[str]) -> list[str]:
    """A command that says another sentence as soon as its work begins."""
    given = command.index({"generate": "--model", "fetch": "--url"}.get(name, "--base")) + 1
    nowhere = "http://127.0.0.1:9" if name == "fetch" else "nowhere/at-all"
    return [*command[:given], nowhere, *command[given + 1 :]]


@pytest.mark.parametrize("name", [*NAMES, "teachers"])
def test_an_address_that_cannot_be_written_is_refused_before_the_work(
    name: str,
    commands: Any,
    user: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (user / "file").write_text("mine")
    (user / "dangling").symlink_to("nowhere")
    (user / "circle").symlink_to("circle")
    before = tree(user)
    command = without_a_source(name, commands[name])
    for out, words in {
        "file": "a file stands",
        "file/below/it": "a file stands",
        "x" * 256: "too long",
        "new/" + "é" * 128 + "/deeper": "too long",
        "/".join(["d" * 200] * 21): "too long",
        "dangling": "not there",
        "dangling/x": "not there",
        "circle": "",
        "~nobody-of-this-name/x": "no known user",
        "/proc/nothing/here": "",
        "x\0y": "impossible name",
    }.items():
        assert main([*command, "--out", out]) == 2, out
        said = one_sentence(capsys)
        assert words in said and "nowhere/at-all" not in said and ":9" not in said, (out, said)
        assert tree(user) == before
    with pytest.raises(SystemExit) as ended:
        main([*command, "--out", ""])
    assert ended.value.code == 2 and "it is empty" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["generate", "fetch"])
def test_into_the_current_folder_beside_others_files(
    name: str, commands: Any, user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(user / "x", None, {})
    for place in ("thesis.tex", "checkpoint-500/optimizer.pt"):
        (user / place).parent.mkdir(exist_ok=True)
        (user / place).write_bytes(b"mine")
    before = tree(user)
    for _ in range(2):
        assert main([*commands[name], "--out", "."]) == 0
        after = tree(user)
        card = {CARD} if name == "generate" else set()  # what is served here has no lineage
        assert (
            set(after) - set(before) == {WEIGHTS, CONFIG, RECORD} | card
            and {k: after[k] for k in before} == before
        )
    capsys.readouterr()
    (user / CONFIG).write_text("{}")
    before = tree(user)
    assert main([*commands[name], "--out", "."]) == 2
    assert CONFIG in one_sentence(capsys) and tree(user) == before


@pytest.mark.parametrize("name", ["generate", "fetch"])
def test_a_training_folder_keeps_everything(
    name: str, commands: Any, user: Path, capsys: Any
) -> None:
    for place in (
        CONFIG,
        WEIGHTS,
        "README.md",
        "optimizer.pt",
        "checkpoint-500/trainer_state.json",
    ):
        (user / "run" / place).parent.mkdir(parents=True, exist_ok=True)
        (user / "run" / place).write_text(place)
    before = tree(user)
    assert main([*commands[name], "--out", "run"]) == 2
    assert "did not write" in one_sentence(capsys) and tree(user) == before


def test_links_are_followed_and_the_home_is_expanded(
    commands: Any, user: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(user))
    (user / "real").mkdir()
    (user / "link").symlink_to("real")
    for _ in range(2):
        assert main([*commands["generate"], "--out", "link"]) == 0
        assert os.readlink(user / "link") == "real" and set(tree(user / "real")) == {
            WEIGHTS,
            CONFIG,
            CARD,
            RECORD,
        }
    assert main([*commands["generate"], "--out", "~/deep/er"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["adapter"] == str(
        user / "deep" / "er"
    )
    assert load_adapter(user / "deep" / "er").keys() == load_adapter(user / "real").keys()
    assert not (user / "~").exists()


def test_names_of_255_letters_are_written(commands: Any, user: Path) -> None:
    for _ in range(2):
        assert main([*commands["generate"], "--out", "x" * 255]) == 0
    assert set(tree(user / ("x" * 255))) == {WEIGHTS, CONFIG, CARD, RECORD}


@pytest.fixture(params=["tmpfs", "bind"])
def mounted(request: pytest.FixtureRequest, user: Path) -> Iterator[Path]:
    """A folder that another file system, or another folder of the same one, is mounted on."""
    folder, there = user / "mounted", user / "there"
    folder.mkdir()
    there.mkdir()
    how = ["-t", "tmpfs", "tmpfs"] if request.param == "tmpfs" else ["--bind", str(there)]
    if subprocess.run(["mount", *how, str(folder)], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_mounted_folder_is_filled_in_place(
    mounted: Path, commands: Any, tiny_spec: LoraSpec, tiny_adapters: LoraBatch, user: Path
) -> None:
    for _ in range(2):
        assert main([*commands["generate"], "--out", "mounted"]) == 0
    # Both files change: no single step can do it.
    state = tiny_adapters.to_state_dicts()[0]
    save_adapter(mounted, state, adapter_config(tiny_spec, "another/base"))
    # The card of what was there before goes with it.
    assert set(tree(mounted)) == {WEIGHTS, CONFIG, RECORD}
    assert all(torch.equal(value, state[key]) for key, value in load_adapter(mounted).items())
    assert main([*commands["bank"], "--out", "mounted/bank"]) == 0
    assert not [p for p in user.rglob("*") if p.name.startswith(STAGE)]


def test_a_full_disk_is_said_before_the_work(user: Path, commands: Any, capsys: Any) -> None:
    folder = user / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("mounting needs root")
    try:
        (folder / "mine").write_bytes(bytes(60_000))
        before = tree(folder)
        for name in NAMES:
            command = without_a_source(name, commands[name])
            assert main([*command, "--out", "small"]) == 2
            assert "the disk is full" in one_sentence(capsys) and tree(folder) == before
            assert main([*command, "--out", "small/new"]) == 2
            assert "the disk is full" in one_sentence(capsys) and tree(folder) == before
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("library", ["safetensors", "torch"])
def test_a_disk_that_fills_while_a_library_writes_is_one_sentence(user: Path, library: str) -> None:
    folder, big = user / "small", {"a": torch.zeros(100_000)}
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("mounting needs root")
    try:
        with (
            pytest.raises(DndError, match="the disk is full"),
            Output(folder / "out", ("big",)).writing() as stage,
        ):
            if library == "safetensors":
                save_file(big, stage / "big")
            with (stage / "big").open("wb") as stream:
                torch.save(big, stream)
        assert tree(folder) == {}
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_report_replaces_only_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, study = (
        tmp_path / "out",
        record([trial("weight-only", 0, 0.5), trial("multitask", 0, 0.7)]),
    )
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    write_report(out, study)
    old = tree(out)
    with stopped_at(out, 40, disk_full), pytest.raises(UserError, match="disk is full"):
        write_report(out, record([trial("multitask", 0, 0.7)]))
    assert tree(out) == old
    write_report(out, record([trial("multitask", 0, 0.7)]))
    assert tree(out) != old and (out / "thesis.tex").read_text() == "mine"
    (out / "results.csv").write_text("mine")
    old = tree(out)
    with pytest.raises(UserError, match="results.csv"):
        write_report(out, study)
    assert tree(out) == old


def test_the_place_of_a_report_is_checked_before_the_store(user: Path, capsys: Any) -> None:
    (user / "report.md").write_text("mine")
    for out in (".", "report.md", "x" * 256):
        assert (
            report_main(["latest", "--tracking-uri", "sqlite:///nowhere/mlflow.db", "--out", out])
            == 2
        )
        assert "mlflow" not in one_sentence(capsys) and tree(user) == {"report.md": b"mine"}


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
        assert (
            exit_status(lambda more=more: train_command(small, "", "", (), [*options, *more])) == 2
        )
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert "checkpoint-000002 of an earlier training" in said[0] and "--resume" in said[0]
        assert tree(user) == before
    assert exit_status(lambda: train_command(small, "", "", (), [*resumed, "--resume"])) == 0
    assert newest_checkpoint(user / "out").name == "checkpoint-000002"
    assert tree(user) == before


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
        assert (
            len(
                [
                    line
                    for line in capsys.readouterr().err.splitlines()
                    if line.startswith("error: ")
                ]
            )
            == 1
        )
        assert tree(user) == before
