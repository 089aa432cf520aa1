"""Losses. Each is a function that raises on any mismatch; none has a default of zero.

`tokens` are standardised adapters in any shape [A, ...], NaN in the teacher being padding. Deltas are [..., D].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, mse_loss, normalize

from llgbm.runtime import UserError

EPSILON = 1e-8


def weight_loss(tokens_pred: Tensor, tokens_teacher: Tensor) -> Tensor:
    """Mean squared error over the values where the teacher is not NaN (padding).

    Raises ValueError for other shapes, an empty batch, a teacher that is all padding, NaN in the prediction.

    Source: Liang et al. 2025, "Drag-and-Drop LLMs: Zero-Shot Prompt-to-Weights" (arXiv 2506.16406).
    """
    _check_pair("tokens", tokens_pred, tokens_teacher)
    plain = mse_loss(tokens_pred, tokens_teacher)
    if torch.isfinite(plain):  # neither padding nor anything to refuse
        return plain
    real = ~torch.isnan(tokens_teacher)
    if not real.any():
        raise ValueError(
            "the teacher's tokens are all padding (NaN): there is nothing to match; check the tokenizer"
        )
    if not (torch.isfinite(tokens_pred) | ~real).all():
        raise ValueError(
            "the predicted tokens hold NaN or infinite values: lower the learning rate or clip gradients"
        )
    if real.all():
        return plain
    error = torch.where(real, tokens_pred, 0.0) - torch.where(real, tokens_teacher, 0.0)
    return error.square().sum() / real.sum()


def delta_mse(delta_pred: Tensor, delta_teacher: Tensor) -> Tensor:
    """Mean squared error [...] over the last axis."""
    return (delta_pred - delta_teacher).square().mean(-1)


def delta_normalized_mse(delta_pred: Tensor, delta_teacher: Tensor) -> Tensor:
    """Mean squared error [...] of the unit vectors, 2 (1 - cos) / D."""
    return delta_mse(
        normalize(delta_pred, dim=-1, eps=EPSILON), normalize(delta_teacher, dim=-1, eps=EPSILON)
    )


def delta_cosine(delta_pred: Tensor, delta_teacher: Tensor) -> Tensor:
    """1 - cosine similarity [...]."""
    return 1 - cosine_similarity(delta_pred, delta_teacher, dim=-1, eps=EPSILON)


def delta_cosine_norm(delta_pred: Tensor, delta_teacher: Tensor) -> Tensor:
    """Direction and relative norm, 1 - cos + (|pred| / |teacher| - 1)², [...].

    Source: ours.
    """
    ratio = delta_pred.norm(dim=-1) / delta_teacher.norm(dim=-1).clamp_min(EPSILON)
    return delta_cosine(delta_pred, delta_teacher) + (ratio - 1).square()


DELTA_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": delta_normalized_mse,
    "mse_raw": delta_mse,
    "cosine": delta_cosine,
    "cosine_norm": delta_cosine_norm,
}


def delta_loss(
    kind: str, delta_pred: Tensor, delta_teacher: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Compute the named loss, averaged over all vectors, or over those where `valid` [...] is true.

    Raises UserError for an unknown name, ValueError for other shapes, an empty batch, NaN, nothing valid, and for a
    teacher delta of length zero, which has no direction to follow.
    """
    if kind not in DELTA_LOSSES:
        raise UserError(f"unknown delta loss {kind!r}; there are: {', '.join(DELTA_LOSSES)}")
    _check_pair("delta", delta_pred, delta_teacher)
    if valid is not None and (valid.shape != delta_pred.shape[:-1] or valid.dtype != torch.bool):
        needed = f"{tuple(delta_pred.shape[:-1])} of bool"
        raise ValueError(
            f"`valid` has shape {tuple(valid.shape)} of {valid.dtype}, needed: {needed}"
        )
    if valid is not None and not valid.any():
        raise ValueError("no marked position is valid: every probe is padding; check the probe set")
    chosen = (
        (delta_pred, delta_teacher) if valid is None else (delta_pred[valid], delta_teacher[valid])
    )
    for name, values in zip(("predicted", "teacher's"), chosen, strict=True):
        if not torch.isfinite(values).all():
            raise ValueError(
                f"the {name} delta holds NaN or infinite values: check the adapters and the learning rate"
            )
    if kind != "mse_raw" and (chosen[1] == 0).all(-1).any():
        raise ValueError(
            "a teacher's delta is zero: an adapter that changes nothing has no direction; leave it out"
        )
    return DELTA_LOSSES[kind](*chosen).mean()


