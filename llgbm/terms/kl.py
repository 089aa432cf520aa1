"""Divergence from the teacher's next-token distributions (Hinton et al. 2015)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from llgbm.runtime import UserError
from llgbm.terms.step import Step
from llgbm.terms.term import Term


@dataclass(frozen=True)
class KL(Term):
    """KL(teacher || student) at every marked position, times the temperature squared.

    `top_k` above 0 tells apart the teacher's k likeliest tokens only: the others count as one.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531).
    """

    temperature: float = 1.0
    top_k: int = 0

    name: ClassVar = "kl"
    title: ClassVar = "KL divergence from the teachers' next-token distributions"
    reads: ClassVar = frozenset({"logits"})
    matches: ClassVar = "behaviour"

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise UserError(f"kl.temperature is {self.temperature:g}; it must be above 0")
        if self.top_k < 0:
            raise UserError(
                f"kl.top_k is {self.top_k}; it must be at least 1, or 0 for the whole vocabulary"
            )

    def value(self, step: Step) -> Tensor:
        return step.over_positions(self.divergence)

    def divergence(self, student_SV: Tensor, teacher_SV: Tensor) -> Tensor:
        """Compute the divergence [S] of logits over a vocabulary, in nats."""
        log_q, log_p = (
            log_softmax(logits / self.temperature, dim=-1) for logits in (student_SV, teacher_SV)
        )
        if 0 < self.top_k < log_p.shape[-1] - 1:
            places = log_p.topk(self.top_k, dim=-1).indices
            log_q, log_p = _coarsened(log_q, places), _coarsened(log_p, places)
        return self.temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def _coarsened(log_p: Tensor, places: Tensor) -> Tensor:
    """Keep the log-probabilities at k places; the last column is that of all the others together."""
    others = log_p.scatter(-1, places, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, places), others], dim=-1)
