"""Own files in a folder: what was written is recorded, changes that were cut off are undone, folders change names.

`dnd.output` says what for.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

RECORD = ".llgbm-output.json"
STAGE = ".llgbm-writing-"
VERSION = 1
PROBE_BYTES = 1 << 16
AT_FDCWD, RENAME_EXCHANGE = -100, 2


def probe_disk(folder: Path) -> None:
    """Write and flush a file without a name. Raises OSError where the folder takes no files."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(bytes(PROBE_BYTES))
        probe.flush()
        os.fsync(probe.fileno())


def is_current(folder: Path) -> bool:
    """Say if this is the folder that the program was started in."""
    with suppress(FileNotFoundError):
        return os.path.samefile(folder, os.curdir)
    return False


def keep_copy(path: Path, copy: Path) -> None:
    """Give a file a second name, or copy it where the file system has no links."""
    try:
        os.link(path, copy)
    except OSError:
        shutil.copy2(path, copy)
        flush(copy)


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_among(path: Path, digests: Sequence[str]) -> bool:
    """Say if a regular file has one of these contents."""
    return bool(digests) and not path.is_symlink() and path.is_file() and digest_of(path) in digests


def read_record(folder: Path) -> dict[str, list[str]]:
    """Files that this program wrote into a folder, with their SHA-256; none where there is no readable record."""
    return _record(folder).get("files", {})


def _record(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        files = {
            str(name): [str(digest) for digest in digests]
            for name, digests in found["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    inside = {name: digests for name, digests in files.items() if Path(name).name == name}
    return {"files": inside, "unfinished": found.get("unfinished")}


def write_record(
    folder: Path, files: dict[str, list[str]], stage: Path | None = None, finished: bool = True
) -> None:
    """Record own files, whole or not at all, by way of a stage; while not `finished`, the record names the stage."""
    content = {
        "version": VERSION,
        "files": files,
        **({} if finished or stage is None else {"unfinished": stage.name}),
    }
    aside = (stage or folder) / f"{RECORD}.new"
    with aside.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, folder / RECORD)


def own_files(folder: Path) -> set[str]:
    """Files in a folder that are still as this program wrote them."""
    return {
        name for name, digests in read_record(folder).items() if is_among(folder / name, digests)
    }


@contextmanager
def staged(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent` with an empty `new` in it, and remove it afterwards."""
    clear_leftovers(parent)
    stage = Path(tempfile.mkdtemp(prefix=f"{STAGE}{os.getpid()}-", dir=parent))
    try:
        with locked(stage):
            (stage / "new").mkdir()
            yield stage
    finally:
        for _ in range(2):  # an error in between is no reason to leave it
            shutil.rmtree(stage, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Undo and remove what killed commands left unfinished in a folder."""
    pattern = re.compile(re.escape(STAGE) + r"(\d+)-\w+")
    for name in os.listdir(folder):
        match, stage = pattern.fullmatch(name), folder / name
        if match and stage.is_dir() and not stage.is_symlink() and not is_running(int(match[1])):
            with locked(stage, wait=False) as alone:
                if alone:
                    undo(folder, stage)
                    shutil.rmtree(stage, ignore_errors=True)


def undo(folder: Path, stage: Path) -> None:
    """Put back what was there before a swap from this stage, unless the swap was finished."""
    if _record(folder).get("unfinished") != stage.name:
        return
    old = stage / "old"
    before, own = read_record(old), own_files(folder)
    come = {name for name in own if not is_among(folder / name, before.get(name, []))}
    back = {name for name in os.listdir(old) if name in before}
    order = list(read_record(folder))  # in which the key is last
    if len(come | back) > 1 or not back:
        for name in reversed([name for name in order if name in come | back]):
            (folder / name).unlink(missing_ok=True)
    for name in [name for name in order if name in back]:
        os.replace(old / name, folder / name)
    if before:
        os.replace(old / RECORD, folder / RECORD)
    else:
        (folder / RECORD).unlink()
    flush(folder)


def is_running(pid: int) -> bool:
    """Say if there is a process of this number other than this one."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a folder against other programs that do the same; yields False where another holds it and `wait` is off."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        alone = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            alone = False
        except OSError:  # a file system without locks
            alone = wait
        yield alone
    finally:
        os.close(handle)


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = [ctypes.c_char_p(os.fsencode(path)) for path in (one, other)]
    return (
        rename is not None and rename(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0
    )


def make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it; return the ones that were made, the innermost first."""
    missing = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def flush_tree(folder: Path) -> None:
    """Flush a folder with all that is in it to the disk."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
