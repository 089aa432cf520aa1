"""Folders on disk named by what made them: written aside, flushed, renamed; never half there.

An entry is `<root>/<kind>/<key>/` plus an `entry.json` that lists every file with its size and SHA-256. An entry that
does not agree with its list is torn or foreign: it is thrown away and built again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from llgbm.runtime import UserError, logger, say

ENTRY_FILE = "entry.json"


def build_entry(root: Path, kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """Return the folder of entry `kind/key`, calling `build(folder)` first if there is no whole one.

    Concurrent builders of one entry wait for each other. A build that is killed leaves nothing that is used.
    Raises UserError where the folder cannot be written.
    """
    final = root / kind / key
    if entry_is_whole(final):
        say(f"{kind} {key}: cached")
        return final
    with disk_errors(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.parent / f".{key}.lock"):
            if not entry_is_whole(final):
                started = time.perf_counter()
                _build_aside(final, key, build)
                say(f"{kind} {key}: built in {time.perf_counter() - started:.0f} s")
    return final


def _build_aside(final: Path, key: str, build: Callable[[Path], None]) -> None:
    if final.exists():
        logger.warning("cache entry %s does not agree with its list of files: built again", final)
        shutil.rmtree(final)
    stage = final.parent / f".{key}.building"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    build(stage)
    listing = {str(p.relative_to(stage)): describe_file(p) for p in sorted(stage.rglob("*")) if p.is_file()}
    (stage / ENTRY_FILE).write_text(json.dumps({"key": key, "files": listing}, indent=1))
    publish_folder(stage, final)


def entry_is_whole(folder: Path) -> bool:
    """Say whether every file that the entry lists is there with the bytes it was written with."""
    listing_file = folder / ENTRY_FILE
    if not listing_file.is_file():
        return False
    try:
        listing = json.loads(listing_file.read_text())
        return listing["key"] == folder.name and all(
            (folder / name).is_file() and describe_file(folder / name) == described
            for name, described in listing["files"].items()
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def describe_file(path: Path) -> list[int | str]:
    """[size in bytes, SHA-256] of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return [path.stat().st_size, digest.hexdigest()]


def hash_files(paths: list[Path], length: int = 16) -> str:
    """Hash the contents of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(str(describe_file(path)).encode())
    return digest.hexdigest()[:length]


def publish_folder(stage: Path, final: Path) -> None:
    """Flush a finished folder to the disk and give it its name in one step."""
    for path in [*stage.rglob("*"), stage]:
        _flush(path)
    os.rename(stage, final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def output_folder(final: Path, mark: str) -> Iterator[Path]:
    """Yield a folder to fill; it becomes `final` only if the block ends well.

    An existing `final` is replaced if it is empty or holds the file `mark` (an older output of the same kind); else
    UserError is raised and it stays as it was.
    """
    if final.exists() and not (final.is_dir() and ((final / mark).is_file() or not any(final.iterdir()))):
        raise UserError(f"{final} exists and is no earlier output (it has no {mark}): name another folder")
    stage = final.parent / f".{final.name}.writing-{os.getpid()}"
    with disk_errors(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir()
        try:
            yield stage
            if final.exists():
                shutil.rmtree(final)
            publish_folder(stage, final)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what a full or unwritable disk raises into a UserError that names the folder."""
    reasons = {
        errno.ENOSPC: "the disk is full: free some space",
        errno.EDQUOT: "the disk quota is used up: free some space",
        errno.EACCES: "there is no permission to write there: name a folder that you own",
        errno.EPERM: "writing there is not permitted: name a folder that you own",
        errno.EROFS: "the file system is read-only: name another folder",
        errno.ENOTDIR: "a file stands where a folder is needed: name another folder",
        errno.EEXIST: "a file stands where a folder is needed: name another folder",
    }
    try:
        yield
    except OSError as error:
        if error.errno not in reasons:
            raise
        raise UserError(f"cannot write under {folder}: {reasons[error.errno]}") from error
