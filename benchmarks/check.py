"""Rerun the quick CPU ratios and compare them with the committed results: `make bench-check`.

A ratio is another side's seconds over ours. One that falls below 80 % of the newest committed result fails. Only ratios
that both runs have are compared; a benchmark without a committed result passes with a note. Exit status 1 where one
fell.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
FLOOR = 0.8
# Each benchmark with the options that keep it within a minute or two.
QUICK: dict[str, tuple[str, ...]] = {
    "delta": (
        "--sizes",
        "nano",
        "--adapters",
        "8",
        "32",
        "--peers",
        "peft_in_turn",
        "functional_call",
    ),
    "teachers": ("--repeats", "3"),
    "train_step": ("--blocks", "5"),
}


def committed(name: str, results: Path = RESULTS) -> dict[str, float]:
    """The ratios of the newest result of a benchmark; none where there is no result."""
    files = sorted(results.glob(f"{name}_cpu_*.json"))
    return json.loads(files[-1].read_text())["ratios"] if files else {}


def rerun(name: str, options: Sequence[str]) -> dict[str, float]:
    """The ratios of a benchmark run now."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(Path(__file__).with_name(f"bench_{name}.py")),
        *options,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["ratios"]


def fallen(before: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    """One sentence for each ratio that fell below the floor. Raises ValueError where the two have none in common."""
    common = [key for key in before if key in now]
    if not common:
        raise ValueError(
            "the committed result and this run have no ratio in common: commit a result of this version"
        )
    return [
        f"{key}: {now[key]:.2f} x, committed {before[key]:.2f} x"
        for key in common
        if now[key] < FLOOR * before[key]
    ]


def main() -> int:
    failures = []
    for name, options in QUICK.items():
        before = committed(name)
        if not before:
            print(f"{name}: no committed result, not checked")
            continue
        found = fallen(before, rerun(name, options))
        print(f"{name}: {'; '.join(found) or 'holds'}")
        failures += found
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
