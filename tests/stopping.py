"""Commands that are stopped at a chosen call to the system: by a full disk, an interrupt, or kill -9."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dnd.output import Output
from hypothesis import strategies as st

CALLS = ("rename", "replace", "link", "mkdir", "unlink", "rmdir", "fsync", "open")
PATTERNS = ("a", "b", "key")
# What a user may have in a folder.
OTHERS = st.dictionaries(
    st.sampled_from(["thesis.tex", "checkpoint-500/optimizer.pt", ".hidden", "a.bak", "runs/a", "lost+found/x"]),
    st.binary(max_size=5),
)


@contextmanager
def stopped_at(place: Path, count: int, stop: Callable[[], Any]) -> Iterator[None]:
    """Call `stop` before the count-th call to the system (from 0) that concerns something in a folder."""
    seen, real = [0], {name: getattr(os, name) for name in CALLS}

    def counted(name: str) -> Callable[..., Any]:
        def call(first: Any, *rest: Any, **named: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.path.abspath(first)
            if os.fsdecode(path).startswith(str(place)):
                seen[0] += 1
                if seen[0] == count + 1:
                    stop()
            return real[name](first, *rest, **named)

        return call

    for name in CALLS:
        setattr(os, name, counted(name))
    try:
        yield
    finally:
        for name in CALLS:
            setattr(os, name, real[name])


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt() -> None:
    raise KeyboardInterrupt


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write(folder: Path, files: dict[str, str]) -> None:
    """The smallest command: an output of some files; `key` is the one that the others are not read without."""
    with Output(folder, PATTERNS).writing() as stage:
        for name, text in files.items():
            (stage / name).write_text(text)


def killed_write(place: Path, at: int, folder: Path, files: dict[str, str], current: Path) -> bool:
    """Do `write` in a process of its own that is killed at a call; say if it lived to its end."""
    command = [sys.executable, __file__, str(place), str(at), str(folder), json.dumps(files)]
    done = subprocess.run(command, cwd=current, capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode == 0


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


if __name__ == "__main__":
    with stopped_at(Path(sys.argv[1]), int(sys.argv[2]), kill):
        write(Path(sys.argv[3]), json.loads(sys.argv[4]))
