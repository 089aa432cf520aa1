"""Metrics of generated adapters on held-out tasks, reported with every result.

Axis letters: see `llgbm`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from llgbm.dataset import ExperimentData
from llgbm.delta import DeltaTable, measure_deltas
from llgbm.functional import FunctionalLoRA
from llgbm.generator.networks import LoraGenerator
from llgbm.lora.adapters import LoraBatch
from llgbm.lora.geometry import delta_w_error, delta_w_inner
from llgbm.models import scoring
from llgbm.models.reading import accuracy_by_reading

REPORTED_PARTS = {"heldout": "test", "val": "val", "train": "train"}


@dataclass(frozen=True)
class PartResult:
    """One part: means by metric name, accuracy and delta cosine by task, generated adapters and their deltas."""

    metrics: Mapping[str, float]
    accuracy_by_task: Mapping[str, float]
    cosine_by_task: Mapping[str, float]
    adapters: LoraBatch
    delta_AD: Tensor
    teacher_delta_AD: Tensor


def evaluate_generator(
    generator: LoraGenerator, data: ExperimentData, lora_model: FunctionalLoRA, part: str
) -> PartResult:
    """Evaluate a generator on one part (`train`, `val`, `test`), adapters generated from evaluation prompts."""
    rows = list(data.rows[part])
    conditions = data.conditions.evaluation_ANC[rows]
    adapters = generator.generate(conditions)
    result = evaluate_adapters(adapters, data, lora_model, rows)
    shuffled = generator.generate(data.conditions.evaluation_ANC[other_task(data, rows)])
    nonsense = generator.generate(data.conditions.nonsense_NC[None].expand(len(rows), -1, -1))
    controls = {
        "accuracy_shuffled_prompts": accuracy_per_adapter(lora_model, shuffled, data, rows)
        .mean()
        .item(),
        "accuracy_nonsense_prompts": accuracy_per_adapter(lora_model, nonsense, data, rows)
        .mean()
        .item(),
        "nearest_teacher_distance": nearest_teacher_distance(adapters, data, lora_model)
        .mean()
        .item(),
        "diversity": diversity(adapters),
    }
    return PartResult(
        {**result.metrics, **controls},
        result.accuracy_by_task,
        result.cosine_by_task,
        adapters,
        result.delta_AD,
        result.teacher_delta_AD,
    )


def evaluate_adapters(
    adapters: LoraBatch, data: ExperimentData, lora_model: FunctionalLoRA, rows: list[int]
) -> PartResult:
    """Accuracy, deltas and ΔW error of given adapters on the tasks at `rows`; generators and baselines alike."""
    accuracy_A = accuracy_per_adapter(lora_model, adapters, data, rows)
    delta_AD = mean_delta(lora_model, adapters, data.shared_deltas, rows)
    generic_AD = mean_delta(lora_model, adapters, data.generic_deltas, rows)
    teacher_AD = data.shared_deltas.mean_AD[rows]
    cosine_A = cosine_similarity(delta_AD, teacher_AD, dim=-1)
    teachers = LoraBatch.unflatten(lora_model.spec, data.values_AV[rows])
    metrics = {
        "accuracy": accuracy_A.mean().item(),
        "delta_cosine": cosine_A.mean().item(),
        "delta_cosine_generic": cosine_similarity(
            generic_AD, data.generic_deltas.mean_AD[rows], dim=-1
        )
        .mean()
        .item(),
        "delta_norm_ratio": (delta_AD.norm(dim=-1) / teacher_AD.norm(dim=-1)).mean().item(),
        "delta_w_error": delta_w_error(adapters, teachers).mean().item(),
    }
    tasks = [data.tasks[i] for i in rows]
    by_task = mean_by_task(tasks, accuracy_A), mean_by_task(tasks, cosine_A)
    return PartResult(metrics, *by_task, adapters, delta_AD, teacher_AD)


def mean_by_task(tasks: Sequence[str], values_A: Tensor) -> dict[str, float]:
    """Average the values of each task, in order of first appearance; a training task may have several teachers."""
    found: dict[str, list[float]] = {}
    for task, value in zip(tasks, values_A.tolist(), strict=True):
        found.setdefault(task, []).append(value)
    return {task: fmean(values) for task, values in found.items()}


def other_task(data: ExperimentData, rows: list[int]) -> list[int]:
    """Pick for each row one of another task, which shares as few parts of its name as possible.

    It is of the same part where that has another task. Raises ValueError for data of a single task.
    """
    names = [set(task.split("-")) for task in data.tasks]

    def others(i: int, among: list[int]) -> list[int]:
        return [j for j in among if data.tasks[j] != data.tasks[i]]

    def nearest(i: int) -> int:
        among = rows if others(i, rows) else list(range(len(names)))
        place = among.index(i)
        return min(
            others(i, among),
            key=lambda j: (len(names[i] & names[j]), (among.index(j) - place) % len(among)),
        )

    return [nearest(i) for i in rows]


def nearest_teacher_distance(
    adapters: LoraBatch, data: ExperimentData, lora_model: FunctionalLoRA
) -> Tensor:
    """|ΔW - ΔW_teacher| / |ΔW_teacher| to the nearest training teacher, [A]: near 0 means it was copied."""
    teachers = LoraBatch.unflatten(lora_model.spec, data.values_AV[list(data.rows["train"])])
    own, cross, squares = _inner_products(adapters, teachers)
    distances = (own[:, None] + squares[None] - 2 * cross).clamp_min(0).sqrt() / squares.sqrt()[
        None
    ]
    return distances.min(1).values


def _inner_products(adapters: LoraBatch, teachers: LoraBatch) -> tuple[Tensor, Tensor, Tensor]:
    own = delta_w_inner(adapters, adapters).diagonal()
    squares = torch.cat(
        [
            delta_w_inner(
                teachers.select(slice(i, i + 1)), teachers.select(slice(i, i + 1))
            ).flatten()
            for i in range(teachers.n_adapters)
        ]
    )
    return own, delta_w_inner(adapters, teachers), squares


def diversity(adapters: LoraBatch) -> float:
    """1 - mean cosine of ΔW between different generated adapters: 0 means that all are the same."""
    inner = delta_w_inner(adapters, adapters)
    norms = inner.diagonal().sqrt()
    cosines = inner / (norms[:, None] * norms[None])
    n = adapters.n_adapters
    if n < 2:
        return 0.0
    return 1 - ((cosines.sum() - n) / (n * (n - 1))).item()


def evaluate(
    generator: LoraGenerator, data: ExperimentData, lora_model: FunctionalLoRA, part: str
) -> dict[str, float]:
    """Metrics for model selection, from the evaluation prompts of a part's tasks.

    `<part>/accuracy` is the exact match on evaluation examples, `<part>/delta_cosine` that of Δ on the shared probes.
    """
    rows = list(data.rows[part])
    batch = generator.generate(data.conditions.evaluation_ANC[rows])
    delta_AD = mean_delta(lora_model, batch, data.shared_deltas, rows)
    cosine_A = cosine_similarity(delta_AD, data.shared_deltas.mean_AD[rows], dim=-1)
    return {
        f"{part}/accuracy": accuracy_per_adapter(lora_model, batch, data, rows).mean().item(),
        f"{part}/delta_cosine": cosine_A.mean().item(),
    }


def mean_delta(
    lora_model: FunctionalLoRA, adapters: LoraBatch, reference: DeltaTable, rows: list[int]
) -> Tensor:
    """Δ [A, D] of adapters, read with the instrument that the reference (shared probes) was read with."""
    probes = reference.probes.select(rows)
    return measure_deltas(lora_model.model, lora_model.spec, adapters, probes, shared=True).mean_AD


def accuracy_per_adapter(
    lora_model: FunctionalLoRA,
    batch: LoraBatch,
    data: ExperimentData,
    rows: list[int],
    chunk: int = 24,
) -> Tensor:
    """Return the accuracy [A] of adapters on the evaluation examples of the tasks at `rows`.

    An answer is right by exact match, or where the suite says how answers are read, if it is read as the right one.
    """
    texts = data.examples_of(rows)
    if data.questions is not None and any(data.questions.items):
        questions = data.questions.select(rows, data.n_examples)
        return accuracy_by_reading(lora_model.model, lora_model.spec, batch, texts, questions)
    return scoring.accuracy_per_adapter(lora_model.model, lora_model.spec, batch, texts, chunk)
