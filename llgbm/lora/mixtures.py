"""Weighted sums of adapters, written as adapters again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llgbm.lora.adapters import LoraBatch


def sum_of_updates(parts: Sequence[LoraBatch], weights: Sequence[float | Tensor]) -> LoraBatch:
    """Sum weight x ΔW, exactly: ranks side by side, weights on B. A weight is a number, or [A] of them.

    A part without a module adds nothing there. Raises ValueError for no part and for another number of weights.
    """
    if not parts or len(parts) != len(weights):
        raise ValueError(f"{len(weights)} weights for {len(parts)} batches: each needs one")
    a: dict[str, list[Tensor]] = {}
    b: dict[str, list[Tensor]] = {}
    for part, weight in zip(parts, weights, strict=True):
        for name, own in part.b.items():
            a.setdefault(name, []).append(part.a[name])
            b.setdefault(name, []).append(torch.as_tensor(weight).to(own).reshape(-1, 1, 1) * own)
    return LoraBatch(
        {name: torch.cat(own, 1) for name, own in a.items()},
        {name: torch.cat(own, 2) for name, own in b.items()},
    )
