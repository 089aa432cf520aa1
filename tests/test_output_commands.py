"""Every command that writes where the user says: the address first, others' files untouched, whatever stops it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dnd.errors import DndError
from dnd.output import RECORD, STAGE, Output
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from stopping import OTHERS, disk_full, interrupt, stopped_at, tree
from test_report import record, trial
from test_serving import answer, answering

from llgbm.__main__ import main
from llgbm.bundle import GeneratorBundle
from llgbm.conditions import BaseModelEncoder
from llgbm.dataset import Standardiser
from llgbm.generator import GeneratorConfig, make_generator
from llgbm.lora import LoraBatch, LoraSpec, adapter_config, load_adapter, save_adapter
from llgbm.models import Base
from llgbm.runtime import UserError
from tuning.report import write_report
from tuning.report.__main__ import main as report_main

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PROMPTS = {"train": ["count : a b =>", "count : c =>"], "evaluation": ["count : d e =>"]}


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in captured.err and captured.out == "", captured.err
    return lines[0]


@pytest.fixture(scope="module")
def bundle(
    tiny_base: Base, tiny_spec: LoraSpec, tiny_adapters: LoraBatch, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An untrained generator of adapters for the tiny base."""
    folder = tmp_path_factory.mktemp("bundle")
    config = GeneratorConfig(hidden=16)
    facts = {"size": "tiny", "base_path": tiny_base.path, "base_hash": tiny_base.hash, "bank_hash": "b"}
    width = BaseModelEncoder(tiny_base).width
    generator = make_generator(config, tiny_spec, width, Standardiser.fit(tiny_adapters.flatten(tiny_spec)), seed=0)
    GeneratorBundle.save(folder, generator, config, {**facts, "encoder": f"base:{tiny_base.hash}"})
    return folder


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    with answering(answer()) as url:
        yield url


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
def commands(bundle: Path, served: str, source: Path, tiny_base: Base, tmp_path_factory: Any) -> dict[str, list[str]]:
    """Each command but for its `--out`."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("reverse it : guitar piano =>\n")
    bank = ["bank", "import", str(source), "--base", tiny_base.path, "--trajectories", "1", "--max-tokens", "2"]
    return {
        "generate": ["generate", "--model", str(bundle), "--prompts", str(prompts)],
        "fetch": ["fetch", "--url", served, "--prompts", str(prompts)],
        "bank": bank,
        "teachers": ["teachers", "--base", tiny_base.path, "--data", "nowhere/at-all", "--tasks", "river"],
    }


NAMES = ("generate", "fetch", "bank")


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, which is the current one."""
    folder = tmp_path / "user"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(others=OTHERS, at=st.integers(0, 120), stop=st.sampled_from([disk_full, interrupt]), out=st.sampled_from("nb."))
def test_no_command_that_fails_anywhere_loses_a_file(
    name: str, others: Any, at: int, stop: Any, out: str, commands: Any, user: Path
) -> None:
    """`n`: a new folder, `b`: one beside which and in which the user has files, `.`: the current one."""
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


