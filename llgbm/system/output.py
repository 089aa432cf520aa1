"""Folders that a user names for output, as `dnd.output` keeps them, with this package's error for people."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from dnd import output
from dnd.output import ADAPTER_PATTERNS, STAGE, flush, flush_tree, make_folders
from dnd.own_files import own_files

from llgbm.runtime import UserError, say

__all__ = [
    "ADAPTER_PATTERNS",
    "STAGE",
    "Output",
    "carded_output",
    "check_name",
    "disk_errors",
    "flush",
    "flush_tree",
    "make_folders",
    "named_path",
    "sample_outputs",
]

CARD = "README.md"
MOST_SAMPLES = 1000


class Output(output.Output):
    """Folder that files are written into. Raises UserError where it cannot be, or holds others' files."""

    error = UserError


def carded_output(path: str | Path, patterns: Sequence[str] = ADAPTER_PATTERNS) -> Output:
    """Check a folder for an adapter with a README card; a README of the user's own stays, and no card is written.

    Raises UserError as `Output`.
    """
    output = Output(path, patterns)
    folder = output.folder
    if (folder / CARD).exists() and CARD not in own_files(folder):
        say(f"{output.path} has a {CARD} of its own, which stays: no card is written")
        return output
    return Output(path, (CARD, *patterns))


def sample_outputs(folder: str | Path, samples: int) -> list[Output]:
    """Check the folders `sample_<number>` in a folder for as many adapters.

    Raises UserError for less than one, as `carded_output`, and for samples there that this call would not replace.
    """
    if not 1 <= samples <= MOST_SAMPLES:
        raise UserError(f"{samples} samples asked for; it must be from 1 to {MOST_SAMPLES}")
    names = [f"sample_{number}" for number in range(samples)]
    outputs = [carded_output(Path(folder) / name) for name in names]
    above = outputs[0].folder.parent
    others = sorted(p.name for p in above.glob("sample_*") if p.name not in names)
    if others:
        raise UserError(f"{folder} holds {others[0]!r} of an earlier call: name another folder")
    return outputs


def disk_errors(folder: Path) -> AbstractContextManager[None]:
    """Turn what a full or unwritable disk raises into a UserError that names the folder."""
    return output.disk_errors(folder, UserError)


def check_name(name: str, what: str) -> str:
    """Return a name that a folder inside an output can bear. Raises UserError for one that leads elsewhere."""
    return output.check_name(name, what, UserError)


def named_path(text: str) -> Path:
    """Read an option that names a file or a folder, in a home too; an empty one (a variable that was not set) is
    refused."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: name a folder")
    with suppress(RuntimeError):  # no such user: refused when the output is checked
        return Path(text).expanduser()
    return Path(text)
