"""Losses. Each is a function that raises on any mismatch; none has a default of zero.

`tokens` are standardised adapters in any shape [A, ...], NaN in the teacher being padding. Deltas are [..., D].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, mse_loss, normalize

from llgbm.lora import LoraBatch
from llgbm.runtime import UserError

EPSILON = 1e-8


def weight_loss(tokens_pred: Tensor, tokens_teacher: Tensor) -> Tensor:
    """Mean squared error over the values where the teacher is not NaN (padding).

    Raises ValueError for other shapes, an empty batch, a teacher that is all padding, NaN in the prediction.
    """
    _check_pair("tokens", tokens_pred, tokens_teacher)
    real = ~torch.isnan(tokens_teacher)
    if not real.any():
        raise ValueError("the teacher's tokens are all padding (NaN): there is nothing to match; check the tokenizer")
    if not (torch.isfinite(tokens_pred) | ~real).all():
        raise ValueError("the predicted tokens hold NaN or infinite values: lower the learning rate or clip gradients")
    if real.all():
        return mse_loss(tokens_pred, tokens_teacher)
    error = torch.where(real, tokens_pred, 0.0) - torch.where(real, tokens_teacher, 0.0)
    return error.square().sum() / real.sum()


def delta_mse(delta_pred: Tensor, delta_teacher: Tensor) -> Tensor:
    """Mean squared error [...] over the last axis."""
    return (delta_pred - delta_teacher).square().mean(-1)


def delta_normalized_mse(delta_pred: Tensor, delta_teacher: Tensor) -> Tensor:
    """Mean squared error [...] of the unit vectors, 2 (1 - cos) / D."""
    return delta_mse(normalize(delta_pred, dim=-1, eps=EPSILON), normalize(delta_teacher, dim=-1, eps=EPSILON))


def delta_cosine(delta_pred: Tensor, delta_teacher: Tensor) -> Tensor:
    """1 - cosine similarity [...]."""
    return 1 - cosine_similarity(delta_pred, delta_teacher, dim=-1, eps=EPSILON)


def delta_cosine_norm(delta_pred: Tensor, delta_teacher: Tensor) -> Tensor:
    """Direction and relative norm, 1 - cos + (|pred| / |teacher| - 1)², [...]."""
    ratio = delta_pred.norm(dim=-1) / delta_teacher.norm(dim=-1).clamp_min(EPSILON)
    return delta_cosine(delta_pred, delta_teacher) + (ratio - 1).square()


DELTA_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": delta_normalized_mse,
    "mse_raw": delta_mse,
    "cosine": delta_cosine,
    "cosine_norm": delta_cosine_norm,
}


def delta_loss(kind: str, delta_pred: Tensor, delta_teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """The named loss, averaged over all vectors, or over those where `valid` [...] is true.

    Raises UserError for an unknown name, ValueError for other shapes, an empty batch, NaN, nothing valid, and for a
    teacher delta of length zero, which has no direction to follow.
    """
    if kind not in DELTA_LOSSES:
        raise UserError(f"unknown delta loss {kind!r}; there are: {', '.join(DELTA_LOSSES)}")
    _check_pair("delta", delta_pred, delta_teacher)
    if valid is not None and (valid.shape != delta_pred.shape[:-1] or valid.dtype != torch.bool):
        needed = f"{tuple(delta_pred.shape[:-1])} of bool"
        raise ValueError(f"`valid` has shape {tuple(valid.shape)} of {valid.dtype}, needed: {needed}")
    if valid is not None and not valid.any():
        raise ValueError("no marked position is valid: every probe is padding; check the probe set")
    chosen = (delta_pred, delta_teacher) if valid is None else (delta_pred[valid], delta_teacher[valid])
    for name, values in zip(("predicted", "teacher's"), chosen, strict=True):
        if not torch.isfinite(values).all():
            raise ValueError(f"the {name} delta holds NaN or infinite values: check the adapters and the learning rate")
    if kind != "mse_raw" and (chosen[1] == 0).all(-1).any():
        raise ValueError("a teacher's delta is zero: an adapter that changes nothing has no direction; leave it out")
    return DELTA_LOSSES[kind](*chosen).mean()


def delta_w_error(pred: LoraBatch, teacher: LoraBatch) -> Tensor:
    """Relative error |ΔW_pred - ΔW_teacher| / |ΔW_teacher| over all modules of each adapter, [A]; free of the gauge.

    |B A - B' A'|² = tr(BᵀB AAᵀ) + tr(B'ᵀB' A'A'ᵀ) - 2 tr(BᵀB' A'Aᵀ): no ΔW is formed, R² numbers a module. float32.
    """
    if pred.a.keys() != teacher.a.keys() or pred.n_adapters != teacher.n_adapters:
        raise ValueError("predicted and teacher adapters differ in modules or in number: they are of different bases")
    error = sum(_inner(pred, pred, n) + _inner(teacher, teacher, n) - 2 * _inner(pred, teacher, n) for n in pred.a)
    size = sum(_inner(teacher, teacher, n) for n in pred.a)
    return (torch.as_tensor(error).clamp_min(0) / torch.as_tensor(size).clamp_min(EPSILON)).sqrt()


def delta_w_inner(left: LoraBatch, right: LoraBatch) -> Tensor:
    """Inner products <ΔW_i, ΔW_j> of all adapters of two batches over all modules, [A_left, A_right].

    Raises ValueError where the modules differ.
    """
    if left.a.keys() != right.a.keys():
        raise ValueError("the two batches adapt different modules: they are of different bases")
    total = torch.zeros(left.n_adapters, right.n_adapters, device=next(iter(left.a.values())).device)
    for name in left.a:
        bb = torch.einsum("ior,jos->ijrs", left.b[name].float(), right.b[name].float())
        aa = torch.einsum("irk,jsk->ijrs", left.a[name].float(), right.a[name].float())
        total += (bb * aa).sum((-2, -1))
    return total


def _inner(left: LoraBatch, right: LoraBatch, name: str) -> Tensor:
    bb = left.b[name].float().transpose(1, 2) @ right.b[name].float()
    aa = left.a[name].float() @ right.a[name].float().transpose(1, 2)
    return (bb * aa).sum((-2, -1))


def _check_pair(name: str, pred: Tensor, teacher: Tensor) -> None:
    if not torch.is_tensor(pred) or not torch.is_tensor(teacher):
        raise ValueError(f"the {name} loss needs a prediction and a teacher, got {type(pred)} and {type(teacher)}")
    if pred.shape != teacher.shape:
        raise ValueError(
            f"{name}: prediction has shape {tuple(pred.shape)}, teacher {tuple(teacher.shape)}: "
            "they come from different adapters, probes or bases"
        )
    if pred.numel() == 0:
        raise ValueError(f"{name}: the batch is empty, shape {tuple(pred.shape)}")
