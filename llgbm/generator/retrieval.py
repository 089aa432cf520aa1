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
from llgbm.runtime import UserError


@dataclass(frozen=True)
class RetrievalConfig(GeneratorConfig):
    """Widths of a retrieval: the `top` nearest teachers are mixed (0: all), the sharper the lower the `temperature`.

    The temperature is where learning starts. Without `residual` the mixture of teachers is the whole answer.
    """

    name: str = "retrieval"
    top: int = 0
    temperature: float = 0.1
    residual: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 0 or not 0 < self.temperature < math.inf:
            raise UserError("a retrieval needs top >= 0 and a temperature above 0")


class RetrievalGenerator(ModuleCodeGenerator):
    """Weigh the training teachers by the similarity of their prompts, and add what the default generator would write.

    The trunk reads the prompts of a task and the mean prompt of each training row alike; the weights are a softmax over
    the cosines of both, projected. Prompts and teachers are kept with the generator. In training no row retrieves a
    teacher of its own task, which would teach it to copy.

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
        self.projection = nn.Linear(config.hidden, config.hidden, bias=False)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature)))
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
        """Weights [A, B] of the kept teachers for states of the trunk; those that are hidden weigh nothing."""
        keys_BH = self.read(self.keys_BC[:, None])
        # States of all prompts point the same way, for the most part.
        centre_H = keys_BH.mean(0)
        asked_AH, found_BH = (
            normalize(self.projection(own - centre_H), dim=-1) for own in (state_AH, keys_BH)
        )
        scores_AB = asked_AH @ found_BH.T / self.log_temperature.exp()
        if hidden_AB is not None:
            scores_AB = scores_AB.masked_fill(hidden_AB, -torch.inf)
        if 0 < self.top < len(self.keys_BC):
            least_A1 = scores_AB.topk(self.top, dim=1).values[:, -1:]
            scores_AB = scores_AB.masked_fill(scores_AB < least_A1, -torch.inf)
        return scores_AB.softmax(1)

    def _answer(self, condition_ANC: Tensor, hidden_AB: Tensor | None) -> Tensor:
        state_AH = self.read(condition_ANC)
        mixed_AV = self.weigh(state_AH, hidden_AB) @ self.teachers_BV
        return mixed_AV + self.write(state_AH) if self.residual else mixed_AV


def _take_sizes(
    module: RetrievalGenerator, state: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """Give the buffers as many rows as those have that are about to be read."""
    for name in ("keys_BC", "teachers_BV", "task_B"):
        if prefix + name in state:
            own = getattr(module, name)
            setattr(module, name, own.new_zeros(state[prefix + name].shape))
