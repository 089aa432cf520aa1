"""Generators: condition to adapters. One abstract class; its implementations are final.

Letters: A adapters, N prompts, C condition width, M adapted modules, H hidden width, V values of an adapter, R rank;
T tokens, X and Y their height and width.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from dnd.model import HyperConvDecoder
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llgbm.dataset import Standardiser
from llgbm.lora import LinearShape, LoraBatch, LoraSpec
from llgbm.runtime import UserError, stream_seed
from llgbm.tokens import TokenStandardiser


@dataclass(frozen=True)
class GeneratorConfig:
    """Which generator, and its widths: `blocks` residual blocks of width `hidden` read the prompts."""

    name: str = "default"
    hidden: int = 320
    blocks: int = 1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.blocks < 0 or not 0 <= self.dropout < 1:
            raise UserError("a generator needs hidden >= 1, blocks >= 0 and a dropout of at least 0 and below 1")


class LoraGenerator(nn.Module, ABC):
    """Reads N prompt embeddings of each task and predicts its whole adapter as tokens, in a space that it names."""

    mean_V: Tensor
    scale_V: Tensor

    def __init__(self, spec: LoraSpec, condition_width: int, standardiser: Standardiser) -> None:
        super().__init__()
        if standardiser.mean_V.shape != (spec.n_values,):
            raise ValueError(
                f"statistics of {standardiser.mean_V.numel()} values, adapters of {spec.n_values}: another base or rank"
            )
        self.spec = spec
        self.condition_width = condition_width
        self.register_buffer("mean_V", standardiser.mean_V.clone())
        self.register_buffer("scale_V", standardiser.scale_V.clone())

    @property
    @abstractmethod
    def standardiser(self) -> Standardiser | TokenStandardiser:
        """The map between flat adapters [A, V] and the tokens [A, ...] that are predicted."""

    @abstractmethod
    def forward(self, condition_ANC: Tensor) -> Tensor:
        """Tokens [A, ...] for prompt embeddings [A, N, C]."""

    @property
    def statistics(self) -> Standardiser:
        """Mean and scale of every value of the training adapters."""
        return Standardiser(self.mean_V, self.scale_V)

    def to_lora(self, tokens: Tensor) -> LoraBatch:
        """Undo the standardisation; differentiable."""
        return LoraBatch.unflatten(self.spec, self.standardiser.decode(tokens))

    def generate(self, condition_ANC: Tensor) -> LoraBatch:
        """Adapters for prompt embeddings, without gradient, in eval mode.

        Raises ValueError for another width, no prompt, NaN or infinite values.
        """
        if condition_ANC.ndim != 3 or condition_ANC.shape[-1] != self.condition_width:
            raise ValueError(
                f"conditions have shape {tuple(condition_ANC.shape)}, needed: [A, N, {self.condition_width}]"
            )
        if condition_ANC.numel() == 0 or not torch.isfinite(condition_ANC).all():
            raise ValueError(
                f"conditions of shape {tuple(condition_ANC.shape)} hold no prompt, or NaN or infinite values: "
                "encode at least one prompt of each task"
            )
        was_training = self.training
        self.eval()
        with torch.no_grad():
            batch = self.to_lora(self(condition_ANC))
        self.train(was_training)
        return batch


class ModuleCodeGenerator(LoraGenerator):
    """The default. A residual trunk reads the pooled prompts; every (layer, module) has a code that modulates the
    trunk's output (FiLM, Perez et al. 2018); one linear head a kind of module writes its full A and B.

    The path from prompts to weights is linear but for the residual blocks, since task parts add up in weight space.
    """

    def __init__(
        self, spec: LoraSpec, condition_width: int, standardiser: Standardiser, config: GeneratorConfig
    ) -> None:
        super().__init__(spec, condition_width, standardiser)
        n_modules, hidden = len(spec.modules), config.hidden
        self.norm = nn.LayerNorm(condition_width)
        self.inlet = nn.Linear(condition_width, hidden)
        self.trunk = nn.ModuleList(ResidualBlock(hidden, config.dropout) for _ in range(config.blocks))
        self.gain_MH = nn.Parameter(torch.randn(n_modules, hidden) * 0.3)
        self.shift_MH = nn.Parameter(torch.randn(n_modules, hidden) * 0.3)
        self.outlet = ResidualBlock(hidden, config.dropout)
        shapes = {m.kind: m for m in spec.modules}
        self.heads = nn.ModuleDict({kind: _head(hidden, spec.rank, m) for kind, m in shapes.items()})

    @property
    def standardiser(self) -> Standardiser:
        return self.statistics

    def forward(self, condition_ANC: Tensor) -> Tensor:
        state_AH = self.inlet(self.norm(condition_ANC.mean(1)))
        for block in self.trunk:
            state_AH = block(state_AH)
        codes_AMH = self.outlet(state_AH[:, None] * (1 + self.gain_MH) + self.shift_MH)
        written = [self.heads[m.kind](codes_AMH[:, i]) for i, m in enumerate(self.spec.modules)]
        return torch.cat(written, dim=1)


KERNEL_SIZE = 3


class HyperConvGenerator(LoraGenerator):
    """The decoder of Drag-and-Drop LLMs (`dnd`), which writes all tokens of an adapter at once.

    The decoder reads features of a fixed number of prompts and writes tokens of whatever scale; here it is framed by
    two things. The pooled prompts are laid out as its features by a residual trunk and one linear, so that any number
    of prompts in any order will do. And what it writes is counted from the mean token of the training adapters in
    units of the spread there, so that training starts from the mean adapter, as it does for the default.
    """

    start_TXY: Tensor
    spread_TXY: Tensor

    def __init__(
        self, spec: LoraSpec, condition_width: int, standardiser: Standardiser, config: GeneratorConfig
    ) -> None:
        super().__init__(spec, condition_width, standardiser)
        self._tokens = TokenStandardiser(spec)
        features = hyperconv_features(*self._tokens.shape)
        self.norm = nn.LayerNorm(condition_width)
        self.inlet = nn.Linear(condition_width, config.hidden)
        self.trunk = nn.ModuleList(ResidualBlock(config.hidden, config.dropout) for _ in range(config.blocks))
        self.layout = nn.Linear(config.hidden, math.prod(features[0]))
        self.decoder = HyperConvDecoder(features, features[0], KERNEL_SIZE)
        start, spread = token_statistics(self._tokens, standardiser)
        self.register_buffer("start_TXY", start)
        self.register_buffer("spread_TXY", spread)

    @property
    def standardiser(self) -> TokenStandardiser:
        return self._tokens

    def forward(self, condition_ANC: Tensor) -> Tensor:
        state_AH = self.inlet(self.norm(condition_ANC.mean(1)))
        for block in self.trunk:
            state_AH = block(state_AH)
        features_ANLC = self.layout(state_AH).unflatten(1, self.decoder.condition_dim)
        return self.start_TXY + self.spread_TXY * self.decoder(features_ANLC)


def hyperconv_features(n_tokens: int, height: int, width: int) -> list[tuple[int, int, int]]:
    """Feature shapes of the decoder for tokens [T, X, Y]: a quarter of the tokens in their own size, then all."""
    return [(max(4, n_tokens // 4), height, width), (n_tokens, height, width)]


def token_statistics(tokens: TokenStandardiser, statistics: Standardiser, n_draws: int = 64) -> tuple[Tensor, Tensor]:
    """Mean and spread [T, X, Y] of the tokens of adapters drawn value by value from these statistics; 0 and 1 in the
    padding, and everywhere where the statistics are without values (on the meta device, for an estimate)."""
    if statistics.mean_V.is_meta:
        return torch.zeros(tokens.shape, device="meta"), torch.ones(tokens.shape, device="meta")
    noise_AV = torch.randn(n_draws, len(statistics.mean_V), generator=torch.Generator().manual_seed(0))
    drawn = tokens.encode(statistics.decode(noise_AV.to(statistics.mean_V)))
    fitted = Standardiser.fit(drawn.flatten(1).nan_to_num())
    real = ~drawn[0].isnan()
    start, spread = (part.view(tokens.shape) for part in (fitted.mean_V, fitted.scale_V))
    return torch.where(real, start, 0.0), torch.where(real, spread, 1.0)


class ResidualBlock(nn.Module):
    """x + W2 gelu(W1 norm(x))."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, 2 * hidden)
        self.down = nn.Linear(2 * hidden, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(nn.functional.gelu(self.up(self.norm(x)))))


