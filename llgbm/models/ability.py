"""Measure what a pretrained base can do, before any teacher is trained on it.

A base for a suite must be able to do every task and heed no instruction: to a prompt without one it should give the
answer of each task with the same probability. Axis letters: see `llgbm`.
"""

from __future__ import annotations

from collections import Counter
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
Question = Mapping[str, Example]


@dataclass(frozen=True)
class Ability:
    """Shares from 0 to 1 of what a base can do.

    `right` is the probability that an answer drawn from the base is right for some task. `balanced` is the mean over
    tasks of the probability of the right answer over its fair share, at most 1. `by_part` is the same for the
    tasks of each part of their names (an operation, a format).
    """

    right: float
    balanced: float
    by_part: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """Return the part that the base does least, with its share."""
        name = min(self.by_part, key=self.by_part.__getitem__)
        return name, self.by_part[name]

    def describe(self) -> str:
        """Return one clause for people."""
        part, share = self.worst
        return (
            f"{self.right:.2f} of its answers are right for some task, tasks have {self.balanced:.2f} of their share, "
            f"those of {part} {share:.2f}"
        )


def measure_ability(
    model: PreTrainedModel, tokenizer: Any, questions: Sequence[Question]
) -> Ability:
    """Measure a base on questions, each one a prompt without instruction and the answer of every task to it."""
    asked = chain.from_iterable(question.values() for question in questions)
    pairs = [(e.prompt, e.answer) for e in asked]
    with torch.no_grad():
        pieces = [
            token_losses(model, encode_pairs(tokenizer, pairs[i : i + AT_ONCE])).sum(1)
            for i in range(0, len(pairs), AT_ONCE)
        ]
    probabilities = iter(torch.cat(pieces).neg().exp().tolist())
    right, every, shares = 0.0, list[float](), dict[str, list[float]]()
    for question in questions:
        counts = Counter(example.answer for example in question.values())
        for task, example in question.items():
            alike, probability = counts[example.answer], next(probabilities)
            right += probability / alike
            share = min(1.0, probability * len(question) / alike)
            every.append(share)
            for part in task.split("-"):
                shares.setdefault(part, []).append(share)
    by_part = {part: sum(own) / len(own) for part, own in shares.items()}
    return Ability(right / len(questions), sum(every) / len(every), by_part)
