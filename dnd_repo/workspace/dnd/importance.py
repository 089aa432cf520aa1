"""Importance weights: how much each token varies over a bank of adapters, normalised. T tokens, H and W their size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dnd.errors import DndError
from dnd.files import read_plain_pickle
from dnd.tokenizer.tokenizer import LoraTokenizer2D


def importance_weights(
    adapters: Iterable[Mapping[str, Tensor]], tokenizer: LoraTokenizer2D
) -> Tensor:
    """[T]: the mean over a token of its values' deviation across the bank, over the mean of all values' deviation.

    One pass (Welford 1962): only one adapter is in memory at a time, and the bank may be a generator. Padding counts
    for nothing. Raises DndError for fewer than two adapters, for other shapes among them, and where nothing varies.
    """
    count, mean, squares = 0, torch.empty(0), torch.empty(0)
    for count, state in enumerate(adapters, start=1):
        tokens = tokenizer.tokenize(state).float()
        if count == 1:
            mean, squares = torch.zeros_like(tokens), torch.zeros_like(tokens)
        if tokens.shape != mean.shape:
            raise DndError(
                f"adapter {count} has {len(tokens)} tokens, the first one {len(mean)}: one bank, one shape"
            )
        step = tokens - mean
        mean.add_(step, alpha=1 / count)
        squares.addcmul_(step, tokens - mean)
    if count < 2:
        raise DndError(f"{count} adapters: importance weights need a bank of at least two")
    deviation = (squares / count).clamp_min(0).sqrt()
    overall = deviation.nanmean(dtype=torch.float64)
    if not overall > 0:
        raise DndError(
            "all adapters of the bank are alike: importance weights need adapters that differ"
        )
    return (deviation.nanmean((-2, -1), dtype=torch.float64) / overall).float()


def load_importance(path: str | Path, n_tokens: int | None = None) -> Tensor:
    """Stored vector of importance weights, [T] float32, such as the ones published with DnD.

    Raises DndError for a foreign file, values that are no weights, and another number than `n_tokens` where given.
    """
    found = read_plain_pickle(Path(path))
    if not isinstance(found, Tensor) or not found.is_floating_point() or not found.numel():
        raise DndError(f"{path} holds no vector of importance weights: name a file with one tensor")
    weight_T = found.flatten().float()
    if not weight_T.isfinite().all() or weight_T.min() < 0 or not weight_T.any():
        raise DndError(
            f"{path} holds importance weights that are negative, not finite or all zero: compute them again"
        )
    if n_tokens is not None and len(weight_T) != n_tokens:
        raise DndError(
            f"{path} holds {len(weight_T)} importance weights, {n_tokens} tokens need one each"
        )
    return weight_T
