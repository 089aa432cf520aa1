"""Estimate the cost of a trial from its configuration: parameters, FLOPs and peak memory; nothing is built.

The base's share comes from formulas (`llgbm.cost`), the generator's from a pass of the generator itself on the meta
device under torch's FlopCounterMode, so that it holds for any generator. Evaluation is not counted.

Axis letters: see `llgbm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from llgbm.delta import encode_probes
from llgbm.generator import make_generator
from llgbm.generator.conditions import make_encoder
from llgbm.generator.networks import LoraGenerator, Standardiser, TrainingRows
from llgbm.lora.adapters import LoraSpec
from llgbm.lora.apply import PASS_LOGITS
from llgbm.models.checks import check_vocabulary
from llgbm.models.cost import BaseShape
from llgbm.models.encoding import encode_pairs, example_prompt
from llgbm.models.folder import read_tokenizer
from llgbm.models.load import DTYPES, Base, find_model, model_size, weightless_model
from llgbm.models.pretrain import make_tokenizer, new_model
from llgbm.models.reading import ANSWER_TOKENS
from llgbm.probes import create_generic_probes
from llgbm.teachers.bank import read_manifest
from llgbm.teachers.table import BLOCK_BYTES, IN_MEMORY, is_streamed
from llgbm.terms.term import THROUGH_BASE, PassSize
from llgbm.training import TrainingConfig
from llgbm.world import WorldConfig

FLOAT32 = 4
# Parameter-sized buffers: weights, gradients, two Adam moments, best checkpoint, one AdamW temporary. Buffers of the
# generator exist twice: in it and in the best checkpoint.
GENERATOR_TABLES = 6
# Tables [A, V] of a step at its peak: tokens, adapters and teachers, and their gradients.
STEP_TABLES = 7
# Blocks of columns that are held at once of a bank on the disk: the rows of one, stacked, and its deviations.
BLOCKS = 3
# Tables [S, vocabulary] of a comparison of logits: both distributions, and two on their way.
LOGIT_TABLES = 4


class ProbeSize(NamedTuple):
    """Size of a probe: its tokens, its marked positions on average, and those of the longest one, if they differ."""

    tokens: int
    marked: float = 1.0
    most: int = 0

    @property
    def longest(self) -> float:
        return self.most or self.marked


@dataclass(frozen=True)
class TrialEstimate:
    """Cost of one trial. `memory` maps each part to bytes."""

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
    probe: ProbeSize,
) -> TrialEstimate:
    """Estimate a training on a bank of `n_teachers`, with probes of a size; `base` may be on meta.

    A generator that keeps something of its training rows is counted as if all teachers were of training tasks.
    Raises UserError for a base whose blocks are not like those of Qwen2 or Llama.
    """
    shape = BaseShape.of(base, spec)
    generator = weightless_generator(config, spec, condition_width)
    generator.prepare_training(weightless_rows(config, spec, condition_width, n_teachers))
    parameters, buffers = (
        sum(t.numel() for t in part()) for part in (generator.parameters, generator.buffers)
    )
    return TrialEstimate(
        base_parameters=shape.parameters,
        adapter_values=spec.n_values,
        generator_parameters=parameters,
        step_flops=generator_flops(generator, config, condition_width)
        + term_flops(config, shape, probe),
        steps=config.steps,
        memory={
            "base": shape.weight_bytes,
            "generator and optimiser": float(
                FLOAT32 * (GENERATOR_TABLES * parameters + 2 * buffers)
            ),
            "teachers": float(
                FLOAT32 * IN_MEMORY * (1 + config.mixup) * n_teachers * spec.n_values
            ),
            "adapters of a step": float(FLOAT32 * STEP_TABLES * config.batch_size * spec.n_values),
            "activations": activation_bytes(config, shape, probe.tokens),
            **logit_bytes(config, shape, probe),
        },
    )


def weightless_generator(
    config: TrainingConfig, spec: LoraSpec, condition_width: int
) -> LoraGenerator:
    """Build the generator of a trial on the meta device: shapes without memory."""
    with torch.device("meta"):
        statistics = Standardiser(torch.zeros(spec.n_values), torch.ones(spec.n_values))
        return make_generator(config.generator, spec, condition_width, statistics, config.seed)


def weightless_rows(
    config: TrainingConfig, spec: LoraSpec, condition_width: int, n_teachers: int
) -> TrainingRows:
    """Return training rows on the meta device, each of a task of its own."""
    count = max(2, n_teachers)
    shape = (count, *config.condition_rows, condition_width)
    return TrainingRows(
        tuple(map(str, range(count))),
        lambda: torch.empty(shape, device="meta"),
        lambda: torch.empty(count, spec.n_values, device="meta"),
    )


def generator_flops(
    generator: LoraGenerator, config: TrainingConfig, condition_width: int
) -> float:
    """FLOPs of a step's forward and backward pass through the generator, counted by torch."""
    shape = (config.batch_size, *config.condition_rows, condition_width)
    condition = torch.zeros(shape, device="meta")
    each = torch.zeros(config.batch_size, dtype=torch.long, device="meta")
    tokens = torch.empty_like(generator(condition))
    batch = {"condition": condition, "tokens": tokens, "row": each, "draw": each}
    with FlopCounterMode(display=False) as counter:
        predicted, penalties = generator.training_forward(batch)
        sum(penalties.values(), predicted.sum()).backward()
    return float(counter.get_total_flops())


