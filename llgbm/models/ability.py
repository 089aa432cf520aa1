"""Measure what a pretrained base can do, before any teacher is trained on it.

A base for a suite must be able to do every task once it is told which, in a way that no prompt of a task does. Axis
letters: see `llgbm`.
"""

from __future__ import annotations

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

    `by_task` is the mean probability of the right answer to examples of each task, `right` its mean over tasks.
    """

    right: float
    by_task: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """Task with the least share, and that share."""
        task = min(self.by_task, key=self.by_task.__getitem__)
        return task, self.by_task[task]

    def describe(self) -> str:
        """Return one clause for people."""
        task, share = self.worst
        return f"told its task, it is right in {self.right:.2f}, least in {task}, {share:.2f}"


def measure_ability(
    model: PreTrainedModel, tokenizer: Any, told: Mapping[str, Sequence[Example]]
) -> Ability:
    """Measure a base on examples of every task, each with a prompt that tells the base its task."""
    pairs = [(e.prompt, e.answer) for e in chain.from_iterable(told.values())]
    pieces = []
    for start in range(0, len(pairs), AT_ONCE):
        texts = encode_pairs(tokenizer, pairs[start : start + AT_ONCE]).to(model.device)
        with torch.no_grad():
            pieces.append(token_losses(model, texts).sum(1))
    probabilities = iter(torch.cat(pieces).neg().exp().tolist())
    by_task = {
        task: sum(next(probabilities) for _ in examples) / len(examples)
        for task, examples in told.items()
    }
    return Ability(sum(by_task.values()) / len(by_task), by_task)
