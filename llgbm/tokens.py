"""Adapters as the 2-D tokens of Drag-and-Drop LLMs: the standardisation that needs no statistics of a bank.

Letters: A adapters, V values of an adapter, T tokens, H and W height and width of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dnd.tokenizer import LoraTokenizer2D, default_token_size
from torch import Tensor

from llgbm.lora import LoraBatch, LoraSpec


class TokenStandardiser:
    """The map between flat adapters [A, V] and DnD's tokens [A, T, H, W], NaN where a token has padding.

    Without a `token_size` it follows from the spec. Raises DndError for one that does not fit the matrices.
    """

    def __init__(self, spec: LoraSpec, token_size: Sequence[int] | None = None) -> None:
        self.spec = spec
        self._like = {_key(name, side): _empty(shape) for name, side, shape in spec.pieces}
        self.tokenizer = LoraTokenizer2D(token_size or default_token_size(self._like))
        self.n_tokens = self.tokenizer.n_tokens(self._like)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, H, W)."""
        return self.n_tokens, *self.tokenizer.token_size

    def encode(self, values_AV: Tensor) -> Tensor:
        """Tokens [A, T, H, W]. Raises DndError for values that are not finite."""
        batch = LoraBatch.unflatten(self.spec, values_AV)
        sides = {"A": batch.a, "B": batch.b}
        return self.tokenizer.tokenize({_key(name, side): sides[side][name] for name, side, _ in self.spec.pieces})

    def decode(self, tokens_ATHW: Tensor) -> Tensor:
        """The way back from `encode`, [A, V]; differentiable, whatever stands in the padding."""
        state = self.tokenizer.detokenize(self._like, tokens_ATHW)
        return torch.cat([state[_key(name, side)].flatten(1) for name, side, _ in self.spec.pieces], dim=1)


def _key(module: str, side: str) -> str:
    return f"{module}.lora_{side}.weight"


def _empty(shape: tuple[int, int]) -> Tensor:
    """A matrix of a shape that holds no memory."""
    return torch.empty(1).expand(shape)
