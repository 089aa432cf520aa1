"""What a training will cost, before anything is built: parameters, FLOPs and peak memory from configs alone.

The base's share comes from formulas (`llgbm.cost`), the generator's from a pass of the generator itself on the meta
device under torch's FlopCounterMode, so that it holds for any generator. Evaluation is not counted.

Letters: A adapters, V values of an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from llgbm.cost import BaseShape
from llgbm.dataset import Standardiser
from llgbm.generator import LoraGenerator, make_generator
from llgbm.lora import LoraSpec
from llgbm.training import TrainingConfig

FLOAT32 = 4
# Tables as long as the generator: weights, gradients, two of AdamW, the best so far, one on AdamW's way. Its buffers
# are held twice, in it and in the best so far.
GENERATOR_TABLES = 6
# Tables [A, V] of a step at its peak: tokens, adapters and teachers, and their gradients on the way back.
STEP_TABLES = 7
# Tables [A, V] of a bank that a training holds: weights, and the same as tokens.
BANK_TABLES = 2


@dataclass(frozen=True)
class TrialEstimate:
    """The cost of one training. `memory` is in bytes, by what takes it."""

    base_parameters: int
    adapter_values: int
    generator_parameters: int
    step_flops: float
    steps: int
    memory: Mapping[str, float]

    @property
    def flops(self) -> float:
        return self.step_flops * self.steps

    @property
    def peak_bytes(self) -> float:
        return sum(self.memory.values())


def estimate_trial(
    config: TrainingConfig,
    base: PreTrainedModel,
    spec: LoraSpec,
    n_teachers: int,
    condition_width: int,
    probe_tokens: int,
) -> TrialEstimate:
    """Estimate a training on a bank of `n_teachers`, its probes as long as `probe_tokens`; `base` may be on meta.

    Raises UserError for a base whose blocks are not like those of Qwen2 or Llama.
    """
    shape = BaseShape.of(base, spec)
    generator = weightless_generator(config, spec, condition_width)
    parameters, buffers = (sum(t.numel() for t in part()) for part in (generator.parameters, generator.buffers))
    return TrialEstimate(
        base_parameters=shape.parameters,
        adapter_values=spec.n_values,
        generator_parameters=parameters,
        step_flops=generator_flops(generator, config, condition_width) + probe_flops(config, shape, probe_tokens),
        steps=config.steps,
        memory={
            "base": shape.weight_bytes,
            "generator and optimiser": float(FLOAT32 * (GENERATOR_TABLES * parameters + 2 * buffers)),
            "teachers": float(FLOAT32 * BANK_TABLES * n_teachers * spec.n_values),
            "adapters of a step": float(FLOAT32 * STEP_TABLES * config.batch_size * spec.n_values),
            "activations": activation_bytes(config, shape, probe_tokens),
        },
    )


def weightless_generator(config: TrainingConfig, spec: LoraSpec, condition_width: int) -> LoraGenerator:
    """The generator of a training on the meta device: shapes without memory."""
    with torch.device("meta"):
        statistics = Standardiser(torch.zeros(spec.n_values), torch.ones(spec.n_values))
        return make_generator(config.generator, spec, condition_width, statistics, config.seed)


def generator_flops(generator: LoraGenerator, config: TrainingConfig, condition_width: int) -> float:
    """A step's passes through the generator, there and back, as torch counts them."""
    condition = torch.zeros(config.batch_size, config.n_prompts, condition_width, device="meta")
    with FlopCounterMode(display=False) as counter:
        generator(condition).sum().backward()
    return float(counter.get_total_flops())


def probe_flops(config: TrainingConfig, shape: BaseShape, probe_tokens: int) -> float:
    """A step's passes through the base under the generated adapters; none where λ_delta is 0."""
    if config.lambda_delta == 0:
        return 0.0
    texts = config.batch_size * config.n_probes
    chunked = 0 < config.probe_chunk < config.n_probes
    forward = shape.forward_flops(texts, probe_tokens) * (1 + chunked + config.activation_checkpointing)
    return forward + shape.backward_flops(texts, probe_tokens)


def activation_bytes(config: TrainingConfig, shape: BaseShape, probe_tokens: int) -> float:
    """What a step holds of its probes in the base, with the savers of memory that are on."""
    if config.lambda_delta == 0:
        return 0.0
    at_once = min(config.probe_chunk or config.n_probes, config.n_probes)
    return shape.activation_bytes(config.batch_size * at_once, probe_tokens, config.activation_checkpointing)


def human(number: float, unit: str = "") -> str:
    """12.3 G, 1.50 M, with a unit."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def table_of_memory(estimate: TrialEstimate) -> list[tuple[str, str]]:
    """Rows for people: what takes how much, the sum last."""
    rows = [(name, human(value, "B")) for name, value in estimate.memory.items()]
    return [*rows, ("in all", human(estimate.peak_bytes, "B"))]
