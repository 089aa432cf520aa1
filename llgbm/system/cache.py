"""Content-addressed cache: folders are written aside, flushed and renamed, so that none is ever partial.

An entry is `<root>/<kind>/<key>/` plus an `entry.json` that lists every file with its size and SHA-256. An entry that
does not agree with its list is torn or foreign: it is thrown away and built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from llgbm.runtime import logger, say
from llgbm.system.output import disk_errors, flush, flush_tree

ENTRY_FILE = "entry.json"
# Raised when keys are made of more than before. Entries made earlier are left where they are and never read again.
KEYS_VERSION = 2


def build_entry(
    root: Path, kind: str, key: str, build: Callable[[Path], None], tell: bool = True
) -> Path:
    """Return the folder of entry `kind/key`; call `build(folder)` first if no complete one exists, and tell which.

    Concurrent builders of one entry wait for each other. A build that is killed leaves nothing that is used.
    Raises UserError where the folder cannot be written.
    """
    final = root / kind / key
    tell_user = say if tell else logger.debug
    if entry_is_whole(final):
        tell_user(f"{kind} {key}: cached")
        return final
    with disk_errors(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.parent / f".{key}.lock"):
            if not entry_is_whole(final):
                _tell_of_older(root)
                started = time.perf_counter()
                _build_aside(final, key, build)
                tell_user(f"{kind} {key}: built in {time.perf_counter() - started:.0f} s")
    return final


def _tell_of_older(root: Path) -> None:
    """Say once for a cache which entries of an earlier version are not read any more."""
    told = root / f".keys-{KEYS_VERSION}"
    if told.exists():
        return
    older: dict[str, int] = {}
    for file in root.glob(f"*/*/{ENTRY_FILE}"):
        if '"keys"' not in file.read_text(encoding="utf-8"):
            older[file.parents[1].name] = older.get(file.parents[1].name, 0) + 1
    if older:
        say(
            f"{root}: {', '.join(f'{count} {kind}' for kind, count in sorted(older.items()))} of an earlier version "
            "are built again, since their names left out part of what their numbers depend on; they can be deleted"
        )
    told.touch()


def _build_aside(final: Path, key: str, build: Callable[[Path], None]) -> None:
    stage, torn = final.parent / f".{key}.building", final.parent / f".{key}.torn"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    build(stage)
    listing = {
        str(p.relative_to(stage)): describe_file(p) for p in sorted(stage.rglob("*")) if p.is_file()
    }
    (stage / ENTRY_FILE).write_text(
        json.dumps({"key": key, "keys": KEYS_VERSION, "files": listing}, indent=1)
    )
    if final.exists():
        logger.warning("cache entry %s does not agree with its list of files: built again", final)
        shutil.rmtree(torn, ignore_errors=True)
        os.rename(final, torn)
    publish_folder(stage, final)
    shutil.rmtree(torn, ignore_errors=True)


def entry_is_whole(folder: Path) -> bool:
    """Check that every listed file exists with its size and SHA-256."""
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


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    stage = path.with_name(f".{path.name}.writing")
    try:
        with stage.open("w") as stream:
            json.dump(content, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(stage, path)
    except BaseException:
        stage.unlink(missing_ok=True)
        raise


def publish_folder(stage: Path, final: Path) -> None:
    """Flush a finished folder to the disk and give it its name in one step."""
    flush_tree(stage)
    os.rename(stage, final)
    flush(final.parent)
