"""Measure what a pretrained base can do, before any teacher is trained on it.

A base for a suite must be able to do every task once it is told which, in a way that no prompt of a task does. Axis
letters: see `llgbm`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from llgbm.models.encoding import encode_pairs
from llgbm.models.scoring import token_losses
from llgbm.tasks.suite import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AT_ONCE = 512


@dataclass(frozen=True)
class Ability:
    """Shares from 0 to 1 of what a base can do once it is told to.

    `right` is the mean over tasks of the probability of the right answer. `by_part` is the same for the tasks of each
    part of their names (an operation, a format).
    """

    right: float
    by_part: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """Return the part that the base does least, with its share."""
        name = min(self.by_part, key=self.by_part.__getitem__)
        return name, self.by_part[name]

    def need(self, task: str) -> float:
        """Return how much a task is still to be practised: 1 less the product of the shares of its parts."""
        return 1 - math.prod(self.by_part[part] for part in task.split("-"))

    def describe(self) -> str:
        """Return one clause for people."""
        part, share = self.worst
        return f"told its task, it is right in {self.right:.2f}, least in {part}, {share:.2f}"


def measure_ability(
    model: PreTrainedModel, tokenizer: Any, told: Mapping[str, Sequence[Example]]
) -> Ability:
    """Measure a base on examples of every task, each with a prompt that tells the base its task."""
    pairs = [(e.prompt, e.answer) for e in chain.from_iterable(told.values())]
    with torch.no_grad():
        pieces = [
            token_losses(model, encode_pairs(tokenizer, pairs[i : i + AT_ONCE])).sum(1)
            for i in range(0, len(pairs), AT_ONCE)
        ]
    probabilities = iter(torch.cat(pieces).neg().exp().tolist())
    every, shares = list[float](), dict[str, list[float]]()
    for task, examples in told.items():
        share = sum(next(probabilities) for _ in examples) / len(examples)
        every.append(share)
        for part in task.split("-"):
            shares.setdefault(part, []).append(share)
    by_part = {part: sum(own) / len(own) for part, own in shares.items()}
    return Ability(sum(every) / len(every), by_part)
