"""Conditions of a generator, with or without padding, and what pools them to one vector.

A condition is [A, N, C], one row for each prompt, or [A, N, L, C], one row for each token of each prompt. A row of NaN
is padding: behind the last token of a shorter prompt, or in place of a prompt that a sample leaves out. NaN, so that
what forgets to mask it fails at once. Axis letters: see `llgbm`; L tokens of a prompt.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

POOLINGS = ("mean", "attention")
QUERIES, ATTENTION_HEADS = 4, 4


def check_condition(condition: Tensor, width: int) -> None:
    """Raise ValueError for another width, no prompt, and NaN or infinite values beside those of padding."""
    if condition.ndim not in (3, 4) or condition.shape[-1] != width:
        raise ValueError(
            f"conditions have shape {tuple(condition.shape)}, needed: [A, N, {width}], or of token states "
            f"[A, N, L, {width}]"
        )
    rows_ANC = condition.flatten(1, -2)
    real_AN = rows_ANC.isfinite().all(-1)
    known = bool((real_AN | rows_ANC.isnan().all(-1)).all())
    if condition.numel() == 0 or not known or not real_AN.any(1).all():
        raise ValueError(
            f"conditions of shape {tuple(condition.shape)} hold no prompt, or NaN or infinite values: "
            "encode at least one prompt of each task"
        )


def rows_of(condition: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return all rows [A, N, C] of a condition with zeros as padding, and a mask [A, N] that is true there.

    Without any padding the mask is None, and the rows are those given.
    """
    rows_ANC = condition.flatten(1, -2)
    if rows_ANC.is_meta:
        return rows_ANC, None
    padding_AN = rows_ANC[..., 0].isnan()
    if not padding_AN.any():
        return rows_ANC, None
    return rows_ANC.masked_fill(padding_AN[..., None], 0.0), padding_AN


def mean_of_rows(rows_ANC: Tensor, padding_AN: Tensor | None) -> Tensor:
    """Mean [A, C] over the rows that are no padding, as `rows_of` returns them."""
    if padding_AN is None:
        return rows_ANC.mean(1)
    return rows_ANC.sum(1) / (~padding_AN).sum(1, keepdim=True)


class MeanPool(nn.Module):
    """Mean over prompts or tokens, [A, N, C] or [A, N, L, C] to [A, C]."""

    def forward(self, condition: Tensor) -> Tensor:
        return mean_of_rows(*rows_of(condition))


class AttentionPool(nn.Module):
    """Mean over prompts or tokens plus what learned queries attend to among them, to [A, C].

    The order of the prompts has no effect. Its output starts near the mean.

    Source: Lee et al. 2019, "Set Transformer" (arXiv 1810.00825): pooling by attention.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        n_heads = math.gcd(width, ATTENTION_HEADS)
        self.queries_KC = nn.Parameter(torch.randn(QUERIES, width) / width**0.5)
        self.attention = nn.MultiheadAttention(width, n_heads, batch_first=True)
        nn.init.normal_(self.attention.out_proj.weight, std=0.1 / width**0.5)

    def forward(self, condition: Tensor) -> Tensor:
        rows_ANC, padding_AN = rows_of(condition)
        queries_AKC = self.queries_KC.expand(len(rows_ANC), -1, -1)
        found_AKC, _ = self.attention(
            queries_AKC, rows_ANC, rows_ANC, key_padding_mask=padding_AN, need_weights=False
        )
        return mean_of_rows(rows_ANC, padding_AN) + found_AKC.mean(1)


def make_pool(pooling: str, width: int) -> nn.Module:
    """Create what pools the prompts' embeddings."""
    return AttentionPool(width) if pooling == "attention" else MeanPool()
