"""Generators: condition to adapters. One abstract class; its implementations are final.

Axis letters: see `llgbm`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from llgbm.generator.pooling import POOLINGS, check_condition, make_pool
from llgbm.lora.adapters import LoraBatch, LoraSpec
from llgbm.lora.shapes import LinearShape
from llgbm.runtime import UserError


@dataclass(frozen=True)
class GeneratorConfig:
    """Name and widths of a generator: `blocks` residual blocks of width `hidden` read the pooled prompts.

    `pooling` is the mean of the prompts' embeddings, or attention of learned queries over them. A generator with
    widths of its own has a subclass.
    """

    name: str = "default"
    hidden: int = 320
    blocks: int = 1
    dropout: float = 0.0
    pooling: str = "mean"

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.blocks < 0 or not 0 <= self.dropout < 1:
            raise UserError(
                "a generator needs hidden >= 1, blocks >= 0 and a dropout of at least 0 and below 1"
            )
        if self.pooling not in POOLINGS:
            raise UserError(f"unknown pooling {self.pooling!r}; there are: {', '.join(POOLINGS)}")

    @property
    def text(self) -> str:
        """Return the name, followed by the options that differ from their defaults: `default hidden=640`."""
        others = [own for own in fields(self) if own.name != "name"]
        set_here = [f for f in others if getattr(self, f.name) != f.default]
        return " ".join([self.name, *(f"{f.name}={getattr(self, f.name)}" for f in set_here)])


class TokenMap(Protocol):
    """Map flat adapters [A, V] to the tokens [A, ...] that a generator predicts, and back."""

    def encode(self, values_AV: Tensor) -> Tensor: ...

    def decode(self, tokens: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class TrainingRows:
    """Rows that a generator is trained on: the task of each, their conditions [B, N, ...] and their teachers [B, V].

    Conditions and teachers are read when they are asked for, since a bank may lie on the disk.
    """

    tasks: tuple[str, ...]
    read_conditions: Callable[[], Tensor]
    read_teachers: Callable[[], Tensor]

    @property
    def task_B(self) -> Tensor:
        """Number of each row's task; rows of one task have one number."""
        numbers = {task: number for number, task in enumerate(dict.fromkeys(self.tasks))}
        found = [numbers[task] for task in self.tasks]
        return torch.tensor(found)


class LoraGenerator(nn.Module, ABC):
    """Network from N prompt embeddings of a task to the tokens of its whole adapter.

    A condition is [A, N, C], or of token states [A, N, L, C]; rows of NaN in it are padding (`pooling`). A generator
    that leaves them out of account says so by `reads_padding`; any other is given none.
    """

    reads_padding: ClassVar[bool] = False
    needs_tokens: ClassVar[bool] = False
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
    def standardiser(self) -> TokenMap:
        """Map between flat adapters [A, V] and predicted tokens [A, ...]."""

    @abstractmethod
    def forward(self, condition_ANC: Tensor) -> Tensor:
        """Tokens [A, ...] for prompt embeddings [A, N, C]."""

    @property
    def penalties(self) -> Mapping[str, float]:
        """Weights by name of the generator's own parts of the loss, which `training_forward` computes."""
        return {}

    def prepare_training(self, rows: TrainingRows) -> None:
        """Take what the generator keeps of the training rows, before its optimiser is made; also on the meta device.

        It may set the statistics anew: the teachers' tokens are encoded afterwards. What it keeps must be in the state
        dict, from which a bundle is read without this call.
        """

    def training_forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens for a batch of `create_dataloader`, and by name a scalar for each of `penalties`, a mean over rows.

        Whatever is random should follow from `batch["draw"]`, a number that no two samples share.
        """
        return self(batch["condition"]), {}

    @property
    def statistics(self) -> Standardiser:
        """Mean and scale of every value of the training adapters."""
        return Standardiser(self.mean_V, self.scale_V)

    def check_reads(self, prompt_tokens: int, padded: bool) -> None:
        """Raise UserError where the generator cannot read so many token states a prompt (0: one vector), or padding."""
        if (padded or prompt_tokens) and not self.reads_padding:
            raise UserError(
                f"the generator {type(self).__name__} reads no padding (`reads_padding`): leave token states and a "
                "varied number of prompts out"
            )

    def to_lora(self, tokens: Tensor) -> LoraBatch:
        """Undo the standardisation; differentiable."""
        return LoraBatch.unflatten(self.spec, self.standardiser.decode(tokens))

    def generate(self, condition_ANC: Tensor) -> LoraBatch:
        """Adapters for prompt embeddings, without gradient, in eval mode.

        Raises ValueError for another width, no prompt, NaN or infinite values.
        """
        return self.write_adapters(condition_ANC, self)

    def sample(self, condition_NC: Tensor, seed: int, numbers: Sequence[int]) -> LoraBatch:
        """Draw one adapter for each number from the same prompt embeddings; a number and a seed tell an adapter.

        Raises UserError for a generator that draws nothing, ValueError as `generate`.
        """
        raise UserError(
            "this generator writes one adapter for a set of prompts: to draw several, train the generator `latent`"
        )

    def write_adapters(
        self, condition_ANC: Tensor, predict: Callable[[Tensor], Tensor]
    ) -> LoraBatch:
        """Adapters of the tokens that `predict` gives for prompt embeddings. Raises ValueError as `generate`."""
        check_condition(condition_ANC, self.condition_width)
        was_training = self.training
        self.eval()
        with torch.no_grad():
            batch = self.to_lora(predict(condition_ANC))
        self.train(was_training)
        return batch


class TrunkGenerator(LoraGenerator):
    """Generator that reads the pooled prompts by a residual trunk; what is written from its state is a subclass's."""

    reads_padding = True

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
        self.add_writer(config)

    @abstractmethod
    def add_writer(self, config: GeneratorConfig) -> None:
        """Add the parts that write an adapter from the state of the trunk."""

    @property
    def standardiser(self) -> TokenMap:
        return self.statistics

    def read(self, condition_ANC: Tensor) -> Tensor:
        """State [A, H] of the trunk for prompt embeddings [A, N, C]."""
        state_AH: Tensor = self.inlet(self.norm(self.pool(condition_ANC)))
        for block in self.trunk:
            state_AH = block(state_AH)
        return state_AH


