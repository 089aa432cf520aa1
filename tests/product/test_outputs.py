"""An output is old or new as a whole, whatever stops the program that writes it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from dnd import output as mechanism
from dnd.errors import DndError
from dnd.output import RECORD, Output, check_name
from helpers import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from output_checks import (
    CONFIG,
    OTHERS,
    OWN,
    STOPS,
    WEIGHTS,
    leftovers,
    others_of,
    own_of,
    prepare,
    tree,
)
from stopping import PATTERNS, disk_full, interrupt, kill, killed_write, stopped_at, write

from llgbm.lora.adapters import load_adapter, save_adapter


@pytest.mark.whole
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


@pytest.mark.whole
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


@pytest.mark.parametrize("stop", [disk_full, interrupt])
@pytest.mark.parametrize("others", [{}, {"thesis.tex": b"mine"}], ids=["alone", "beside"])
def test_an_error_at_any_point_of_a_change_leaves_the_old_or_the_new(
    tmp_path: Path, others: dict[str, bytes], stop: Any
) -> None:
    folder = tmp_path / "out"
    old, new = {"a": "1", "b": "1", "key": "1"}, {"a": "2", "key": "2"}
    ends = []
    for at in range(0, 90, 2):
        prepare(folder, old, others)
        with stopped_at(tmp_path, at, stop), suppress(DndError, KeyboardInterrupt):
            write(folder, new)
        assert own_of(folder) in (old, new) and others_of(folder) == others, at
        ends.append(own_of(folder) == new)
    assert False in ends and ends[-1]


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