def _check_pair(name: str, pred: Tensor, teacher: Tensor) -> None:
    if not torch.is_tensor(pred) or not torch.is_tensor(teacher):
        raise ValueError(
            f"the {name} loss needs a prediction and a teacher, got {type(pred)} and {type(teacher)}"
        )
    if pred.shape != teacher.shape:
        raise ValueError(
            f"{name}: prediction has shape {tuple(pred.shape)}, teacher {tuple(teacher.shape)}: "
            "they come from different adapters, probes or bases"
        )
    if pred.numel() == 0:
        raise ValueError(f"{name}: the batch is empty, shape {tuple(pred.shape)}")


@dataclass(frozen=True)
class MultiTaskLoss:
    """λ_w · L_weight + λ_d · L_delta. A term whose λ is zero is not computed; both zero is refused (UserError)."""

    lambda_weight: float = 1.0
    lambda_delta: float = 1.0
    loss_type: str = "mse"
    normalize: bool = True

    def __post_init__(self) -> None:
        check_lambdas(self.lambda_weight, self.lambda_delta)
        if self.loss_type not in DELTA_LOSSES:
            raise UserError(
                f"unknown delta loss {self.loss_type!r}; there are: {', '.join(DELTA_LOSSES)}"
            )

    def __call__(
        self,
        delta_pred: Tensor | None = None,
        delta_teacher: Tensor | None = None,
        tokens_pred: Tensor | None = None,
        tokens_teacher: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`loss` and the terms that it sums, `loss_weight` and `loss_delta`. Raises ValueError for a missing input."""
        terms: dict[str, tuple[float, Tensor]] = {}
        if self.lambda_weight > 0:
            pred, teacher = _both("tokens", tokens_pred, tokens_teacher)
            terms["loss_weight"] = (self.lambda_weight, weight_loss(pred, teacher))
        if self.lambda_delta > 0:
            pred, teacher = _both("delta", delta_pred, delta_teacher)
            kind = "mse_raw" if self.loss_type == "mse" and not self.normalize else self.loss_type
            terms["loss_delta"] = (self.lambda_delta, delta_loss(kind, pred, teacher, valid))
        total = torch.stack([weight * value for weight, value in terms.values()]).sum()
        return {"loss": total, **{name: value for name, (_, value) in terms.items()}}


@dataclass(frozen=True)
class DeltaOnlyLoss:
    """L_delta alone."""

    loss_type: str = "mse"
    normalize: bool = True

    def __call__(
        self, delta_pred: Tensor, delta_teacher: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """Compute the loss, a scalar. Raises as `MultiTaskLoss`."""
        loss = MultiTaskLoss(0.0, 1.0, self.loss_type, self.normalize)
        return loss(delta_pred=delta_pred, delta_teacher=delta_teacher, valid=valid)["loss"]


def check_lambdas(weight: float, delta: float, alone: bool = True) -> None:
    """Raise UserError unless both are finite and not negative and, where no other term has a weight, one is above 0."""
    for name, value in (("weight", weight), ("delta", delta)):
        if not math.isfinite(value) or value < 0:
            raise UserError(f"lambda_{name} is {value:g}; it must be a finite number of at least 0")
    if alone and weight == delta == 0:
        raise UserError(
            "lambda_weight and lambda_delta are both 0: there is no loss to train on; set one above 0, or another term"
        )


def _both(name: str, pred: Tensor | None, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
    if pred is None or teacher is None:
        raise ValueError(
            f"the {name} loss has a weight above 0 but no {name}_pred or no {name}_teacher was given"
        )
    return pred, teacher