def reads_base(config: TrainingConfig) -> bool:
    """Say if a step runs the base under the generated adapters."""
    return bool(config.objective.reads & THROUGH_BASE)


def term_flops(config: TrainingConfig, shape: BaseShape, probe: ProbeSize) -> float:
    """FLOPs of a step's loss terms: the shared pass through the base, the head, and what each term adds."""
    terms = config.objective.terms
    marked = round(config.batch_size * config.n_probes * probe.marked)
    size = PassSize(config.batch_size, config.n_probes, probe.tokens, marked)
    found = sum(term.flops(shape, size) for term in terms)
    if reads_base(config):
        found += probe_flops(config, shape, probe)
    # The student's head there and back, and the teacher's.
    readers = sum("logits" in term.reads for term in terms)
    return found + 1.5 * readers * shape.head_flops(marked)


def probe_flops(config: TrainingConfig, shape: BaseShape, probe: ProbeSize) -> float:
    """FLOPs of a step's passes through the base under the generated adapters."""
    texts = config.batch_size * config.n_probes
    chunked = 0 < config.probe_chunk < config.n_probes
    # Inner layers are read in the model's own pass, which is no lean one.
    marked = None if "layers" in config.objective.reads else probe.longest
    forward = shape.forward_flops(texts, probe.tokens, marked) * (
        1 + chunked + config.activation_checkpointing
    )
    return forward + shape.backward_flops(texts, probe.tokens, marked)


def activation_bytes(config: TrainingConfig, shape: BaseShape, probe_tokens: int) -> float:
    """Bytes of the activations of a step's texts in the base, given the memory-saving settings."""
    texts = sum(term.own_texts(config.batch_size) for term in config.objective.terms)
    if reads_base(config):
        at_once = min(config.probe_chunk or config.n_probes, config.n_probes)
        texts += config.batch_size * at_once
    return shape.activation_bytes(texts, probe_tokens, config.activation_checkpointing)


def logit_bytes(config: TrainingConfig, shape: BaseShape, probe: ProbeSize) -> dict[str, float]:
    """Bytes of the logits that are held at once, as the part `logits`; nothing where no term reads any."""
    readers = sum("logits" in term.reads for term in config.objective.terms)
    if not readers:
        return {}
    marked = config.batch_size * config.n_probes * probe.marked
    held = min(marked * shape.vocabulary, PASS_LOGITS)
    return {"logits": FLOAT32 * LOGIT_TABLES * readers * held}


