"""Bank of LLGBM's embedded world for `--smoke`: asked of the installed program, which dnd itself does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from dnd.errors import DndError


def embedded_bank(cache: Path) -> tuple[Path, Path, tuple[str, ...]]:
    """Build the smallest embedded bank, or find it in a cache: its folder of adapters, its base, its training tasks.

    Raises DndError where LLGBM is not installed or refuses, such as for a cache that cannot be written.
    """
    command = [sys.executable, "-m", "llgbm", "bank", "embedded", "--smoke", "--cache", str(cache)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise DndError(_reason(ended.stderr))
    found = json.loads(ended.stdout)
    return Path(found["bank"]) / "checkpoints", Path(found["base"]), tuple(found["tasks"])


def _reason(stderr: str) -> str:
    """Turn what the program said last into one sentence."""
    said = stderr.strip().splitlines()[-1:] or ["it gave no reason"]
    if "No module named llgbm" in said[0]:
        return "--smoke needs LLGBM: install the project at the repository's root, or name a --bank"
    return said[0].removeprefix("error: ")
