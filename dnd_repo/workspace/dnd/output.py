"""Folders that a user names for output: checked before the work, filled whole, nothing of the user's replaced.

`.llgbm-output.json` in such a folder records the files that this program wrote, with their SHA-256. A file is the
program's own as long as it has the recorded bytes. Only such files are replaced; all others stay as they are.

A new folder appears by one rename, and one that holds nothing but own files is exchanged for its successor in one step.
Beside files of others, or where a folder cannot be renamed (a mount point, the current folder), files are renamed one
by one: the old ones are kept until the last is there, and what a kill leaves unfinished is undone by the next command.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from dnd.errors import DndError
from dnd.own_files import (
    RECORD,
    STAGE,
    clear_leftovers,
    digest_of,
    exchange,
    flush,
    flush_tree,
    is_among,
    is_current,
    keep_copy,
    locked,
    make_folders,
    own_files,
    probe_disk,
    read_record,
    staged,
    undo,
    write_record,
)

__all__ = [
    "ADAPTER_PATTERNS",
    "RECORD",
    "STAGE",
    "Output",
    "check_name",
    "disk_errors",
    "flush",
    "flush_tree",
    "make_folders",
]

# Files that an adapter's folder is read by; `adapter_config.json` comes last, as nothing is read without it.
ADAPTER_PATTERNS = (
    "adapter_model.safetensors",
    "adapter_model.safetensors.*",
    "adapter_model.bin",
    "adapter_config.json",
)
# Room for the names of files inside an output, in the longest path that the system takes.
INNER_BYTES = 128
WINDOWS_NAMES = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{kind}{i}" for kind in ("com", "lpt") for i in range(1, 10)),
}
REASONS = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EACCES: "there is no permission to write there: name a folder that you own",
    errno.EPERM: "writing there is not permitted: name a folder that you own",
    errno.EROFS: "the file system is read-only: name another folder",
    errno.ENOTDIR: "a file stands where a folder is needed: name another folder",
    errno.EEXIST: "a file stands where a folder is needed: name another folder",
    errno.ENOTEMPTY: "another program writes to the same folder: name another",
    errno.ENAMETOOLONG: "the name is too long: name a shorter one",
    errno.ELOOP: "the links on the way lead in a circle: name another folder",
    errno.EBUSY: "another file system is mounted over a file there: name another folder",
    errno.EXDEV: "it is spread over several file systems: name another folder",
    errno.EIO: "the disk reports an error: name a folder on another",
}


@contextmanager
def disk_errors(
    folder: Path, error: type[Exception] = DndError, every: bool = False
) -> Iterator[None]:
    """Turn what a full or unwritable disk raises into an `error` that names the folder; `every`: whatever it raises."""
    try:
        yield
    except Exception as raised:
        number = system_error(raised)
        if number is None or (number not in REASONS and not every):
            raise
        reason = REASONS.get(number, f"{os.strerror(number)}: name another folder")
        raise error(f"cannot write under {folder}: {reason}") from raised


def system_error(raised: Exception) -> int | None:
    """Return the system's number of an error; safetensors and torch raise their own kinds for a full disk."""
    if isinstance(raised, OSError):
        return raised.errno or 0
    if type(raised).__name__ == "SafetensorError" and (
        found := re.search(r"\(os error (\d+)\)", str(raised))
    ):
        return int(found[1])
    if "inline_container" in str(raised) and isinstance(raised.__context__, OSError):
        return raised.__context__.errno
    return None


def check_name(name: str, what: str, error: type[Exception] = DndError) -> str:
    """Return a name that a folder inside an output can bear. Raises `error` for one that leads elsewhere."""
    odd = not name.strip() or name.startswith((".", " ")) or name.endswith((".", " "))
    odd = odd or any(mark in "/\\" or not mark.isprintable() for mark in name)
    if odd or name.partition(".")[0].lower() in WINDOWS_NAMES or len(os.fsencode(name)) > 200:
        raise error(
            f"{what} {name[:80]!r} cannot name a folder: take at most 200 letters, digits, '-' or '_', and no separator"
        )
    return name


