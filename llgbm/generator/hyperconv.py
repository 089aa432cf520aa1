"""HyperConv generator of Drag-and-Drop LLMs, on its grid of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from dnd.model import HyperConvDecoder
from dnd.tokenizer import LoraTokenizer2D, default_token_size
from torch import Tensor, nn

from llgbm.generator.networks import (
    GeneratorConfig,
    LoraGenerator,
    Standardiser,
    TrunkGenerator,
)
from llgbm.lora.adapters import LoraBatch, LoraSpec
from llgbm.runtime import UserError


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


@dataclass(frozen=True)
class HyperConvTokensConfig(GeneratorConfig):
    """Sizes of what the decoder reads: `prompts` prompts of `length` tokens. There is no trunk to set."""

    name: str = "hyperconv_tokens"
    prompts: int = 16
    length: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        of_trunk = [one.name for one in fields(GeneratorConfig) if one.name != "name"]
        if set_here := [
            name for name in of_trunk if getattr(self, name) != getattr(type(self), name)
        ]:
            raise UserError(
                f"the generator {self.name} has no trunk: leave its option {set_here[0]} out"
            )
        if min(self.prompts, self.length) < 1:
            raise UserError(
                f"{self.name} reads {self.prompts} prompts of {self.length} tokens: give at least 1"
            )


class HyperConvTokensGenerator(LoraGenerator):
    """Decoder of Drag-and-Drop LLMs on the states [N, L, C] of all tokens of N prompts, as in the paper.

    Convolutions see the order of their rows, so prompts are laid in an order of their content, and theirs has no
    effect. More than N prompts are read in groups whose predictions are averaged; zeros stand for padding.

    Source: Liang et al. 2025, "Drag-and-Drop LLMs: Zero-Shot Prompt-to-Weights" (arXiv 2506.16406).
    """

    config_class = HyperConvTokensConfig
    reads_padding = True
    needs_tokens = True
    start_UXY: Tensor
    spread_UXY: Tensor

    def __init__(
        self,
        spec: LoraSpec,
        condition_width: int,
        standardiser: Standardiser,
        config: GeneratorConfig,
    ) -> None:
        super().__init__(spec, condition_width, standardiser)
        assert isinstance(config, HyperConvTokensConfig)  # `make_generator` sees to it
        self.prompts, self.length = config.prompts, config.length
        self._tokens = TokenStandardiser(self.spec)
        read = (config.prompts, config.length, condition_width)
        features = [read, *hyperconv_features(*self._tokens.shape)]
        self.decoder = HyperConvDecoder(features, read, KERNEL_SIZE)
        start, spread = token_statistics(self._tokens, self.statistics)
        self.register_buffer("start_UXY", start)
        self.register_buffer("spread_UXY", spread)

    @property
    def standardiser(self) -> TokenStandardiser:
        return self._tokens

    def check_reads(self, prompt_tokens: int, padded: bool) -> None:
        if prompt_tokens > self.length:
            raise UserError(
                f"the generator reads {self.length} tokens of a prompt, conditions hold up to {prompt_tokens}: lower "
                "--prompt-tokens, or raise its option length"
            )

    def forward(self, condition_ANC: Tensor) -> Tensor:
        states_ANLC = condition_ANC if condition_ANC.ndim == 4 else condition_ANC[:, :, None]
        groups_AGNLC, real_AG = self._groups(states_ANLC)
        features = groups_AGNLC.flatten(0, 1).nan_to_num(nan=0.0)
        found = self.decoder(features).unflatten(0, real_AG.shape)
        weights = real_AG.to(found).view(*real_AG.shape, 1, 1, 1)
        mean = (found * weights).sum(1) / weights.sum(1)
        return self.start_UXY + self.spread_UXY * mean

    def _groups(self, states_ANLC: Tensor) -> tuple[Tensor, Tensor]:
        """Part prompts into groups [A, G, N, L, C] that the decoder reads; say which of them [A, G] hold any."""
        n_prompts, n_tokens = states_ANLC.shape[1:3]
        n_groups = -(-n_prompts // self.prompts)
        missing = (n_groups * self.prompts - n_prompts, self.length - n_tokens)
        laid = in_order_of_content(states_ANLC)
        laid = nn.functional.pad(laid, (0, 0, 0, missing[1], 0, missing[0]), value=torch.nan)
        # The prompts of a group lie n_groups apart, so that every group has its share of them.
        groups = laid.unflatten(1, (self.prompts, n_groups)).transpose(1, 2)
        return groups, ~groups[:, :, 0, 0, 0].isnan()


def in_order_of_content(states_ANLC: Tensor) -> Tensor:
    """Lay the prompts of each adapter in the order of a value, the mean over their tokens; padding comes last."""
    keys_AN = states_ANLC[..., 0].nanmean(2).nan_to_num(nan=torch.inf)
    order_AN = keys_AN.argsort(dim=1, stable=True)
    return states_ANLC.gather(1, order_AN[:, :, None, None].expand_as(states_ANLC))


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
