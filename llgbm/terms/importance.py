"""Squared error of weights with the importance weights of Drag-and-Drop LLMs.

A token counts as much as its values vary over the teachers, relative to all values. DnD's tokens are those of the
generator `hyperconv`; of a generator that predicts flat adapters, a token is one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llgbm.lora.adapters import LoraSpec
from llgbm.runtime import UserError
from llgbm.terms.step import Step, TermData
from llgbm.terms.term import Term


@dataclass(frozen=True)
class Importance(Term):
    """Mean over the values that are no padding of importance x squared error.

    Source: Liang et al. 2025, "Drag-and-Drop LLMs: Zero-Shot Prompt-to-Weights" (arXiv 2506.16406), as its public
    code weighs tokens.
    """

    name: ClassVar = "importance"
    title: ClassVar = "squared error of the teachers' weights, by how much a token varies (DnD)"
    reads: ClassVar = frozenset({"tokens"})
    matches: ClassVar = "weights"

    def prepare(self, data: TermData) -> Tensor:
        """Compute the weight of each value of an adapter's tokens, from the training teachers."""
        if data.tokens.ndim > 2:
            deviation = _deviation(data.tokens[:])
            return _relative(deviation.nanmean((-2, -1), keepdim=True), deviation)
        deviation_V = _deviation(data.data.teachers(data.rows))
        return _relative(_mean_by_matrix(deviation_V, data.lora_model.spec), deviation_V)

    def value(self, step: Step) -> Tensor:
        pred, teacher = step.tokens, step.teacher_tokens
        if pred.shape != teacher.shape or not pred.numel():
            raise ValueError(
                f"tokens: prediction has shape {tuple(pred.shape)}, teacher {tuple(teacher.shape)}: both must be alike "
                "and hold something"
            )
        real = ~torch.isnan(teacher)
        if not real.any():
            raise ValueError(
                "the teacher's tokens are all padding (NaN): there is nothing to match; check the tokenizer"
            )
        if not torch.isfinite(pred[real]).all():
            raise ValueError(
                "the predicted tokens hold NaN or infinite values: lower the learning rate or clip gradients"
            )
        error = torch.where(real, pred, 0.0) - torch.where(real, teacher, 0.0)
        return (step.prepared[self.name] * error.square()).sum() / real.sum()

    def count(self, batch: Mapping[str, Tensor]) -> int:
        return int((~torch.isnan(batch["tokens"])).sum())


def _deviation(values: Tensor) -> Tensor:
    """Standard deviation over adapters (the first axis)."""
    return values.double().std(0, correction=0)


def _relative(deviation: Tensor, of_values: Tensor) -> Tensor:
    """Divide by the mean over all values. Raises UserError where nothing varies."""
    overall = of_values.nanmean()
    if not overall > 0:
        raise UserError("all teachers are alike: importance weights need teachers that differ")
    return (deviation / overall).float()


def _mean_by_matrix(deviation_V: Tensor, spec: LoraSpec) -> Tensor:
    """Replace every value by the mean of its matrix."""
    parts = deviation_V.split(spec.piece_sizes)
    return torch.cat([part.mean().expand_as(part) for part in parts])