class Output:
    """Folder that files are written into; `patterns` match every name that is written.

    The file matched by the last pattern is the one that the others are not read without.
    """

    error: ClassVar[type[Exception]] = DndError

    def __init__(self, path: str | os.PathLike[str], patterns: Sequence[str]) -> None:
        """Check the address: raises `error` as `check`."""
        self.path, self.patterns = self._expanded(os.fspath(path)), tuple(patterns)
        self.check()

    def _expanded(self, text: str) -> Path:
        if not text or "\0" in text:
            raise self.error("the output has an empty or impossible name: name a folder")
        try:
            os.fsencode(text)
            return Path(text).expanduser()
        except UnicodeError as error:
            raise self.error(
                f"the output's name {text!r} is no text: name another folder"
            ) from error
        except RuntimeError as error:
            raise self.error(f"{text} names no known user: name another folder") from error

    @cached_property
    def folder(self) -> Path:
        """Folder itself, links followed."""
        try:
            return self.path.resolve()
        except (RuntimeError, OSError) as error:
            raise self.error(f"{self.path} cannot be followed to a folder: name another") from error

    def check(self) -> None:
        """Raise `error` where the folder could not be written, or a file of others bears a name that is written."""
        with disk_errors(self.path, self.error, every=True):
            for link in (self.path, *self.path.parents):
                if link.is_symlink() and not os.path.exists(link):
                    raise self.error(
                        f"{link} is a link to something that is not there: name another folder"
                    )
            there, missing = self._parted()
            if not there.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
            longest = max((len(os.fsencode(name)) for name in missing), default=0)
            length = len(os.fsencode(self.folder)) + INNER_BYTES
            if longest > os.pathconf(there, "PC_NAME_MAX") or length > os.pathconf(
                there, "PC_PATH_MAX"
            ):
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(self.path))
            probe_disk(there)
            if not missing:
                clear_leftovers(self.folder)
                self._refuse_foreign()

    def _parted(self) -> tuple[Path, list[str]]:
        """Return the nearest thing that exists, and the names below it that do not."""
        missing: list[str] = []
        for place in (self.folder, *self.folder.parents):
            try:
                os.stat(place)
                return place, missing
            except (FileNotFoundError, NotADirectoryError):
                missing.append(place.name)
        return Path("/"), missing

    def _refuse_foreign(self) -> None:
        """Raise `error` for a file of others with a name that is written."""
        own = own_files(self.folder)
        foreign = sorted(
            name for name in os.listdir(self.folder) if self._is_written(name) and name not in own
        )
        if foreign:
            raise self.error(
                f"{self.path} holds {foreign[0]!r}, which this program did not write (or which was changed since): "
                "name another folder, or move it away"
            )

    def _is_written(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Yield an empty folder to fill with files; they take their places only if the block ends well."""
        made = []
        with disk_errors(self.path, self.error):
            try:
                made = make_folders(self.folder.parent)
                with staged(self.folder if self._must_stay() else self.folder.parent) as stage:
                    yield stage / "new"
                    self._publish(stage)
            except BaseException:
                for folder in made:
                    with suppress(OSError):
                        folder.rmdir()
                raise

    def remove(self) -> None:
        """Remove own files, then the folder if nothing of others is left in it."""
        with disk_errors(self.path, self.error), locked(self.folder):
            for name in reversed(self._key_last(own_files(self.folder))):
                (self.folder / name).unlink()
            (self.folder / RECORD).unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()

    def _must_stay(self) -> bool:
        """Say if the folder must not be exchanged for another: the current folder, or one in a closed parent."""
        folder = self.folder
        if not folder.is_dir():
            return False
        return is_current(folder) or not os.access(folder.parent, os.W_OK | os.X_OK)

    def _publish(self, stage: Path) -> None:
        new = stage / "new"
        names = self._key_last(path.name for path in new.iterdir())
        odd = [name for name in names if not self._is_written(name)]
        if odd or not names:
            raise ValueError(
                f"an output of {', '.join(self.patterns)} was filled with {odd or 'nothing'}"
            )
        write_record(new, {name: [digest_of(new / name)] for name in names})
        flush_tree(new)
        if not os.path.lexists(self.folder):
            os.rename(new, self.folder)
            return flush(self.folder.parent)
        with locked(self.folder):
            self._refuse_foreign()
            if not self._exchange(stage):
                self._fill(stage)

    def _exchange(self, stage: Path) -> bool:
        """Take the place of a folder that holds only own files, in one step; False where that cannot be done."""
        others = set(os.listdir(self.folder)) - own_files(self.folder) - {RECORD}
        if others or stage.parent == self.folder or self._must_stay():
            return False
        now, new = os.stat(self.folder), stage / "new"
        os.chmod(new, stat.S_IMODE(now.st_mode))
        with suppress(PermissionError):
            os.chown(new, now.st_uid, now.st_gid)
        if not exchange(new, self.folder):
            return False
        # What another program put there in the last moment.
        for name in set(os.listdir(new)) - own_files(new) - {RECORD}:
            os.rename(new / name, self.folder / name)
        flush(self.folder.parent)
        return True

    def _fill(self, stage: Path) -> None:
        """Put the new files in one by one, and take out own ones that have no successor."""
        if stage.parent == self.folder:
            return self._swap(stage)
        with staged(self.folder) as inner:
            shutil.copytree(stage / "new", inner / "new", dirs_exist_ok=True)
            flush_tree(inner)
            self._swap(inner)

    def _swap(self, stage: Path) -> None:
        folder, new, old = self.folder, stage / "new", stage / "old"
        before, after = read_record(folder), read_record(new)
        own = own_files(folder)
        going = {name for name in own if not is_among(folder / name, after.get(name, []))}
        coming = {name for name in after if not is_among(folder / name, after[name])}
        if (
            len(going | coming) > 1
        ):  # nothing may be read meanwhile, so the key leaves first, and comes last
            going |= {name for name in own if self._is_key(name)}
            coming |= {name for name in after if self._is_key(name)}
        both = {
            n: [*before.get(n, []), *after.get(n, [])] for n in self._key_last({*before, *after})
        }
        old.mkdir()
        write_record(old, before)
        flush_tree(old)
        try:
            write_record(folder, both, stage, finished=False)
            for name in reversed(self._key_last(going)):
                if going == coming == {name}:
                    keep_copy(folder / name, old / name)
                else:
                    os.rename(folder / name, old / name)
            for name in self._key_last(coming):
                os.replace(new / name, folder / name)
            flush(folder)
            write_record(folder, after, stage)
        except BaseException:
            undo(folder, stage)
            raise

    def _key_last(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: (self._is_key(name), name))

    def _is_key(self, name: str) -> bool:
        return fnmatchcase(name, self.patterns[-1])
