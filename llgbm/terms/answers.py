"""Cross-entropy of the teacher's own greedy answer: what KL is without the teacher's uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy

from llgbm.terms.step import Step
from llgbm.terms.term import Term


@dataclass(frozen=True)
class Answers(Term):
    """Cross-entropy of the teacher's likeliest token at every marked position.

    Along a trajectory, which is the teacher's greedy answer, these tokens are that answer and its end.

    Source: Kim and Rush 2016, "Sequence-Level Knowledge Distillation" (arXiv 1606.07947), with greedy answers.
    """

    name: ClassVar = "answers"
    title: ClassVar = "cross-entropy of the teachers' own greedy answers"
    reads: ClassVar = frozenset({"logits"})
    matches: ClassVar = "behaviour"

    def value(self, step: Step) -> Tensor:
        return step.over_positions(answer_losses)


def answer_losses(student_SV: Tensor, teacher_SV: Tensor) -> Tensor:
    """Cross-entropy [S] of the teacher's likeliest tokens, in nats."""
    return cross_entropy(student_SV, teacher_SV.argmax(-1), reduction="none")
