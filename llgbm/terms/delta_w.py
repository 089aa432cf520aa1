"""Distance of the update ΔW = B A itself, whatever the choice of A and B (the gauge): a loss on weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llgbm.lora.geometry import update_products
from llgbm.losses import EPSILON
from llgbm.runtime import UserError
from llgbm.terms.step import Step
from llgbm.terms.term import Term

MEASURES = ("cosine_norm", "relative")


@dataclass(frozen=True)
class DeltaW(Term):
    """Direction and size of ΔW over all modules, from products of R x R matrices: no ΔW is formed.

    `cosine_norm` is 1 - cos + (|ΔW| / |ΔW_teacher| - 1)², `relative` is |ΔW - ΔW_teacher|² / |ΔW_teacher|².

    Source: ours.
    """

    measure: str = "cosine_norm"

    name: ClassVar = "delta_w"
    title: ClassVar = "distance of ΔW = BA from the teachers', free of the gauge"
    reads: ClassVar = frozenset({"adapters"})
    matches: ClassVar = "weights"

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise UserError(
                f"delta_w.measure is {self.measure!r}; there are: {', '.join(MEASURES)}"
            )

    def value(self, step: Step) -> Tensor:
        own_A, cross_A, teacher_A = update_products(step.adapters, step.teachers)
        if (teacher_A <= 0).any():
            raise ValueError(
                "a teacher's ΔW is zero: an adapter that changes nothing has no direction; leave it out"
            )
        if self.measure == "relative":
            return ((own_A - 2 * cross_A + teacher_A) / teacher_A).mean()
        size_A = own_A.clamp_min(EPSILON**2).sqrt()
        ratio_A = size_A / teacher_A.sqrt()
        cosine_A = cross_A / (size_A * teacher_A.sqrt())
        return (1 - cosine_A + (ratio_A - 1).square()).mean()
