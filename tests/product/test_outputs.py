"""Nothing of the user's is destroyed: every command that writes where the user says, stopped at any point."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from dnd import output as mechanism
from dnd.commands import exit_status, generate_command, train_command
from dnd.errors import DndError
from dnd.output import RECORD, STAGE, Output, check_name
from dnd.training import TrainSettings, newest_checkpoint
from helpers import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from stopping import PATTERNS, disk_full, interrupt, kill, killed_write, stopped_at, write
from test_dnd_training import options_of
from test_report import record, trial
from test_serving import answer, answering

from llgbm.__main__ import main
from llgbm.generator import GeneratorConfig, make_generator
from llgbm.generator.bundle import GeneratorBundle
from llgbm.generator.conditions import BaseModelEncoder
from llgbm.generator.networks import Standardiser
from llgbm.lora.adapters import LoraBatch, LoraSpec, adapter_config, load_adapter, save_adapter
from llgbm.models.load import Base
from llgbm.runtime import UserError
from llgbm.teachers.bank import read_manifest, show_bank
from llgbm.teachers.imported import find_adapters
from llgbm.teachers.writer import BankWriter, NewAdapter
from llgbm.world import World
from tuning.report import write_report
from tuning.report.__main__ import main as report_main

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PROMPTS = {"train": ["count : a b =>", "count : c =>"], "evaluation": ["count : d e =>"]}


def tree(folder: Path) -> dict[str, bytes | str | None]:
    """All below a folder: a file's bytes, a link's target, None for a folder."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in captured.err and captured.out == "", captured.err
    return lines[0]


def own_of(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in PATTERNS if (folder / name).is_file()}


def others_of(folder: Path) -> dict[str, bytes | str | None]:
    """All but the output; nothing where there is no folder."""
    return {
        k: v
        for k, v in tree(folder).items()
        if k not in (*PATTERNS, RECORD) and not k.startswith(STAGE)
    }


OWN = st.dictionaries(st.sampled_from(["a", "b"]), st.text("xyz", max_size=3)).map(
    lambda d: {**d, "key": "k"}
)
OTHERS = st.dictionaries(
    st.sampled_from(
        ["thesis.tex", "checkpoint-500/optimizer.pt", ".hidden", "a.bak", "runs/a", "lost+found/x"]
    ),
    st.binary(max_size=5),
)
STOPS = st.sampled_from([disk_full, interrupt, kill])


def prepare(folder: Path, old: dict[str, str] | None, others: dict[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if old:
        write(folder, old)
    for name, content in others.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(STAGE)]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    old=st.none() | OWN,
    new=OWN,
    others=OTHERS,
    at=st.integers(0, 60),
    stop=STOPS,
    in_place=st.booleans(),
)
def test_whatever_stops_an_output_old_or_new_is_whole_and_the_rest_as_it_was(
    tmp_path: Path, old: Any, new: Any, others: Any, at: int, stop: Any, in_place: bool
) -> None:
    """`in_place` writes into the current folder, which cannot be exchanged for another."""
    folder = tmp_path / "out"
    prepare(folder, old, others)
    was, before = others_of(folder), own_of(folder)
    in_place = in_place and folder.exists()
    current, out = (folder, Path(".")) if in_place else (tmp_path, folder)
    with contextlib.chdir(current):
        if stop is kill:
            killed_write(tmp_path, at, out, new, current)
        else:
            with stopped_at(tmp_path, at, stop), suppress(DndError, KeyboardInterrupt):
                write(out, new)
            assert stop is interrupt or not leftovers(tmp_path)
        found = own_of(folder)
        assert found in (before, new) or "key" not in found  # which is not read
        assert others_of(folder) == was
        Output(out, PATTERNS)  # the next command
        assert own_of(folder) in (before, new)
        write(out, new)
    assert own_of(folder) == new and others_of(folder) == was and not leftovers(tmp_path)


@pytest.mark.parametrize("others", [{}, {"thesis.tex": b"mine"}], ids=["alone", "beside"])
def test_old_or_new_is_whole_at_every_point_of_a_change_of_several_files(
    tmp_path: Path, others: dict[str, bytes]
) -> None:
    folder = tmp_path / "out"
    old, new = {"a": "1", "b": "1", "key": "1"}, {"a": "2", "key": "2"}
    ends = []
    for at in range(120):
        prepare(folder, old, others)
        lived = killed_write(tmp_path, at, folder, new, tmp_path)
        found = own_of(folder)
        assert found in (old, new) or (others and "key" not in found)
        Output(folder, PATTERNS)
        assert own_of(folder) in (old, new) and others_of(folder) == others
        ends.append(own_of(folder) == new)
        if lived:
            break
    assert lived and ends == sorted(ends) and not ends[0] and len(ends) > 20


