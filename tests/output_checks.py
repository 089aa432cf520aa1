"""Compare folders before and after a command, and draw old, new and foreign files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from dnd.output import RECORD, STAGE
from hypothesis import strategies as st
from stopping import PATTERNS, disk_full, interrupt, kill, write

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"

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


def write_foreign(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_text("mine")
