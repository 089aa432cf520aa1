"""Size of the predicted adapters, which no teacher is needed for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llgbm.terms.step import Step
from llgbm.terms.term import Term


@dataclass(frozen=True)
class L1(Term):
    """Mean absolute value of A and B.

    Source: Tibshirani 1996, "Regression Shrinkage and Selection via the Lasso".
    """

    name: ClassVar = "l1"
    title: ClassVar = "mean absolute value of the predicted adapters"
    reads: ClassVar = frozenset({"adapters"})
    matches: ClassVar = "size"

    def value(self, step: Step) -> Tensor:
        return step.values_AV.abs().mean()


@dataclass(frozen=True)
class L2(Term):
    """Mean squared value of A and B.

    Source: Hoerl and Kennard 1970, "Ridge Regression: Biased Estimation for Nonorthogonal Problems".
    """

    name: ClassVar = "l2"
    title: ClassVar = "mean squared value of the predicted adapters"
    reads: ClassVar = frozenset({"adapters"})
    matches: ClassVar = "size"

    def value(self, step: Step) -> Tensor:
        return step.values_AV.square().mean()