def _head(hidden: int, rank: int, shape: LinearShape) -> nn.Linear:
    """Writes A then B, flat. Small at the start, so that training starts from the mean adapter."""
    head = nn.Linear(hidden, rank * (shape.n_in + shape.n_out))
    nn.init.normal_(head.weight, std=0.1 / hidden**0.5)
    nn.init.zeros_(head.bias)
    return head


Maker = Callable[[LoraSpec, int, Standardiser, GeneratorConfig], LoraGenerator]
GENERATORS: dict[str, Maker] = {"default": ModuleCodeGenerator, "hyperconv": HyperConvGenerator}


def make_generator(
    config: GeneratorConfig, spec: LoraSpec, condition_width: int, standardiser: Standardiser, seed: int
) -> LoraGenerator:
    """A fresh generator by name; the same seed gives the same weights. Raises UserError for an unknown name."""
    if config.name not in GENERATORS:
        raise UserError(f"unknown generator {config.name!r}; there are: {', '.join(GENERATORS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed("generator", seed))
        return GENERATORS[config.name](spec, condition_width, standardiser, config)


def save_generator(folder: Path, generator: LoraGenerator, config: GeneratorConfig, facts: Mapping[str, Any]) -> None:
    """Write `generator.safetensors` and `generator.json` (config, spec and the facts given) into a folder."""
    weights = {k: v.detach().cpu().contiguous() for k, v in generator.state_dict().items()}
    save_file(weights, folder / "generator.safetensors")
    described = {
        **facts,
        "generator": asdict(config),
        "spec": asdict(generator.spec),
        "condition_width": generator.condition_width,
    }
    (folder / "generator.json").write_text(json.dumps(described, indent=1, sort_keys=True))


def load_generator(folder: Path) -> tuple[LoraGenerator, dict[str, Any]]:
    """Read what `save_generator` wrote. Raises UserError where the folder holds no generator, or a torn one."""
    try:
        generator, facts = _read_generator(folder)
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no generator: name a folder with generator.json and its weights") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the generator in {folder} is torn or of another version: make or fetch it again") from error
    if not all(torch.isfinite(value).all() for value in generator.state_dict().values()):
        raise UserError(f"the generator in {folder} holds NaN or infinite weights: train it again")
    return generator.eval(), facts


def _read_generator(folder: Path) -> tuple[LoraGenerator, dict[str, Any]]:
    facts = json.loads((folder / "generator.json").read_text())
    weights = load_file(folder / "generator.safetensors")
    shapes = tuple(LinearShape(**m) for m in facts["spec"]["modules"])
    spec = LoraSpec(shapes, facts["spec"]["rank"], facts["spec"]["alpha"])
    statistics = Standardiser(weights["mean_V"], weights["scale_V"])
    generator = make_generator(GeneratorConfig(**facts["generator"]), spec, facts["condition_width"], statistics, 0)
    generator.load_state_dict(weights, strict=True)
    return generator, facts