@pytest.mark.parametrize("same", ["key", ""])
def test_what_a_kill_left_is_undone_even_by_commands_that_are_killed(
    tmp_path: Path, same: str
) -> None:
    folder, others = tmp_path / "out", {"thesis.tex": b"mine"}
    old = {"a": "1", "b": "1", "key": "1"}
    new = {**{"a": "2", "b": "2", "key": "2"}, **({same: "1"} if same else {})}
    for at in (30, 32, 34, 36):
        for again in range(2, 12, 3):
            prepare(folder, old, others)
            for point in (at, again):
                assert not killed_write(folder, point, folder, new, tmp_path)
                found = own_of(folder)
                assert found in (old, new) or "key" not in found
            Output(folder, PATTERNS)
            assert (
                own_of(folder) in (old, new)
                and others_of(folder) == others
                and not leftovers(folder)
            )


def test_only_own_files_are_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(folder, {"a": "1", "key": "1"})
    (folder / "a").write_text("changed by hand")
    before = tree(folder)
    with pytest.raises(DndError, match="'a', which this program did not write"):
        write(folder, {"key": "2"})
    assert tree(folder) == before
    (folder / "a").unlink()
    (folder / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("1")
    with pytest.raises(DndError, match="did not write"):
        write(folder, {"a": "2", "key": "2"})
    assert (tmp_path / "elsewhere").read_text() == "1"


def test_a_file_that_comes_while_the_work_is_done_is_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(DndError, match="did not write"),
        Output(tmp_path / "out", ("a",)).writing() as stage,
    ):
        (stage / "a").write_text("new")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("mine")
    assert tree(tmp_path) == {"out": None, "out/a": b"mine"}


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/abs",
        "a\\b",
        "x\0y",
        "new\nline",
        " ",
        "a.",
        ".hidden",
        "CON",
        "nul.txt",
        "x" * 201,
    ],
)
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(DndError, match="cannot name a folder"):
        check_name(name, "the task")


@pytest.mark.parametrize(
    "name", ["ARC-e", "Human_Eval", "checkpoint-50", "große Aufgabe", "lr=1e-4,seed=0", "connect"]
)
def test_names_of_tasks_are_taken(name: str) -> None:
    assert check_name(name, "the task") == name


