"""Accuracy of a generator at levels of novelty: kinds of tasks that are newer than those held out.

Axis letters: see `llgbm`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from llgbm.dataset import LevelData
from llgbm.functional import FunctionalLoRA
from llgbm.generator.networks import LoraGenerator
from llgbm.models import scoring

PREFIX = "novelty"


def level_metric(name: str) -> str:
    """Name the metric of a level: `novelty/<name with underscores>`."""
    return f"{PREFIX}/{name.replace(' ', '_')}"


def evaluate_levels(
    generator: LoraGenerator, lora_model: FunctionalLoRA, levels: Iterable[LevelData]
) -> dict[str, dict[str, float]]:
    """Return the exact-match accuracy of generated adapters by level and task."""
    found = {}
    for level in levels:
        with torch.no_grad():
            adapters = generator.generate(level.conditions_ANC)
        accuracy_A = scoring.accuracy_per_adapter(
            lora_model.model, lora_model.spec, adapters, level.examples
        )
        found[level.name] = dict(zip(level.tasks, accuracy_A.tolist(), strict=True))
    return found
