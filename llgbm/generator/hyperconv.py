"""HyperConv generator of Drag-and-Drop LLMs, on its grid of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from dnd.model import HyperConvDecoder
from dnd.tokenizer import LoraTokenizer2D, default_token_size
from torch import Tensor, nn

from llgbm.generator.networks import (
    GeneratorConfig,
    Standardiser,
    TrunkGenerator,
)
from llgbm.lora.adapters import LoraBatch, LoraSpec


class TokenStandardiser:
    """Map flat adapters [A, V] to DnD's tokens [A, U, X, Y] and back; padding is NaN.

    Without a `token_size` the spec sets it. Raises DndError for one that does not fit the matrices.
    """

    def __init__(self, spec: LoraSpec, token_size: Sequence[int] | None = None) -> None:
        self.spec = spec
        self._like = {_key(name, side): _empty(shape) for name, side, shape in spec.pieces}
        self.tokenizer = LoraTokenizer2D(token_size or default_token_size(self._like))
        self.n_tokens = self.tokenizer.n_tokens(self._like)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(U, X, Y)."""
        return self.n_tokens, *self.tokenizer.token_size

    def encode(self, values_AV: Tensor) -> Tensor:
        """Tokens [A, U, X, Y]. Raises DndError for values that are not finite."""
        batch = LoraBatch.unflatten(self.spec, values_AV)
        sides = {"A": batch.a, "B": batch.b}
        return self.tokenizer.tokenize(
            {_key(name, side): sides[side][name] for name, side, _ in self.spec.pieces}
        )

    def decode(self, tokens: Tensor) -> Tensor:
        """Invert `encode`: [A, U, X, Y] to [A, V]. Differentiable; padding is ignored."""
        state = self.tokenizer.detokenize(self._like, tokens)
        return torch.cat(
            [state[_key(name, side)].flatten(1) for name, side, _ in self.spec.pieces], dim=1
        )


def _key(module: str, side: str) -> str:
    return f"{module}.lora_{side}.weight"


def _empty(shape: tuple[int, int]) -> Tensor:
    """Return a matrix of a shape that takes no memory."""
    return torch.empty(1).expand(shape)


KERNEL_SIZE = 3
# Bundles and checkpoints written before tokens had a letter of their own.
OLDER_NAMES = {"start_UXY": "start_TXY", "spread_UXY": "spread_TXY"}


class HyperConvGenerator(TrunkGenerator):
    """Decoder of Drag-and-Drop LLMs (`dnd`), which predicts all tokens of an adapter at once.

    Two additions adapt it. A residual trunk and a linear layer turn the pooled prompts into the decoder's features, so
    that any number of prompts in any order works. Its outputs are standardised by mean and spread of the training
    tokens, so that training starts from the mean adapter, as it does for the default generator.

    Source: Liang et al. 2025, "Drag-and-Drop LLMs: Zero-Shot Prompt-to-Weights" (arXiv 2506.16406).
    """

    start_UXY: Tensor
    spread_UXY: Tensor

    def add_writer(self, config: GeneratorConfig) -> None:
        self._tokens = TokenStandardiser(self.spec)
        features = hyperconv_features(*self._tokens.shape)
        self.layout = nn.Linear(config.hidden, math.prod(features[0]))
        self.decoder = HyperConvDecoder(features, features[0], KERNEL_SIZE)
        start, spread = token_statistics(self._tokens, self.statistics)
        self.register_buffer("start_UXY", start)
        self.register_buffer("spread_UXY", spread)
        self.register_load_state_dict_pre_hook(_rename_older)

    @property
    def standardiser(self) -> TokenStandardiser:
        return self._tokens

    def forward(self, condition_ANC: Tensor) -> Tensor:
        features = self.layout(self.read(condition_ANC)).unflatten(1, self.decoder.condition_dim)
        return self.start_UXY + self.spread_UXY * self.decoder(features)


def _rename_older(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    for name, older in OLDER_NAMES.items():
        if prefix + older in state:
            state[prefix + name] = state.pop(prefix + older)


def hyperconv_features(n_tokens: int, height: int, width: int) -> list[tuple[int, int, int]]:
    """Feature shapes of the decoder for tokens [U, X, Y]: first a quarter of the tokens, then all."""
    return [(max(4, n_tokens // 4), height, width), (n_tokens, height, width)]


def token_statistics(
    tokens: TokenStandardiser, statistics: Standardiser, n_draws: int = 64
) -> tuple[Tensor, Tensor]:
    """Estimate mean and spread [U, X, Y] of tokens from adapters drawn value by value from these statistics.

    They are 0 and 1 in the padding, and everywhere on the meta device.
    """
    if statistics.mean_V.is_meta:
        return torch.zeros(tokens.shape, device="meta"), torch.ones(tokens.shape, device="meta")
    noise_AV = torch.randn(
        n_draws, len(statistics.mean_V), generator=torch.Generator().manual_seed(0)
    )
    drawn = tokens.encode(statistics.decode(noise_AV.to(statistics.mean_V)))
    fitted = Standardiser.fit(drawn.flatten(1).nan_to_num())
    real = ~drawn[0].isnan()
    start, spread = (part.view(tokens.shape) for part in (fitted.mean_V, fitted.scale_V))
    return torch.where(real, start, 0.0), torch.where(real, spread, 1.0)