@pytest.fixture(scope="module")
def bundle(
    tiny_base: Base,
    tiny_spec: LoraSpec,
    tiny_adapters: LoraBatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """An untrained generator of adapters for the tiny base."""
    folder = tmp_path_factory.mktemp("bundle")
    config = GeneratorConfig(hidden=16)
    facts = {
        "size": "tiny",
        "base_path": tiny_base.path,
        "base_hash": tiny_base.hash,
        "bank_hash": "b",
    }
    width = BaseModelEncoder(tiny_base).width
    generator = make_generator(
        config, tiny_spec, width, Standardiser.fit(tiny_adapters.flatten(tiny_spec)), seed=0
    )
    GeneratorBundle.save(folder, generator, config, {**facts, "encoder": f"base:{tiny_base.hash}"})
    return folder


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    with answering(answer()) as url:
        yield url


@pytest.fixture(scope="module")
def source(
    tiny_base: Base,
    tiny_spec: LoraSpec,
    tiny_adapters: LoraBatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Adapters of two tasks with prompts, as someone else left them."""
    root = tmp_path_factory.mktemp("source")
    for place, state in zip(("one", "two"), tiny_adapters.to_state_dicts(), strict=False):
        save_adapter(root / place, state, adapter_config(tiny_spec, tiny_base.path))
        (root / place / RECORD).unlink()
        (root / place / "prompts.json").write_text(json.dumps(PROMPTS))
    return root


@pytest.fixture(scope="module")
def commands(
    bundle: Path, served: str, source: Path, tiny_base: Base, tmp_path_factory: Any
) -> dict[str, list[str]]:
    """Each command but for its `--out`."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("reverse it : guitar piano =>\n")
    bank = [
        "bank",
        "import",
        str(source),
        "--base",
        tiny_base.path,
        "--trajectories",
        "1",
        "--max-tokens",
        "2",
    ]
    return {
        "generate": ["generate", "--model", str(bundle), "--prompts", str(prompts)],
        "fetch": ["fetch", "--url", served, "--prompts", str(prompts)],
        "bank": bank,
        "teachers": [
            "teachers",
            "--base",
            tiny_base.path,
            "--data",
            "nowhere/at-all",
            "--tasks",
            "river",
        ],
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
    prepare(user / "x", None, {})
    for place in ("thesis.tex", "checkpoint-500/optimizer.pt"):
        (user / place).parent.mkdir(exist_ok=True)
        (user / place).write_bytes(b"mine")
    before = tree(user)
    for _ in range(2):
        assert main([*commands[name], "--out", "."]) == 0
        after = tree(user)
        assert (
            set(after) - set(before) == {WEIGHTS, CONFIG, RECORD}
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
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True
    ).returncode:
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


KILLED = """
import sys, torch
from llgbm.lora.adapters import save_adapter, load_adapter
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
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"] and set(tree(folder)) == {
        WEIGHTS,
        CONFIG,
        RECORD,
    }


@pytest.mark.parametrize("place", ["..", ".", "../one/.."])
def test_no_adapter_is_taken_over_to_a_place_outside_the_bank(
    place: str,
    source: Path,
    tiny_base: Base,
    user: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(source / "one", user / "work" / "one")
    inside = user / "work" / "one" / "deeper"
    inside.mkdir()
    monkeypatch.chdir(inside if place == ".." else inside.parent)
    before = tree(user)
    command = [
        "bank",
        "import",
        place,
        "--base",
        tiny_base.path,
        "--trajectories",
        "1",
        "--max-tokens",
        "2",
    ]
    odd = ("../../x", "/abs", "", "..", "a/b", "x\0", "nul")
    for more in (
        ([], *(["--task", task] for task in odd))
        if place != "../one/.."
        else (["--task", "../../x"],)
    ):
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
    for place, out in (
        ("src", "src/bank"),
        (str(user / "src"), "src/bank"),
        ("./src/../src", str(user / "src/bank")),
    ):
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


def test_what_a_killed_import_left_is_finished_by_the_next(commands: Any, user: Path) -> None:
    assert main([*commands["bank"], "--out", "whole"]) == 0
    command = [sys.executable, "-m", "llgbm", *commands["bank"], "--out", "bank"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (user / "bank" / "checkpoints").exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not show_bank(user / "bank")["finished"]
    (user / "bank" / ".manifest.json.writing").write_text("{")
    assert main([*commands["bank"], "--out", "bank"]) == 0
    assert tree(user / "bank") == tree(user / "whole")


def test_what_lies_in_an_adapters_place_without_its_line_is_not_touched(
    tiny_base: Base, tiny_spec: LoraSpec, tiny_adapters: LoraBatch, tmp_path: Path
) -> None:
    bank = BankWriter(tmp_path / "bank", tiny_base, tiny_spec, {})
    state = tiny_adapters.to_state_dicts()[0]
    with bank.opened():
        bank.add([NewAdapter("one_0", "one", state, PROMPTS)])
        mine = tmp_path / "bank" / "checkpoints" / "one" / "one_1"
        mine.mkdir()
        (mine / WEIGHTS).write_text("mine")
        with pytest.raises(UserError, match="none of the bank's adapters"):
            bank.add([NewAdapter("one_1", "one", state, PROMPTS)])
        with pytest.raises(UserError, match="cannot name a folder"):
            bank.add([NewAdapter("one_2", "../../one", state, PROMPTS)])
        assert (mine / WEIGHTS).read_text() == "mine"
        (mine.parent / "one_0" / "notes.txt").write_text("mine")
        (mine.parent / "one_0" / WEIGHTS).write_bytes(b"torn")
        bank.add([NewAdapter("one_0", "one", state, PROMPTS)])
        assert (
            bank.missing(["one_0"]) == []
            and (mine.parent / "one_0" / "notes.txt").read_text() == "mine"
        )


def test_a_refused_command_leaves_no_half_bank(
    source: Path, tiny_base: Base, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["bank", "import", str(source), "--base", tiny_base.path, "--out", "new/bank"]

    def refuse(*_: Any) -> None:
        raise UserError("the chat template has no system turn: leave --chat out")

    # Stands for whatever is found out late; today a template that refuses the prompts.
    monkeypatch.setattr("llgbm.teachers.writer.greedy_answers", refuse)
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
    bank = BankWriter(tmp_path / "new" / "bank", tiny_base, tiny_spec, {})
    with pytest.raises(UserError), bank.opened():
        raise UserError("one run needs more memory than there is")
    assert not (tmp_path / "new").exists()
    with pytest.raises(KeyboardInterrupt), bank.opened():
        bank.add([NewAdapter("one_0", "one", tiny_adapters.to_state_dicts()[0], PROMPTS)])
        raise KeyboardInterrupt
    assert bank.missing(["one_0", "one_1"]) == ["one_1"]


def test_adapters_that_a_command_is_writing_are_none(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "src")
    shutil.copytree(source / "one", tmp_path / "src" / f"{STAGE}1-x" / "new")
    assert [f.task for f in find_adapters(str(tmp_path / "src"), None)] == ["one", "two"]


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


def test_the_mechanism_needs_nothing_but_python() -> None:
    code = "import sys, dnd.output; print([m for m in ('torch', 'numpy', 'llgbm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_without_an_exchange_files_are_moved_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mechanism, "exchange", lambda one, other: False)
    write(tmp_path / "out", {"a": "1", "b": "1", "key": "1"})
    write(tmp_path / "out", {"a": "2", "key": "2"})
    assert own_of(tmp_path / "out") == {"a": "2", "key": "2"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and set(tree(tmp_path / "out")) == {
        "a",
        "key",
        RECORD,
    }
