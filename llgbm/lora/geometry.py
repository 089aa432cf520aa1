"""Distances and inner products of adapters by their updates ΔW = B A, which do not depend on the choice of A and B.

Shapes: A adapters, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

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


def fix_gauge(batch: LoraBatch) -> LoraBatch:
    """Return the adapters with the A and B that their updates ΔW = B A determine: B = U √S, A = √S Vᵀ of its SVD.

    Each column of U has its largest value positive. Singular values that are equal leave a choice. A rank above a
    module's width leaves zeros. No ΔW is formed. float32.
    """
    a, b = {}, {}
    for name in batch.a:
        left_AOR, inner_b = torch.linalg.qr(batch.b[name].float())
        right_AIR, inner_a = torch.linalg.qr(batch.a[name].float().mT)
        u, s_AR, vt = torch.linalg.svd(inner_b @ inner_a.mT, full_matrices=False)
        root_AR = s_AR.sqrt()
        b_AOR = left_AOR @ u
        largest_A1R = b_AOR.abs().argmax(1, keepdim=True)
        signs_A1R = b_AOR.gather(1, largest_A1R).sign()
        spare = batch.a[name].shape[1] - s_AR.shape[1]
        b[name] = pad(b_AOR * signs_A1R * root_AR[:, None], (0, spare))
        a[name] = pad(signs_A1R.mT * root_AR[..., None] * (vt @ right_AIR.mT), (0, 0, 0, spare))
    return LoraBatch(a, b)