def human(number: float, unit: str = "") -> str:
    """Format a number with an SI prefix and a unit: 12.3 GB, 1.5 MB."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def table_of_memory(estimate: TrialEstimate) -> list[tuple[str, str]]:
    """Rows of part and size, the sum last."""
    rows = [(name, human(value, "B")) for name, value in estimate.memory.items()]
    return [*rows, ("in all", human(estimate.peak_bytes, "B"))]


MINILM_WIDTH = 384
EXAMPLES_LOOKED_AT = 4


class WorldSketch:
    """Outline of a world that is not built: a base without weights, a tokenizer, the lengths of texts."""

    def __init__(self, config: WorldConfig, stream: str = "auto") -> None:
        self.config, self.stream = config, stream
        self.base, self.tokenizer = _base_without_weights(config)
        teachers, tasks = config.teachers, config.suite.split.tasks
        if config.bank is None:
            self.spec = teachers.spec_of(self.base)
            self.n_teachers = teachers.per_task * len(tasks)
        else:
            found = read_manifest(Path(config.bank.path))
            self.spec = LoraSpec.from_model(
                self.base, found["rank"], found["alpha"], found["target_modules"]
            )
            self.n_teachers = sum(entry["task"] in tasks for entry in found["adapters"].values())

    def estimate(self, config: TrainingConfig) -> TrialEstimate:
        """Estimate the cost of one trial in this world; a bank that is read from the disk takes no memory with size."""
        found = estimate_trial(
            config,
            self.base,
            self.spec,
            self.n_teachers,
            self.condition_width,
            ProbeSize(self.probe_tokens(config), self.probe_marks(config)),
        )
        if config.prompt_tokens:
            held = {"conditions": self.condition_bytes(config)}
            found = replace(found, memory={**found.memory, **held})
        if not is_streamed(self.n_teachers * self.spec.n_values, self.stream):
            return found
        streamed = min(found.memory["teachers"], float(BLOCKS * BLOCK_BYTES))
        return replace(found, memory={**found.memory, "teachers": streamed})

    def condition_bytes(self, config: TrainingConfig) -> float:
        """Bytes of the conditions of all teachers as states of tokens; a training copies those that it draws from."""
        teachers = self.config.teachers
        n_texts = 2 * teachers.condition_train + teachers.condition_evaluation
        if not config.conditioning.has_prompts:
            n_texts = 2
        rows = self.n_teachers * n_texts * config.prompt_tokens
        return float(FLOAT32 * rows * self.condition_width)

    @property
    def condition_width(self) -> int:
        """Return the width of a condition: that of the encoder, twice where a description follows every prompt."""
        return self.encoder_width * (2 if self.config.condition == "both" else 1)

    @property
    def encoder_width(self) -> int:
        name = self.config.encoder
        if name == "minilm":
            return MINILM_WIDTH
        if name == "base":
            return int(self.base.config.hidden_size)
        return make_encoder(name, Base(self.base, self.tokenizer, "", "")).width

    def probe_tokens(self, config: TrainingConfig) -> int:
        """Tokens of the longest probe. Trajectories are estimated from a few examples per task."""
        if config.delta_probes == "trajectory":
            return self.example_tokens[0]
        if config.delta_probes == "generic":
            return encode_probes(self.tokenizer, create_generic_probes(), ["shared"]).ids_APT.shape[
                -1
            ]
        asked = [example_prompt(self.tokenizer, e) for e in self.config.suite.probe_examples]
        return max(len(ids) for ids in self.tokenizer(asked, add_special_tokens=False)["input_ids"])

    def probe_marks(self, config: TrainingConfig) -> int:
        """Return the marked positions of a probe: along a trajectory those of the longest answer."""
        return self.example_tokens[1] if config.delta_probes == "trajectory" else 1

    @property
    def example_tokens(self) -> tuple[int, int]:
        """Tokens of the longest example that is sampled, and of the longest answer."""
        suite = self.config.suite
        examples = []
        for task in suite.split.tasks:
            examples += suite.examples(task, "train", EXAMPLES_LOOKED_AT, "estimate")
        pairs = [(example_prompt(self.tokenizer, e), e.answer) for e in examples]
        targets = encode_pairs(self.tokenizer, pairs).targets_ST
        return targets.shape[1], int((targets >= 0).sum(1).max())

    @property
    def teacher_flops(self) -> float:
        """FLOPs of training all teachers; 0 where a bank is given."""
        if self.config.bank is not None:
            return 0.0
        teachers, (tokens, answer) = self.config.teachers, self.example_tokens
        shape, texts = BaseShape.of(self.base, self.spec), self.n_teachers * teachers.examples
        passes = shape.forward_flops(texts, tokens) + shape.backward_flops(texts, tokens)
        return teachers.steps * (passes + shape.head_flops(texts * answer))

    @property
    def reading_flops(self) -> float:
        """FLOPs of one adapter a task that answers all evaluation questions, each as long as answers may get.

        0 where every answer counts by exact match. Prompts are as long as the longest example.
        """
        shape, suite = BaseShape.of(self.base, self.spec), self.config.suite
        tokens, answer = self.example_tokens
        kinds = [suite.answer_kind(task) for task in (*suite.split.val, *suite.split.test)]
        found = 0.0
        for kind in kinds:
            if kind != "text":
                prompt, written = max(1, tokens - answer), ANSWER_TOKENS[kind]
                found += shape.decoding_flops(self.config.eval_examples, prompt, written)
        return found


def _base_without_weights(config: WorldConfig) -> tuple[PreTrainedModel, Any]:
    if config.base is None:
        tokenizer = make_tokenizer(config.suite.vocabulary)
        with torch.device("meta"):
            return new_model(model_size(config.size), tokenizer, 0), tokenizer
    folder: Path = find_model(config.base.path, download=False)
    model = nn.Module.to(weightless_model(str(folder)), DTYPES[config.base.dtype])
    tokenizer = read_tokenizer(folder)
    check_vocabulary(tokenizer, model.config, config.base.path)
    return model, tokenizer
