"""Generator with a head of its own for every module. Axis letters: see `llgbm`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llgbm.generator.networks import (
    GeneratorConfig,
    LoraGenerator,
    ResidualBlock,
    Standardiser,
    make_head,
    make_pool,
)
from llgbm.lora.adapters import LoraSpec


class ModuleHeadsGenerator(LoraGenerator):
    """Residual trunk, then one linear head a module, where the default has one head a kind and codes of modules."""

    def __init__(
        self,
        spec: LoraSpec,
        condition_width: int,
        standardiser: Standardiser,
        config: GeneratorConfig,
    ) -> None:
        super().__init__(spec, condition_width, standardiser)
        self.pool = make_pool(config.pooling, condition_width)
        self.norm = nn.LayerNorm(condition_width)
        self.inlet = nn.Linear(condition_width, config.hidden)
        self.trunk = nn.ModuleList(
            ResidualBlock(config.hidden, config.dropout) for _ in range(config.blocks)
        )
        self.heads = nn.ModuleList(make_head(config.hidden, spec.rank, m) for m in spec.modules)

    @property
    def standardiser(self) -> Standardiser:
        return self.statistics

    def forward(self, condition_ANC: Tensor) -> Tensor:
        state_AH = self.inlet(self.norm(self.pool(condition_ANC)))
        for block in self.trunk:
            state_AH = block(state_AH)
        return torch.cat([head(state_AH) for head in self.heads], dim=1)
