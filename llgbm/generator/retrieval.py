"""Generator that mixes the nearest teachers and corrects the mixture. Axis letters: see `llgbm`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from llgbm.generator.networks import GeneratorConfig, ModuleCodeGenerator, TrainingRows
from llgbm.generator.pooling import MeanPool
from llgbm.lora.adapters import LoraSpec
from llgbm.runtime import UserError

# What has weights of its own: all of an adapter, A and B of a module together, or apart.
UNITS = ("adapter", "module", "matrix")


@dataclass(frozen=True)
class RetrievalConfig(GeneratorConfig):
    """Widths of a retrieval: the `top` nearest teachers are mixed (0: all), the sharper the lower the `temperature`.

    The temperature is where learning starts. Without `residual` the mixture of teachers is the whole answer. With
    a `unit` of `module` or `matrix` each of these has weights of its own, from keys of `key_width` numbers, where
    otherwise the whole `adapter` has one set of weights, from keys as wide as the trunk.
    """

    name: str = "retrieval"
    top: int = 0
    temperature: float = 0.1
    residual: bool = True
    unit: str = UNITS[0]
    key_width: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 0 or not 0 < self.temperature < math.inf or self.key_width < 1:
            raise UserError(
                "a retrieval needs top >= 0, a temperature above 0 and keys of at least one number"
            )
        if self.unit not in UNITS:
            raise UserError(
                f"unknown unit {self.unit!r} of a retrieval; there are: {', '.join(UNITS)}"
            )
        if self.unit == UNITS[0] and self.key_width != RetrievalConfig.key_width:
            raise UserError(
                "key_width is of a retrieval by module or matrix: give unit=matrix, or leave it out"
            )


class RetrievalGenerator(ModuleCodeGenerator):
    """Weigh the training teachers by the similarity of their prompts, and add what the default generator would write.

    The trunk reads the prompts of a task and the mean prompt of each training row alike; the weights are a softmax over
    the cosines of both, projected: one for the whole adapter, or one for each module or matrix. Prompts and teachers
    are kept with the generator. In training no row retrieves a teacher of its own task, which would teach it to copy.

    Letters beside those of `llgbm`: G units, E width of a key.

    Source: ours, after the retrieval of adapters in Zhao et al. 2024, "LoraRetriever: Input-Aware LoRA Retrieval and
    Composition for Mixed Tasks in the Wild" (arXiv 2402.09997).
    """

    config_class = RetrievalConfig
    keys_BC: Tensor
    teachers_BV: Tensor
    task_B: Tensor

    def add_writer(self, config: GeneratorConfig) -> None:
        assert isinstance(config, RetrievalConfig)  # `make_generator` sees to it
        self.top, self.residual = config.top, config.residual
        if config.residual:
            super().add_writer(config)
        self.sizes = _unit_sizes(self.spec, config.unit)
        apart = config.unit != UNITS[0]
        width = len(self.sizes) * config.key_width if apart else config.hidden
        self.projection = nn.Linear(config.hidden, width, bias=False)
        shape = (len(self.sizes), 1, 1) if apart else ()
        self.log_temperature = nn.Parameter(torch.full(shape, math.log(config.temperature)))
        self.register_buffer("keys_BC", torch.zeros(0, self.condition_width))
        self.register_buffer("teachers_BV", torch.zeros(0, self.spec.n_values))
        self.register_buffer("task_B", torch.zeros(0, dtype=torch.long))
        self.register_load_state_dict_pre_hook(_take_sizes)

    def prepare_training(self, rows: TrainingRows) -> None:
        """Keep prompts, tasks and teachers of the training rows. Raises UserError for a single task."""
        if len(set(rows.tasks)) < 2:
            raise UserError(
                "the generator retrieval needs teachers of at least two training tasks: no task may retrieve its own"
            )
        self.keys_BC = MeanPool()(rows.read_conditions())
        self.teachers_BV = self.standardiser.encode(rows.read_teachers())
        self.task_B = rows.task_B.to(self.keys_BC.device)

    def forward(self, condition_ANC: Tensor) -> Tensor:
        return self._answer(condition_ANC, None)

    def training_forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        own_AB = self.task_B[batch["row"]][:, None] == self.task_B
        return self._answer(batch["condition"], own_AB), {}

    def weigh(self, state_AH: Tensor, hidden_AB: Tensor | None = None) -> Tensor:
        """Weights [G, A, B] of the kept teachers for states of the trunk; those that are hidden weigh nothing."""
        keys_BH = self.read(self.keys_BC[:, None])
        # States of all prompts point the same way, for the most part.
        centre_H = keys_BH.mean(0)
        asked_GAE, found_GBE = (self._project(own - centre_H) for own in (state_AH, keys_BH))
        scores_GAB = asked_GAE @ found_GBE.mT / self.log_temperature.exp()
        if hidden_AB is not None:
            scores_GAB = scores_GAB.masked_fill(hidden_AB, -torch.inf)
        if 0 < self.top < len(self.keys_BC):
            least_GA1 = scores_GAB.topk(self.top, dim=2).values[..., -1:]
            scores_GAB = scores_GAB.masked_fill(scores_GAB < least_GA1, -torch.inf)
        return scores_GAB.softmax(2)

    def _project(self, states_XH: Tensor) -> Tensor:
        """Keys [G, X, E] of unit length."""
        keys_XGE = self.projection(states_XH).unflatten(1, (len(self.sizes), -1))
        return normalize(keys_XGE, dim=-1).transpose(0, 1)

    def _answer(self, condition_ANC: Tensor, hidden_AB: Tensor | None) -> Tensor:
        state_AH = self.read(condition_ANC)
        weights_GAB, parts = self.weigh(state_AH, hidden_AB), self.teachers_BV.split(self.sizes, 1)
        mixed_AV = torch.cat([own @ part for own, part in zip(weights_GAB, parts, strict=True)], 1)
        return mixed_AV + self.write(state_AH) if self.residual else mixed_AV


def _unit_sizes(spec: LoraSpec, unit: str) -> list[int]:
    """Count the values of each unit, in the order of a flat adapter."""
    if unit == "matrix":
        return spec.piece_sizes
    if unit == "module":
        return [spec.rank * (m.n_in + m.n_out) for m in spec.modules]
    return [spec.n_values]


def _take_sizes(
    module: RetrievalGenerator, state: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """Give the buffers as many rows as those have that are about to be read."""
    for name in ("keys_BC", "teachers_BV", "task_B"):
        if prefix + name in state:
            own = getattr(module, name)
            setattr(module, name, own.new_zeros(state[prefix + name].shape))