@pytest.mark.parametrize("name", [*NAMES, "teachers"])
def test_an_address_that_cannot_be_written_is_refused_before_the_work(
    name: str, commands: Any, user: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (user / "file").write_text("mine")
    (user / "dangling").symlink_to("nowhere")
    (user / "circle").symlink_to("circle")
    before = tree(user)
    command = list(commands[name])
    # Were the work begun, another sentence would be said first.
    given = command.index({"generate": "--model", "fetch": "--url"}.get(name, "--base")) + 1
    command[given] = "http://127.0.0.1:9" if name == "fetch" else "nowhere/at-all"
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
    for place in ("thesis.tex", "checkpoint-500/optimizer.pt"):
        (user / place).parent.mkdir(exist_ok=True)
        (user / place).write_bytes(b"mine")
    before = tree(user)
    for _ in range(2):
        assert main([*commands[name], "--out", "."]) == 0
        after = tree(user)
        assert set(after) - set(before) == {WEIGHTS, CONFIG, RECORD} and {k: after[k] for k in before} == before
    capsys.readouterr()
    (user / CONFIG).write_text("{}")
    before = tree(user)
    assert main([*commands[name], "--out", "."]) == 2
    assert CONFIG in one_sentence(capsys) and tree(user) == before


@pytest.mark.parametrize("name", ["generate", "fetch"])
def test_a_training_folder_keeps_everything(name: str, commands: Any, user: Path, capsys: Any) -> None:
    for place in (CONFIG, WEIGHTS, "README.md", "optimizer.pt", "checkpoint-500/trainer_state.json"):
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
        assert os.readlink(user / "link") == "real" and set(tree(user / "real")) == {WEIGHTS, CONFIG, RECORD}
    assert main([*commands["generate"], "--out", "~/deep/er"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["adapter"] == str(user / "deep" / "er")
    assert load_adapter(user / "deep" / "er").keys() == load_adapter(user / "real").keys()
    assert not (user / "~").exists()


def test_names_of_255_letters_are_written(commands: Any, user: Path) -> None:
    for _ in range(2):
        assert main([*commands["generate"], "--out", "x" * 255]) == 0
    assert set(tree(user / ("x" * 255))) == {WEIGHTS, CONFIG, RECORD}


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
    assert set(tree(mounted)) == {WEIGHTS, CONFIG, RECORD}
    assert all(torch.equal(value, state[key]) for key, value in load_adapter(mounted).items())
    assert main([*commands["bank"], "--out", "mounted/bank"]) == 0
    assert not [p for p in user.rglob("*") if p.name.startswith(STAGE)]


def test_a_full_disk_is_said_before_the_work(user: Path, commands: Any, capsys: Any) -> None:
    folder = user / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        (folder / "mine").write_bytes(bytes(60_000))
        before = tree(folder)
        for name in NAMES:
            assert main([*commands[name], "--out", "small"]) == 2
            assert "the disk is full" in one_sentence(capsys) and tree(folder) == before
            assert main([*commands[name], "--out", "small/new"]) == 2
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
        with pytest.raises(DndError, match="the disk is full"), Output(folder / "out", ("big",)).writing() as stage:
            if library == "safetensors":
                save_file(big, stage / "big")
            with (stage / "big").open("wb") as stream:
                torch.save(big, stream)
        assert tree(folder) == {}
    finally:
        subprocess.run(["umount", str(folder)], check=True)


KILLED = """
import sys, torch
from llgbm.lora import save_adapter, load_adapter
from pathlib import Path
states = [{"base_model.model.q_proj.lora_A.weight": torch.full((64, 4096), float(i)),
           "base_model.model.q_proj.lora_B.weight": torch.full((4096, 64), float(i))} for i in (1, 2)]
print("ready", flush=True)
while True:
    for i in (0, 1):
        save_adapter(Path(sys.argv[1]), states[i], {"r": 64, "lora_alpha": i + 1, "target_modules": ["q_proj"]})
"""


def test_kill_9_of_a_program_that_writes_again_and_again(tmp_path: Path) -> None:
    """The two adapters differ in weights and config: a mix would be seen."""
    folder = tmp_path / "adapter"
    for delay in (0.07, 0.23):
        command = [sys.executable, "-c", KILLED, str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        while not folder.exists():
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        config, state = json.loads((folder / CONFIG).read_text()), load_adapter(folder)
        assert {value.unique().item() for value in state.values()} == {float(config["lora_alpha"])}
    save_adapter(folder, {"x.lora_A.weight": torch.ones(1, 1)}, {"r": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"] and set(tree(folder)) == {WEIGHTS, CONFIG, RECORD}


def test_a_report_replaces_only_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, study = tmp_path / "out", record([trial("weight-only", 0, 0.5), trial("multitask", 0, 0.7)])
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
        assert report_main(["latest", "--tracking-uri", "sqlite:///nowhere/mlflow.db", "--out", out]) == 2
        assert "mlflow" not in one_sentence(capsys) and tree(user) == {"report.md": b"mine"}