class ModuleCodeGenerator(TrunkGenerator):
    """Default generator: residual trunk, a FiLM code for every module (Perez et al. 2018), linear heads.

    The trunk reads the pooled prompts. The code of a (layer, module) modulates the trunk's output. One head per kind
    of module predicts its full A and B.

    Apart from the residual blocks the map from prompts to weights is linear: task parts add up in weight space.

    Source: the codes are those of Perez et al. 2018, "FiLM: Visual Reasoning with a General Conditioning Layer"
    (arXiv 1709.07871); a network that writes LoRA for codes of modules is that of Charakorn et al. 2025,
    "Text-to-LoRA: Instant Transformer Adaption" (arXiv 2506.06105).
    """

    def add_writer(self, config: GeneratorConfig) -> None:
        spec, hidden = self.spec, config.hidden
        n_modules = len(spec.modules)
        self.gain_MH = nn.Parameter(torch.randn(n_modules, hidden) * 0.3)
        self.shift_MH = nn.Parameter(torch.randn(n_modules, hidden) * 0.3)
        self.outlet = ResidualBlock(hidden, config.dropout)
        shapes = dict(zip(_head_names(spec), spec.modules, strict=True))
        self.heads = nn.ModuleDict(
            {name: make_head(hidden, spec.rank, m) for name, m in shapes.items()}
        )

    def forward(self, condition_ANC: Tensor) -> Tensor:
        return self.write(self.read(condition_ANC))

    def write(self, state_AH: Tensor) -> Tensor:
        """Tokens [A, V] for states of the trunk."""
        codes_AMH = self.outlet(state_AH[:, None] * (1 + self.gain_MH) + self.shift_MH)
        written: dict[int, Tensor] = {}
        kinds = rows_of_kinds(self.spec)
        # Sorted by kind in one step: indexing kind by kind costs a pass over all codes each, backward.
        order = torch.tensor([row for rows in kinds.values() for row in rows])
        codes = codes_AMH.index_select(1, order.to(codes_AMH.device))
        sizes = [len(rows) for rows in kinds.values()]
        for (kind, rows), own in zip(kinds.items(), codes.split(sizes, dim=1), strict=True):
            tokens = self.heads[kind](own).unbind(1)  # one product for all modules of a kind
            written.update(zip(rows, tokens, strict=True))
        return torch.cat([written[row] for row in range(len(self.spec.modules))], dim=1)


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


def _head_names(spec: LoraSpec) -> list[str]:
    """Return the name of each module's head: its kind, with the widths where a kind has several (GPT-2's c_proj)."""
    widths: dict[str, set[tuple[int, int]]] = {}
    for module in spec.modules:
        widths.setdefault(module.kind, set()).add((module.n_in, module.n_out))
    several = {kind for kind, found in widths.items() if len(found) > 1}
    return [f"{m.kind}_{m.n_in}_{m.n_out}" if m.kind in several else m.kind for m in spec.modules]


def rows_of_kinds(spec: LoraSpec) -> dict[str, list[int]]:
    """Indices in the specification of the modules of each kind, which are those of one head."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(_head_names(spec)):
        rows.setdefault(name, []).append(row)
    return rows


def make_head(hidden: int, rank: int, shape: LinearShape) -> nn.Linear:
    """Create the head that predicts A then B, flat; small weights make training start from the mean adapter."""
    head = nn.Linear(hidden, rank * (shape.n_in + shape.n_out))
    nn.init.normal_(head.weight, std=0.1 / hidden**0.5)
    nn.init.zeros_(head.bias)
    return head


@dataclass(frozen=True)
class Standardiser:
    """Standardisation of flat adapters to the tokens that generators predict: (x - mean) / scale, each [V]."""

    mean_V: Tensor
    scale_V: Tensor

    @classmethod
    def fit(cls, values_AV: Tensor) -> Standardiser:
        """Compute mean and standard deviation of every value over training adapters.

        A value that hardly varies takes a tenth of the median deviation as its scale. Raises ValueError for fewer than
        two adapters.
        """
        if values_AV.shape[0] < 2:
            raise ValueError(
                f"{values_AV.shape[0]} adapters: statistics need at least two training adapters"
            )
        return cls.of(values_AV.mean(0), values_AV.std(0))

    @classmethod
    def fit_columns(cls, blocks: Iterable[Tensor]) -> Standardiser:
        """Compute what `fit` does from blocks of columns, [A, columns] each."""
        moments = [(block.mean(0), block.std(0)) for block in blocks]
        means, deviations = zip(*moments, strict=True)
        return cls.of(torch.cat(means), torch.cat(deviations))

    @classmethod
    def of(cls, mean_V: Tensor, deviation_V: Tensor) -> Standardiser:
        """Make a standardisation of means and deviations; a small deviation is raised as `fit` says."""
        least = 0.1 * deviation_V.median().clamp_min(1e-8)
        return cls(mean_V, deviation_V.clamp_min(least))

    def encode(self, values_AV: Tensor) -> Tensor:
        return (values_AV - self.mean_V) / self.scale_V

    def decode(self, tokens_AV: Tensor) -> Tensor:
        return tokens_AV * self.scale_V + self.mean_V
