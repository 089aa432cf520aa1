"""Metrics of generated adapters on held-out tasks, reported with every result.

Axis letters: see `llgbm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from llgbm.dataset import ExperimentData
from llgbm.delta import DeltaTable, mean_over_probes, measure_deltas
from llgbm.functional import FunctionalLoRA
from llgbm.generator.networks import LoraGenerator
from llgbm.lora.adapters import LoraBatch
from llgbm.lora.geometry import delta_w_error, delta_w_inner
from llgbm.models import scoring
from llgbm.models.reading import accuracy_by_reading

REPORTED_PARTS = {"heldout": "test", "val": "val", "train": "train"}
# Adapters that are generated and measured at once: what evaluation holds does not grow with their number.
AT_ONCE = 24
# Training tasks are measured on so many texts together, at least so many each; controls in training on so many each.
TRAIN_TEXTS, TRAIN_EXAMPLES, CONTROL_EXAMPLES = 1000, 8, 8


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
    """Evaluate a generator on one part (`train`, `val`, `test`), adapters generated from evaluation prompts.

    Accuracies from the prompts of others and from nonsense are of tasks that were not trained on. Training tasks, which
    are many, are measured on the first of their evaluation examples.
    """
    rows, untrained = list(data.rows[part]), part != "train"
    if not untrained:
        data = data.with_few_examples(max(TRAIN_EXAMPLES, -(-TRAIN_TEXTS // len(rows))))
    adapters = generate_in_chunks(generator, data.conditions.evaluation_ANC, rows)
    result = evaluate_adapters(adapters, data, lora_model, rows)
    controls = {
        **(control_accuracies(generator, data, lora_model, rows) if untrained else {}),
        "nearest_teacher_distance": nearest_teacher_distance(adapters, data, lora_model)
        .mean()
        .item(),
        "diversity": diversity(adapters),
    }
    return replace(result, metrics={**result.metrics, **controls})


def control_accuracies(
    generator: LoraGenerator, data: ExperimentData, lora_model: FunctionalLoRA, rows: list[int]
) -> dict[str, float]:
    """Accuracy on the tasks at `rows` of adapters from the prompts of another task, and from nonsense.

    Both are near 0 unless the generator reads too little of its prompts.
    """
    others = dict(zip(rows, other_task(data, rows), strict=True))

    def accuracy_from(prompts_of: Callable[[list[int]], Tensor]) -> float:
        pieces = [
            accuracy_per_adapter(lora_model, generator.generate(prompts_of(own)), data, own)
            for own in _chunks(rows)
        ]
        return torch.cat(pieces).mean().item()

    def of_another_task(own: list[int]) -> Tensor:
        return data.conditions.evaluation_ANC[[others[row] for row in own]]

    def nonsense(own: list[int]) -> Tensor:
        same = data.conditions.nonsense_NC
        return same.expand(len(own), *same.shape)

    return {
        "accuracy_shuffled_prompts": accuracy_from(of_another_task),
        "accuracy_nonsense_prompts": accuracy_from(nonsense),
    }


def generate_in_chunks(
    generator: LoraGenerator, conditions_ANC: Tensor, rows: list[int]
) -> LoraBatch:
    """Adapters for the conditions at some rows. Beside them only what `AT_ONCE` of them need is held."""
    values_AV = conditions_ANC.new_empty(len(rows), generator.spec.n_values)
    for start in range(0, len(rows), AT_ONCE):
        own = rows[start : start + AT_ONCE]
        batch = generator.generate(conditions_ANC[own])
        values_AV[start : start + AT_ONCE] = batch.flatten(generator.spec)
    return LoraBatch.unflatten(generator.spec, values_AV)


def _chunks(rows: list[int]) -> list[list[int]]:
    return [rows[start : start + AT_ONCE] for start in range(0, len(rows), AT_ONCE)]


def evaluate_adapters(
    adapters: LoraBatch, data: ExperimentData, lora_model: FunctionalLoRA, rows: list[int]
) -> PartResult:
    """Accuracy, deltas and ΔW error of given adapters on the tasks at `rows`; generators and baselines alike."""
    starts = range(0, len(rows), AT_ONCE)
    pieces = [
        _measure(adapters.select(slice(start, start + AT_ONCE)), data, lora_model, own)
        for start, own in zip(starts, _chunks(rows), strict=True)
    ]
    accuracy_A, error_A, delta_AD, generic_AD = map(torch.cat, zip(*pieces, strict=True))
    teacher_AD = teacher_means(data.shared_deltas, rows)
    teacher_generic_AD = teacher_means(data.generic_deltas, rows)
    cosine_A = cosine_similarity(delta_AD, teacher_AD, dim=-1)
    generic_A = cosine_similarity(generic_AD, teacher_generic_AD, dim=-1)
    metrics = {
        "accuracy": accuracy_A.mean().item(),
        "delta_cosine": cosine_A.mean().item(),
        "delta_cosine_generic": generic_A.mean().item(),
        "delta_norm_ratio": (delta_AD.norm(dim=-1) / teacher_AD.norm(dim=-1)).mean().item(),
        "delta_w_error": error_A.mean().item(),
    }
    tasks = [data.tasks[i] for i in rows]
    by_task = mean_by_task(tasks, accuracy_A), mean_by_task(tasks, cosine_A)
    return PartResult(metrics, *by_task, adapters, delta_AD, teacher_AD)


def _measure(
    adapters: LoraBatch, data: ExperimentData, lora_model: FunctionalLoRA, rows: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Accuracy [A], relative error of ΔW [A], and Δ [A, D] on shared and on generic probes."""
    teachers = LoraBatch.unflatten(lora_model.spec, data.teachers(rows))
    return (
        accuracy_per_adapter(lora_model, adapters, data, rows),
        delta_w_error(adapters, teachers),
        mean_delta(lora_model, adapters, data.shared_deltas, rows),
        mean_delta(lora_model, adapters, data.generic_deltas, rows),
    )


