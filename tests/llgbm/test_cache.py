"""Caches under kill -9, torn files, full disks and two builders at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llgbm.runtime import UserError
from llgbm.system.cache import build_entry, entry_is_whole
from llgbm.world import World, WorldConfig, build_world, smoke_world

BUILD = """
import sys, torch
from pathlib import Path
from llgbm.world import WorldConfig, build_world, smoke_world
torch.set_num_threads(1)
build_world(Path(sys.argv[1]), smoke_world(WorldConfig()), "cpu")
"""


def start_build(root: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", BUILD, str(root)], stderr=subprocess.DEVNULL)


def kill_while_building(root: Path, kind: str) -> None:
    """Kill -9 a real build of a world at the moment when an entry of this kind is being written."""
    process = start_build(root)
    try:
        while process.poll() is None:
            if any((root / kind).glob(".*.building")):
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.001)
        assert process.wait() == -signal.SIGKILL, f"the build ended before {kind} was written"
    finally:
        process.kill()


WHOLE = pytest.mark.whole


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("bases", marks=WHOLE),
        pytest.param("banks", marks=WHOLE),
        pytest.param("deltas", marks=WHOLE),
        "conditions",
    ],
)
def test_a_build_killed_midway_leaves_nothing_that_is_used(
    kind: str, world: World, cache: Path, tmp_path: Path
) -> None:
    root = tmp_path / "cache"
    shutil.copytree(cache, root)
    wanted = {entry.name for entry in (root / kind).iterdir() if entry.is_dir()}
    shutil.rmtree(root / kind)

    kill_while_building(root, kind)

    left = {
        entry.name
        for entry in (root / kind).iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    }
    assert all(entry_is_whole(root / kind / name) for name in left)
    assert left < wanted
    again = build_world(root, smoke_world(WorldConfig()), "cpu")
    assert {e.name for e in (root / kind).iterdir() if e.is_dir()} == wanted
    assert not list(root.rglob("*.building"))
    assert torch.equal(again.data.values_AV, world.data.values_AV)
    assert torch.equal(again.data.conditions.train_ANC, world.data.conditions.train_ANC)
    assert torch.equal(again.data.loss_deltas.delta_APQD, world.data.loss_deltas.delta_APQD)


def write_two_files(folder: Path) -> None:
    (folder / "weights").write_bytes(bytes(range(200)))
    (folder / "inner").mkdir()
    (folder / "inner" / "list.json").write_text(json.dumps([1, 2]))


def test_a_build_that_raises_leaves_no_entry(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        write_two_files(folder)
        raise RuntimeError("midway")

    with pytest.raises(RuntimeError):
        build_entry(tmp_path, "kind", "key", broken)
    assert not (tmp_path / "kind" / "key").exists()
    assert entry_is_whole(build_entry(tmp_path, "kind", "key", write_two_files))


@settings(max_examples=25, deadline=None)
@given(place=st.integers(0, 199), value=st.integers(0, 255), cut=st.booleans())
def test_any_changed_byte_or_cut_makes_an_entry_be_built_again(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int, cut: bool
) -> None:
    root = tmp_path_factory.mktemp("torn")
    file = build_entry(root, "kind", "key", write_two_files) / "weights"
    content = bytearray(file.read_bytes())
    if cut:
        content = content[:place]
    elif content[place] == value:
        return
    else:
        content[place] = value
    file.write_bytes(content)

    assert not entry_is_whole(root / "kind" / "key")
    build_entry(root, "kind", "key", write_two_files)
    assert file.read_bytes() == bytes(range(200))


def test_a_whole_entry_is_not_built_twice(tmp_path: Path) -> None:
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        write_two_files(folder)

    assert build_entry(tmp_path, "kind", "key", build) == build_entry(
        tmp_path, "kind", "key", build
    )
    assert len(calls) == 1


@pytest.fixture
def full_disk(tmp_path: Path) -> Path:
    """A real file system of 256 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_sentence_and_no_entry(full_disk: Path) -> None:
    with pytest.raises(UserError, match="the disk is full"):
        build_entry(
            full_disk,
            "kind",
            "key",
            lambda folder: (folder / "big").write_bytes(b"x" * 2**20) and None,
        )
    assert not (full_disk / "kind" / "key").exists()


def test_a_file_in_the_place_of_the_cache_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        build_entry(tmp_path / "cache", "kind", "key", write_two_files)
