"""Generator of mixtures: a small code of a task weighs bases that all tasks share.

As in Zhyper and Program-as-Weights the network reads much and writes little. Axis letters: see `llgbm`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from llgbm.generator.networks import (
    GeneratorConfig,
    TrunkGenerator,
)
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


class MixtureGenerator(TrunkGenerator):
    """Weigh learned bases [bases, V] by a code of the pooled prompts; without blocks the map is linear.

    Source: ours, after the mixtures of bases of Program-as-Weights (2026, arXiv 2607.02512).
    """

    config_class = MixtureConfig

    def add_writer(self, config: GeneratorConfig) -> None:
        assert isinstance(config, MixtureConfig)  # `make_generator` sees to it
        self.code = nn.Linear(config.hidden, config.bases)
        self.bases = nn.Linear(config.bases, self.spec.n_values)
        # Small, so that training starts from the mean adapter.
        nn.init.normal_(self.bases.weight, std=0.1 / config.bases**0.5)
        nn.init.zeros_(self.bases.bias)

    def forward(self, condition_ANC: Tensor) -> Tensor:
        found: Tensor = self.bases(self.code(self.read(condition_ANC)))
        return found
