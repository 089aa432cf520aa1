"""Steps of a training for tests of loss terms: random adapters of a tiny base, and the same by transformers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llgbm.delta import DeltaTable, EncodedProbes, encode_probes, measure_deltas
from llgbm.functional import FunctionalLoRA
from llgbm.generator import GeneratorConfig, make_generator
from llgbm.generator.networks import LoraGenerator, Standardiser
from llgbm.lora import LoraBatch, LoraSpec
from llgbm.models.load import Base
from llgbm.probes import Probe, ProbeSet
from llgbm.terms.step import Step
from llgbm.terms.term import Term
from llgbm.training import TrainingConfig, Trial
from llgbm.world import World

TASKS = ("one", "two")
TEXTS = (("red green", "green"), ("blue red blue", "red blue"), ("green", "green red blue"))


@dataclass(frozen=True)
class Scene:
    """Two students and their teachers on trajectories of unequal length; their tokens are their plain values."""

    lora_model: FunctionalLoRA
    generator: LoraGenerator
    table: DeltaTable
    student_AV: Tensor
    teacher_AV: Tensor

    @classmethod
    def of(cls, base: Base, spec: LoraSpec) -> Scene:
        """Draw the adapters; measure the teachers' deltas by the instrument of the package."""
        noise = torch.Generator().manual_seed(5)
        student, teacher = (
            0.2 * torch.randn(len(TASKS), spec.n_values, generator=noise) for _ in range(2)
        )
        probes = ProbeSet.trajectories(
            {"one": [Probe(*TEXTS[0]), Probe(*TEXTS[1])], "two": [Probe(*TEXTS[2])] * 2}
        )
        encoded = encode_probes(base.tokenizer, probes, TASKS)
        plain = Standardiser(torch.zeros(spec.n_values), torch.ones(spec.n_values))
        return cls(
            FunctionalLoRA(base.model, spec.rank, spec.alpha, spec.target_modules),
            make_generator(GeneratorConfig(hidden=4), spec, 3, plain, 0),
            measure_deltas(
                base.model, spec, LoraBatch.unflatten(spec, teacher), encoded, shared=False
            ),
            student,
            teacher,
        )

    @property
    def probes(self) -> EncodedProbes:
        return self.table.probes

    def step(self, tokens_AV: Tensor, rows: Sequence[int] = (0, 1)) -> Step:
        """A training step with these predicted tokens."""
        at = list(rows)
        batch = {
            "tokens": self.teacher_AV[at],
            "probe_ids": self.probes.ids_APT[at],
            "positions": self.probes.positions_APQ[at],
            "valid": self.probes.valid_APQ[at],
            "base_states": self.table.base_APQD[at],
            "delta": self.table.delta_APQD[at],
        }
        return Step(batch, tokens_AV, self.generator, self.lora_model)

    def value(self, term: Term, tokens_AV: Tensor) -> Tensor:
        return term.value(self.step(tokens_AV))

    def marked_logits(self, values_AV: Tensor) -> Tensor:
        """Logits [S, vocabulary] at the valid positions of the model with W + scaling B A for W."""
        return torch.cat([self._logits(values_V, row) for row, values_V in enumerate(values_AV)])

    def _logits(self, values_V: Tensor, row: int) -> Tensor:
        state = LoraBatch.unflatten(self.lora_model.spec, values_V[None])
        weights = self.lora_model.apply_lora_weights(state.to_state_dicts()[0])
        output = torch.func.functional_call(
            self.lora_model.model, weights, kwargs={"input_ids": self.probes.ids_APT[row]}
        )
        return self.read_marks(output.logits, row)

    def read_marks(self, values_PTX: Tensor, row: int) -> Tensor:
        """Select [S, X] at the valid marked positions of one adapter's probes."""
        picked = [
            values_PTX[probe, position]
            for probe, positions in enumerate(self.probes.positions_APQ[row])
            for position, valid in zip(positions, self.probes.valid_APQ[row, probe], strict=True)
            if valid
        ]
        return torch.stack(picked)


def check_gradient(
    scene: Scene, term: Term, independent: Callable[[Tensor], Tensor], atol: float = 1e-5
) -> None:
    """Compare value and gradient of a term with those of another formulation of it."""
    got, wanted = (scene.student_AV.clone().requires_grad_() for _ in range(2))
    value, other = scene.value(term, got), independent(wanted)
    torch.testing.assert_close(value, other, atol=atol, rtol=1e-4)
    value.backward()
    other.backward()
    assert got.grad is not None and wanted.grad is not None
    torch.testing.assert_close(got.grad, wanted.grad, atol=atol, rtol=1e-3)
    assert wanted.grad.abs().max() > 100 * atol, "the gradient is too small to tell anything"


def trial_batch(world: World, config: TrainingConfig, **terms: Any) -> tuple[Trial, dict]:
    """A trial with these terms alone, and its first batch."""
    own = replace(config, lambda_weight=0, lambda_delta=0, **terms)
    trial = Trial(own, world.data, world.lora_model)
    return trial, next(iter(trial.batches()))
