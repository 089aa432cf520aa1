"""Generator with a latent variable: a conditional variational autoencoder of adapters. Axis letters: see `llgbm`.

Z is the width of the latent variable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import softplus

from llgbm.generator.networks import (
    GeneratorConfig,
    ModuleCodeGenerator,
    ResidualBlock,
    Standardiser,
    TokenMap,
    TrainingRows,
    rows_of_kinds,
)
from llgbm.lora.adapters import LoraBatch, LoraSpec
from llgbm.lora.geometry import fix_gauge
from llgbm.runtime import UserError, stream_seed

GAUGES = ("svd", "none")
LEAST_SPREAD = 1e-3


@dataclass(frozen=True)
class LatentConfig(GeneratorConfig):
    """Widths of a latent variable of `latent` numbers; `beta` is the weight of its KL divergence in the loss.

    `free_bits` nats a number cost nothing. `gauge` is the form that adapters are read and written in: `svd`, or `none`
    as they are.
    """

    name: str = "latent"
    latent: int = 16
    beta: float = 0.01
    free_bits: float = 0.0
    gauge: str = "svd"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent < 1:
            raise UserError(f"a latent variable of {self.latent} numbers says nothing: give 1")
        for name in ("beta", "free_bits"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"{name} is {value:g}; it must be a finite number of at least 0")
        if self.gauge not in GAUGES:
            raise UserError(f"unknown gauge {self.gauge!r}; there are: {', '.join(GAUGES)}")


@dataclass(frozen=True)
class GaugeFixed:
    """Map flat adapters to standardised tokens of one form of each update (`fix_gauge`), and back to that form."""

    spec: LoraSpec
    statistics: Standardiser

    def encode(self, values_AV: Tensor) -> Tensor:
        return self.statistics.encode(fix_values(self.spec, values_AV))

    def decode(self, tokens: Tensor) -> Tensor:
        return self.statistics.decode(tokens)


class LatentGenerator(ModuleCodeGenerator):
    """Write adapters as the default generator does, from the trunk's state moved by a latent variable.

    In training the variable is drawn from a posterior that reads the teacher, too; the loss holds its KL divergence
    from the prior, which reads the prompts alone. `generate` takes the prior's mean, `sample` draws from it. Teachers'
    weights are read in training whatever the loss terms are.

    Source: Sohn et al. 2015, "Learning Structured Output Representation using Deep Conditional Generative Models"; free
    bits are those of Kingma et al. 2016 (arXiv 1606.04934).
    """

    config_class = LatentConfig

    def add_writer(self, config: GeneratorConfig) -> None:
        assert isinstance(config, LatentConfig)  # `make_generator` sees to it
        super().add_writer(config)
        self.beta, self.free_bits, self.gauge = config.beta, config.free_bits, config.gauge
        self.encoder = AdapterEncoder(self.spec, config)
        self.posterior = nn.Linear(2 * config.hidden, 2 * config.latent)
        self.prior = nn.Linear(config.hidden, 2 * config.latent)
        self.latent_inlet = nn.Linear(config.latent, config.hidden, bias=False)

    @property
    def standardiser(self) -> TokenMap:
        return GaugeFixed(self.spec, self.statistics) if self.gauge == "svd" else self.statistics

    @property
    def penalties(self) -> Mapping[str, float]:
        return {"kl": self.beta}

    def prepare_training(self, rows: TrainingRows) -> None:
        """Set the statistics to those of the teachers in their fixed form."""
        if self.gauge == "svd":
            fitted = Standardiser.fit(fix_values(self.spec, rows.read_teachers()))
            self.mean_V, self.scale_V = fitted.mean_V, fitted.scale_V

    def forward(self, condition_ANC: Tensor) -> Tensor:
        state_AH = self.read(condition_ANC)
        return self.decode(state_AH, gaussian(self.prior(state_AH)).mean)

    def training_forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        state_AH = self.read(batch["condition"])
        prior = gaussian(self.prior(state_AH))
        both = torch.cat([state_AH, self.encoder(batch["tokens"])], dim=1)
        posterior = gaussian(self.posterior(both))
        noise_AZ = draw_noise(batch["draw"], posterior.mean)
        divergence_AZ = kl_divergence(posterior, prior).clamp_min(self.free_bits)
        tokens = self.decode(state_AH, posterior.mean + noise_AZ * posterior.stddev)
        return tokens, {"kl": divergence_AZ.sum(1).mean()}

    def decode(self, state_AH: Tensor, latent_AZ: Tensor) -> Tensor:
        """Tokens [A, V] for states of the trunk and latent variables."""
        return self.write(state_AH + self.latent_inlet(latent_AZ))

    def sample(self, condition_NC: Tensor, seed: int, numbers: Sequence[int]) -> LoraBatch:
        """Draw one adapter for each number from the prior of the prompts. Raises ValueError as `generate`."""

        def predict(condition_ANC: Tensor) -> Tensor:
            state_AH = self.read(condition_ANC).expand(len(numbers), -1)
            prior = gaussian(self.prior(state_AH))
            draws = torch.tensor([stream_seed("sample", seed, number) for number in numbers])
            return self.decode(state_AH, prior.mean + draw_noise(draws, prior.mean) * prior.stddev)

        return self.write_adapters(condition_NC[None], predict)


class AdapterEncoder(nn.Module):
    """Read tokens [A, V] as a state [A, H]: layers by kind of module, modulated by codes of modules, averaged."""

    def __init__(self, spec: LoraSpec, config: GeneratorConfig) -> None:
        super().__init__()
        self.kinds = rows_of_kinds(spec)
        self.sizes = [spec.rank * (m.n_in + m.n_out) for m in spec.modules]
        self.inlets = nn.ModuleDict(
            {
                kind: nn.Linear(self.sizes[rows[0]], config.hidden)
                for kind, rows in self.kinds.items()
            }
        )
        self.gain_MH = nn.Parameter(torch.randn(len(self.sizes), config.hidden) * 0.3)
        self.shift_MH = nn.Parameter(torch.randn(len(self.sizes), config.hidden) * 0.3)
        self.block = ResidualBlock(config.hidden, config.dropout)

    def forward(self, tokens_AV: Tensor) -> Tensor:
        pieces = tokens_AV.split(self.sizes, dim=1)
        codes = []
        for kind, rows in self.kinds.items():
            read_AMH = self.inlets[kind](torch.stack([pieces[row] for row in rows], dim=1))
            codes.append(read_AMH * (1 + self.gain_MH[rows]) + self.shift_MH[rows])
        found: Tensor = self.block(torch.cat(codes, dim=1).mean(1))
        return found


def fix_values(spec: LoraSpec, values_AV: Tensor) -> Tensor:
    """Return flat adapters in the one form of their updates."""
    return fix_gauge(LoraBatch.unflatten(spec, values_AV)).flatten(spec)


def gaussian(parts_A2Z: Tensor) -> Normal:
    """Return normal distributions of independent numbers; the second half of the parts are their spreads."""
    mean_AZ, spread_AZ = parts_A2Z.float().chunk(2, dim=1)
    return Normal(mean_AZ, softplus(spread_AZ) + LEAST_SPREAD, validate_args=False)


def draw_noise(draws: Tensor, like_AZ: Tensor) -> Tensor:
    """Draw standard normal noise, each row from a seed of its own, so that a resumed run draws the same."""
    if draws.is_meta:
        return torch.zeros_like(like_AZ)
    streams = (torch.Generator().manual_seed(stream_seed("latent", d)) for d in draws.tolist())
    rows = [torch.randn(like_AZ.shape[1], generator=stream) for stream in streams]
    return torch.stack(rows).to(like_AZ.device)