def error_of_mean(tasks: Sequence[str], values_A: Tensor) -> float:
    """Return the standard error of the mean over tasks; 0 for one task, of which nothing is known."""
    means = list(mean_by_task(tasks, values_A).values())
    return stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0


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
    own_A = squared_norms(adapters)
    nearest_A = torch.full_like(own_A, torch.inf)
    for rows in _chunks(list(data.rows["train"])):
        teachers = LoraBatch.unflatten(lora_model.spec, data.teachers(rows))
        squares = squared_norms(teachers)
        gaps = own_A[:, None] + squares - 2 * inner_products(adapters, teachers)
        distances = gaps.clamp_min(0).sqrt() / squares.sqrt()
        nearest_A = torch.minimum(nearest_A, distances.min(1).values)
    return nearest_A


def squared_norms(adapters: LoraBatch) -> Tensor:
    """|ΔW|² of adapters [A], computed in blocks of `AT_ONCE`."""
    return torch.cat([delta_w_inner(own, own).diagonal() for own in _blocks(adapters)])


def inner_products(left: LoraBatch, right: LoraBatch) -> Tensor:
    """<ΔW_i, ΔW_j> of all pairs [A_left, A_right], computed in blocks of `AT_ONCE` adapters."""
    rows = []
    for ours in _blocks(left):
        blocks = [delta_w_inner(ours, theirs) for theirs in _blocks(right)]
        rows.append(torch.cat(blocks, dim=1))
    return torch.cat(rows)


def _blocks(adapters: LoraBatch) -> list[LoraBatch]:
    starts = range(0, adapters.n_adapters, AT_ONCE)
    return [adapters.select(slice(start, start + AT_ONCE)) for start in starts]


def diversity(adapters: LoraBatch) -> float:
    """1 - mean cosine of ΔW between different generated adapters: 0 means that all are the same."""
    inner = inner_products(adapters, adapters)
    norms = inner.diagonal().sqrt()
    cosines = inner / (norms[:, None] * norms[None])
    n = adapters.n_adapters
    if n < 2:
        return 0.0
    return 1 - ((cosines.sum() - n) / (n * (n - 1))).item()


def evaluate(
    generator: LoraGenerator, data: ExperimentData, lora_model: FunctionalLoRA, part: str
) -> dict[str, float]:
    """Metrics during training, from the evaluation prompts of a part's tasks.

    `<part>/accuracy` is the exact match on evaluation examples, `<part>/accuracy_error` its standard error over tasks,
    `<part>/delta_cosine` that of Δ on the shared probes. Beside them the controls of `control_accuracies`, on a few of
    the examples, show early if a generator collapses to one adapter for all tasks.
    """
    rows = list(data.rows[part])
    accuracies, deltas = [], []
    for own in _chunks(rows):
        batch = generator.generate(data.conditions.evaluation_ANC[own])
        accuracies.append(accuracy_per_adapter(lora_model, batch, data, own))
        deltas.append(mean_delta(lora_model, batch, data.shared_deltas, own))
    teacher_AD = teacher_means(data.shared_deltas, rows)
    cosine_A = cosine_similarity(torch.cat(deltas), teacher_AD, dim=-1)
    few = data.with_few_examples(CONTROL_EXAMPLES)
    controls = control_accuracies(generator, few, lora_model, rows)
    accuracy_A = torch.cat(accuracies)
    return {
        f"{part}/accuracy": accuracy_A.mean().item(),
        f"{part}/accuracy_error": error_of_mean([data.tasks[row] for row in rows], accuracy_A),
        f"{part}/delta_cosine": cosine_A.mean().item(),
        **{f"{part}/{name}": value for name, value in controls.items()},
    }


def mean_delta(
    lora_model: FunctionalLoRA, adapters: LoraBatch, reference: DeltaTable, rows: list[int]
) -> Tensor:
    """Δ [A, D] of adapters, read with the instrument that the reference (shared probes) was read with."""
    probes = reference.probes.select(rows)
    return measure_deltas(lora_model.model, lora_model.spec, adapters, probes, shared=True).mean_AD


def teacher_means(table: DeltaTable, rows: list[int]) -> Tensor:
    """Δ [A, D] of the teachers at some rows."""
    means = [
        mean_over_probes(table.delta_APQD[own], table.probes.valid_APQ[own])
        for own in _chunks(rows)
    ]
    return torch.cat(means)


def accuracy_per_adapter(
    lora_model: FunctionalLoRA,
    batch: LoraBatch,
    data: ExperimentData,
    rows: list[int],
) -> Tensor:
    """Return the accuracy [A] of adapters on the evaluation examples of the tasks at `rows`, of one on those of all.

    An answer is right by exact match, or where the suite says how answers are read, if it is read as the right one.
    """
    texts = data.examples_of(rows)
    if data.questions is not None and any(data.questions.items):
        questions = data.questions.select(rows, data.n_examples)
        return accuracy_by_reading(lora_model.model, lora_model.spec, batch, texts, questions)
    return scoring.accuracy_per_adapter(lora_model.model, lora_model.spec, batch, texts, AT_ONCE)
