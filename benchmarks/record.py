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
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True
    ).stdout.strip()
    changed = subprocess.run(
        ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True
    ).stdout
    machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    return {
        "commit": commit,
        "clean": bool(commit) and not changed.strip(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        **machine,
    }


def save(name: str, result: dict[str, Any]) -> None:
    """Write `<name>_<yyyymm>.json`, apart from the others where the tree was dirty, and print the object."""
    folder = RESULTS if result["environment"]["clean"] else RESULTS / "scratch"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}_{datetime.now(UTC):%Y%m}.json").write_text(
        json.dumps(result, indent=1) + "\n"
    )
    print(json.dumps(result))
