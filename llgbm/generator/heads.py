"""Generator with a head of its own for every module. Axis letters: see `llgbm`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llgbm.generator.networks import (
    GeneratorConfig,
    TrunkGenerator,
    make_head,
)


class ModuleHeadsGenerator(TrunkGenerator):
    """Residual trunk, then one linear head a module, where the default has one head a kind and codes of modules.

    Source: Ha et al. 2016, "HyperNetworks" (arXiv 1609.09106), with one head a module.
    """

    def add_writer(self, config: GeneratorConfig) -> None:
        self.heads = nn.ModuleList(
            make_head(config.hidden, self.spec.rank, m) for m in self.spec.modules
        )

    def forward(self, condition_ANC: Tensor) -> Tensor:
        state_AH = self.read(condition_ANC)
        return torch.cat([head(state_AH) for head in self.heads], dim=1)
