"""What a benchmark leaves: one JSON object with what made it, printed as the last line and written to a file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def environment(*packages: str) -> dict[str, Any]:
    """Commit, whether the working tree is that commit's, versions of `packages`, and the machine with its load."""
    commit, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    return {
        "commit": commit,
        "clean": bool(commit) and not changed,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        **machine,
    }


def _git(*arguments: str) -> str:
    """Return what git says of the tree that this file is in; nothing where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except OSError:
        return ""
    return done.stdout.strip()


def save(name: str, result: dict[str, Any]) -> None:
    """Write `<name>_<yyyymm>.json`, to `scratch/` where the tree was dirty or the run quick, and print the object."""
    kept = result["environment"]["clean"] and not result["config"].get("quick")
    folder = RESULTS if kept else RESULTS / "scratch"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}_{datetime.now(UTC):%Y%m}.json").write_text(
        json.dumps(result, indent=1, default=str) + "\n"
    )
    print(json.dumps(result, default=str))
