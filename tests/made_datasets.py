"""Datasets in the shape of the real files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SYSTEM = "Answer by a single [ans]."


def rows(topic: str, count: int, start: int = 0) -> list[dict[str, str]]:
    """Multiple-choice rows in the shape of the real ones."""
    rng = random.Random(f"{topic} {start}")
    return [
        {
            "prompt": f"What follows {topic} number {i}?\nA: {topic} {i + 1}\nB: {topic} {i + 2}\nC: nothing\nD: {i}",
            "response": f"[{rng.choice('ABCD')}]",
            "system": SYSTEM,
        }
        for i in range(start, start + count)
    ]


def write_rows(folder: Path, name: str, content: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
