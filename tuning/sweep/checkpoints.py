"""Write and read checkpoints of trials in a folder or an object store, and lock trials.

`<storage>/<trial id>/step_00000100.pt` is one file: a SHA-256, then the training state as torch writes it. A file whose
hash does not agree is torn; the one before it is used.
"""

from __future__ import annotations

import hashlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from llgbm.runtime import UserError
from llgbm.system.output import disk_errors

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

logger = logging.getLogger("tuning.checkpoints")
KEPT = 2
HASH_BYTES = 32
LOCKS = "locks"
LOCK_SECONDS = 120.0


def open_storage(storage: str) -> tuple[FileSystem, str]:
    """Return the file system of a folder or URI (`file://`, `s3://`, `gs://`, ...) and the path in it.

    Raises UserError for a URI that names no known kind of store.
    """
    from pyarrow import ArrowException, fs

    if "://" not in storage:
        return fs.LocalFileSystem(), str(Path(storage).expanduser().resolve())
    try:
        files, path = fs.FileSystem.from_uri(storage)
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"trials cannot keep their state at {storage!r} ({reason}): name a folder, or an address of a store that "
            "pyarrow knows, such as s3://bucket/folder"
        ) from error
    return files, path


def check_storage(storage: str, trial_ids: Iterable[str] = ()) -> None:
    """Raise UserError unless these trials can keep their state there; a folder is made and written to."""
    from pyarrow import fs

    files, root = open_storage(storage)
    if not isinstance(files, fs.LocalFileSystem):
        return
    locks = Path(root) / LOCKS
    for folder in (Path(root), locks):
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    for trial_id in trial_ids:
        lock = locks / f"{trial_id}.lock"
        with _lock_errors(lock):
            if lock.exists():
                lock.open("a").close()


@contextmanager
def _lock_errors(lock: Path) -> Iterator[None]:
    try:
        yield
    except Timeout:
        raise
    except OSError as error:
        raise UserError(
            f"the lock {lock} cannot be opened ({error.strerror}): it may be another user's, so give a --storage-path "
            "of your own"
        ) from error


def join(storage: str, path: str) -> str:
    """Join a storage and a path; an object store's settings, after the question mark, stay at the end."""
    if "://" not in storage:
        return f"{storage.rstrip('/')}/{path}"
    address, mark, settings = storage.partition("?")
    return f"{address.rstrip('/')}/{path}{mark}{settings}"


def remove_folder(files: FileSystem, path: str) -> None:
    """Delete a folder and its content, if it exists."""
    from pyarrow import fs

    if files.get_file_info(path).type != fs.FileType.NotFound:
        files.delete_dir(path)


class TrialCheckpoints:
    """Write and read the checkpoints of one trial."""

    def __init__(self, storage: str, trial_id: str) -> None:
        self.files, root = open_storage(storage)
        self.folder = f"{root}/{trial_id}"

    def write(self, state: dict[str, Any]) -> None:
        """Write a state under its `step` atomically, and delete all but the newest older one."""
        stream = io.BytesIO()
        torch.save(state, stream)
        payload = stream.getbuffer()
        final = f"{self.folder}/step_{state['step']:08d}.pt"
        self.files.create_dir(self.folder, recursive=True)
        with self.files.open_output_stream(f"{final}.writing") as out:
            out.write(hashlib.sha256(payload).digest())
            out.write(payload)
        self.files.move(f"{final}.writing", final)
        for old in self._paths()[:-KEPT]:
            self.files.delete_file(old)

    def newest(self) -> dict[str, Any] | None:
        """Read the newest intact state, on the CPU; None if there is none."""
        for path in reversed(self._paths()):
            with self.files.open_input_stream(path) as source:
                content = source.read()
            if hashlib.sha256(memoryview(content)[HASH_BYTES:]).digest() == content[:HASH_BYTES]:
                return torch.load(
                    io.BytesIO(memoryview(content)[HASH_BYTES:]),
                    map_location="cpu",
                    weights_only=True,
                )
            logger.warning("checkpoint %s is torn: the one before it is used", path)
        return None

    def newest_name(self) -> str:
        """Return the file name of the last checkpoint, `start` if there is none."""
        names = [path.rpartition("/")[2] for path in self._paths()]
        return (names or ["start"])[-1]

    def remove(self) -> None:
        """Delete them all."""
        remove_folder(self.files, self.folder)

    def _paths(self) -> list[str]:
        from pyarrow import fs

        found = self.files.get_file_info(fs.FileSelector(self.folder, allow_not_found=True))
        return sorted(info.path for info in found if info.path.endswith(".pt"))


@contextmanager
def trial_lock(storage: str, trial_id: str) -> Iterator[None]:
    """Lock a trial so that a leftover worker and its replacement cannot write to it concurrently.

    Object stores have no locks; there nothing is locked. Raises UserError if the lock is not free within two minutes.
    """
    from pyarrow import fs

    files, root = open_storage(storage)
    if not isinstance(files, fs.LocalFileSystem):
        yield
        return
    folder = Path(root) / LOCKS
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{trial_id}.lock"
    # Whoever may write to the folder may lock: a lock has no content.
    lock = FileLock(path, timeout=LOCK_SECONDS, mode=0o666)
    try:
        with _lock_errors(path):
            lock.acquire()
    except Timeout as error:
        raise UserError(
            f"trial {trial_id} is being run by another process: wait for its end"
        ) from error
    try:
        yield
    finally:
        lock.release()
