"""Distances and inner products of adapters by their updates ΔW = B A, which do not depend on the choice of A and B.

Shapes: A adapters, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llgbm.lora.adapters import LoraBatch
from llgbm.losses import EPSILON


def delta_w_error(pred: LoraBatch, teacher: LoraBatch) -> Tensor:
    """Relative error |ΔW_pred - ΔW_teacher| / |ΔW_teacher| over all modules of each adapter, [A]; free of the gauge.

    |B A - B' A'|² = tr(BᵀB AAᵀ) + tr(B'ᵀB' A'A'ᵀ) - 2 tr(BᵀB' A'Aᵀ): no ΔW is formed, R² numbers a module. float32.
    """
    _check_alike(pred, teacher)
    error = sum(
        _inner(pred, pred, n) + _inner(teacher, teacher, n) - 2 * _inner(pred, teacher, n)
        for n in pred.a
    )
    size = sum(_inner(teacher, teacher, n) for n in pred.a)
    return (torch.as_tensor(error).clamp_min(0) / torch.as_tensor(size).clamp_min(EPSILON)).sqrt()


def update_products(pred: LoraBatch, teacher: LoraBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Inner products over all modules, [A] each: <ΔW, ΔW>, <ΔW, ΔW_teacher>, <ΔW_teacher, ΔW_teacher>.

    Raises ValueError where the adapters differ in modules or in number.
    """
    _check_alike(pred, teacher)
    pairs = ((pred, pred), (pred, teacher), (teacher, teacher))
    own, cross, other = (
        torch.stack([_inner(left, right, name) for name in pred.a]).sum(0) for left, right in pairs
    )
    return own, cross, other


def _check_alike(pred: LoraBatch, teacher: LoraBatch) -> None:
    if pred.a.keys() != teacher.a.keys() or pred.n_adapters != teacher.n_adapters:
        raise ValueError(
            "predicted and teacher adapters differ in modules or in number: they are of different bases"
        )


def delta_w_inner(left: LoraBatch, right: LoraBatch) -> Tensor:
    """Inner products <ΔW_i, ΔW_j> of all adapters of two batches over all modules, [A_left, A_right].

    Raises ValueError where the modules differ.
    """
    if left.a.keys() != right.a.keys():
        raise ValueError("the two batches adapt different modules: they are of different bases")
    total = torch.zeros(
        left.n_adapters, right.n_adapters, device=next(iter(left.a.values())).device
    )
    for name in left.a:
        bb = torch.einsum("ior,jos->ijrs", left.b[name].float(), right.b[name].float())
        aa = torch.einsum("irk,jsk->ijrs", left.a[name].float(), right.a[name].float())
        total += (bb * aa).sum((-2, -1))
    return total


def _inner(left: LoraBatch, right: LoraBatch, name: str) -> Tensor:
    bb = left.b[name].float().transpose(1, 2) @ right.b[name].float()
    aa = left.a[name].float() @ right.a[name].float().transpose(1, 2)
    return (bb * aa).sum((-2, -1))
