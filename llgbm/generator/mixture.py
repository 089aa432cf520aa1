"""Generator of mixtures: a small code of a task weighs bases that all tasks share.

As in Zhyper and Program-as-Weights the network reads much and writes little. Axis letters: see `llgbm`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from llgbm.generator.networks import (
    GeneratorConfig,
    LoraGenerator,
    ResidualBlock,
    Standardiser,
    make_pool,
)
from llgbm.lora.adapters import LoraSpec
from llgbm.runtime import UserError


@dataclass(frozen=True)
class MixtureConfig(GeneratorConfig):
    """Widths of a mixture: the trunk reads at width `hidden`, the code has `bases` numbers."""

    name: str = "mixture"
    bases: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bases < 1:
            raise UserError(f"a mixture of {self.bases} bases writes nothing: give at least 1")


class MixtureGenerator(LoraGenerator):
    """Weigh learned bases [bases, V] by a code of the pooled prompts; without blocks the map is linear."""

    def __init__(
        self,
        spec: LoraSpec,
        condition_width: int,
        standardiser: Standardiser,
        config: GeneratorConfig,
    ) -> None:
        super().__init__(spec, condition_width, standardiser)
        n_bases = getattr(config, "bases", MixtureConfig.bases)
        self.pool = make_pool(config.pooling, condition_width)
        self.norm = nn.LayerNorm(condition_width)
        self.inlet = nn.Linear(condition_width, config.hidden)
        self.trunk = nn.ModuleList(
            ResidualBlock(config.hidden, config.dropout) for _ in range(config.blocks)
        )
        self.code = nn.Linear(config.hidden, n_bases)
        self.bases = nn.Linear(n_bases, spec.n_values)
        # Small, so that training starts from the mean adapter.
        nn.init.normal_(self.bases.weight, std=0.1 / n_bases**0.5)
        nn.init.zeros_(self.bases.bias)

    @property
    def standardiser(self) -> Standardiser:
        return self.statistics

    def forward(self, condition_ANC: Tensor) -> Tensor:
        state_AH = self.inlet(self.norm(self.pool(condition_ANC)))
        for block in self.trunk:
            state_AH = block(state_AH)
        found: Tensor = self.bases(self.code(state_AH))
        return found
