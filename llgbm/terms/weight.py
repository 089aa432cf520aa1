"""Mean squared error of standardised weights, as Drag-and-Drop LLMs has it without importance weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llgbm.losses import weight_loss
from llgbm.terms.step import Step
from llgbm.terms.term import Term


@dataclass(frozen=True)
class Weight(Term):
    """Mean squared error of the predicted tokens, over the values where the teacher's are no padding.

    Source: Liang et al. 2025, "Drag-and-Drop LLMs: Zero-Shot Prompt-to-Weights" (arXiv 2506.16406).
    """

    name: ClassVar = "weight"
    title: ClassVar = "squared error of the teachers' standardised weights"
    reads: ClassVar = frozenset({"tokens"})
    matches: ClassVar = "weights"

    def value(self, step: Step) -> Tensor:
        return weight_loss(step.tokens, step.teacher_tokens)

    def count(self, batch: Mapping[str, Tensor]) -> int:
        return int((~torch.isnan(batch["tokens"])).sum())
