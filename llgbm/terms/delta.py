"""Distance of delta activations at the last layer: the behavioural loss of this project."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llgbm.delta import mean_over_probes
from llgbm.losses import delta_loss
from llgbm.terms.step import Step
from llgbm.terms.term import Term


@dataclass(frozen=True)
class Delta(Term):
    """Loss of Δ at every marked position, or of its mean over probes and positions.

    Its options are the fields `delta_loss` and `delta_reading` of a configuration.

    Source: the activations are those of Xu et al. 2025, "Delta Activations: A Representation for Finetuned Large
    Language Models" (arXiv 2509.04442); to learn from them, along answers too, is ours.
    """

    loss: str = "cosine_norm"
    reading: str = "per_probe"

    name: ClassVar = "delta"
    title: ClassVar = "distance of last-layer deltas from the teachers'"
    reads: ClassVar = frozenset({"states"})
    matches: ClassVar = "behaviour"

    def value(self, step: Step) -> Tensor:
        pred_APQD, teacher = step.delta_pred, step.deltas
        valid_APQ = teacher.probes.valid_APQ
        if self.reading == "mean":
            return delta_loss(self.loss, mean_over_probes(pred_APQD, valid_APQ), teacher.mean_AD)
        return delta_loss(self.loss, pred_APQD, teacher.delta_APQD, valid_APQ)

    def count(self, batch: Mapping[str, Tensor]) -> int:
        if self.reading == "mean":
            return len(batch["tokens"])
        return super().count(batch)
