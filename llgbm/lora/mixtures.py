"""Weighted sums of adapters, written as adapters again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llgbm.lora.adapters import LoraBatch


def sum_of_updates(parts: Sequence[LoraBatch], weights: Sequence[float | Tensor]) -> LoraBatch:
    """Sum weight x ΔW, exactly: ranks side by side, weights on B. A weight is a number, or [A] of them.

    Raises ValueError for no part, another number of weights, and parts of different modules.
    """
    if not parts or len(parts) != len(weights):
        raise ValueError(f"{len(weights)} weights for {len(parts)} batches: each needs one")
    names = list(parts[0].a)
    if any(part.a.keys() != parts[0].a.keys() for part in parts):
        raise ValueError("the batches adapt different modules: they are of different bases")
    return LoraBatch(
        {name: torch.cat([part.a[name] for part in parts], 1) for name in names},
        {name: torch.cat(_weighted(parts, weights, name), 2) for name in names},
    )


def _weighted(
    parts: Sequence[LoraBatch], weights: Sequence[float | Tensor], name: str
) -> list[Tensor]:
    """B of each part times its weight."""
    found = []
    for part, weight in zip(parts, weights, strict=True):
        own = part.b[name]
        found.append(torch.as_tensor(weight).to(own).reshape(-1, 1, 1) * own)
    return found
