"""Shapes of adapters, read off the layers of a base: Linear, and GPT-2's Conv1D."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from llgbm.lora.targets import is_conv1d, text_layers
from llgbm.runtime import UserError, content_hash

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class LinearShape:
    """One Linear layer of the base: its dotted name, its input and its output width.

    `is_transposed` marks GPT-2's Conv1D, which keeps its weight as [in, out].
    """

    name: str
    n_in: int
    n_out: int
    is_transposed: bool = False

    @property
    def kind(self) -> str:
        """Last part of the name, such as `q_proj`."""
        return self.name.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class LoraSpec:
    """All shapes of an adapter, read off the base model that it is for.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685).
    """

    modules: tuple[LinearShape, ...]
    rank: int
    alpha: float

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"the LoRA rank is {self.rank}; it must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"the LoRA alpha is {self.alpha}; it must be a number above 0")

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        rank: int,
        alpha: float,
        target_modules: Sequence[str] = TARGET_MODULES,
    ) -> LoraSpec:
        """Read the Linear layers called `target_modules` off a model's text decoder, in its own order.

        Raises UserError for a name without such a layer, and for the experts of a mixture: they read tokens of several
        texts at once, so that adapters would mix.
        """
        wanted = set(target_modules)
        shapes = (linear_shape(name, module) for name, module in text_layers(model).items())
        found = tuple(shape for shape in shapes if shape is not None and shape.kind in wanted)
        missing = wanted - {shape.kind for shape in found}
        if missing:
            raise UserError(
                f"the base model has no Linear layer called {', '.join(sorted(missing))}: name target modules that it "
                "has with --target-modules"
            )
        experts = [shape.name for shape in found if _EXPERT.search(shape.name)]
        if experts:
            raise UserError(
                f"{experts[0]} is an expert of a mixture, which reads tokens of several texts at once: adapters of "
                "several tasks would mix there; name target modules of its attention only"
            )
        return cls(found, rank, alpha)

    @property
    def scaling(self) -> float:
        """Factor on B A, alpha / rank (Hu et al. 2021, section 4.1)."""
        return self.alpha / self.rank

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Kinds of layer that an adapter touches, sorted."""
        return tuple(sorted({shape.kind for shape in self.modules}))

    @property
    def is_transposed(self) -> bool:
        """Say if all layers are Conv1D, which PEFT calls `fan_in_fan_out`."""
        return bool(self.modules) and all(shape.is_transposed for shape in self.modules)

    @property
    def pieces(self) -> tuple[tuple[str, str, tuple[int, int]], ...]:
        """(module, "A" or "B", shape) of each matrix, in the order of a flat adapter."""
        return tuple(
            piece
            for m in self.modules
            for piece in ((m.name, "A", (self.rank, m.n_in)), (m.name, "B", (m.n_out, self.rank)))
        )

    @property
    def n_values(self) -> int:
        """Return the number of values in an adapter."""
        return sum(self.piece_sizes)

    @property
    def piece_sizes(self) -> list[int]:
        """Count the values of each matrix, in the order of a flat adapter."""
        return [rows * columns for _, _, (rows, columns) in self.pieces]

    @property
    def hash(self) -> str:
        return content_hash(self)


def linear_shape(name: str, module: nn.Module) -> LinearShape | None:
    """Return the shape of a layer that can be adapted, Linear or GPT-2's Conv1D; None for any other."""
    if isinstance(module, nn.Linear):
        return LinearShape(name, module.in_features, module.out_features)
    if is_conv1d(module):
        n_in, n_out = module.get_parameter("weight").shape
        return LinearShape(name, n_in, n_out, is_transposed=True)
    return None
