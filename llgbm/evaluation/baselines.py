"""Baselines and the teacher upper bound, fitted on training tasks and tuned on validation tasks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from llgbm.dataset import ExperimentData
from llgbm.evaluation.algebra import (
    RIDGE_PENALTIES,
    DeltaRegression,
    nearest_weights,
    nonnegative_weights,
    similarity_weights,
)
from llgbm.evaluation.metrics import (
    AT_ONCE,
    PartResult,
    accuracy_per_adapter,
    evaluate_adapters,
    teacher_means,
)
from llgbm.functional import FunctionalLoRA
from llgbm.generator.networks import Standardiser
from llgbm.lora.adapters import LoraBatch
from llgbm.runtime import content_hash
from llgbm.system.cache import build_entry, entry_is_whole

VERSION = 2
KIND, NUMBERS = "baselines", "metrics.json"
PREFIX = "baseline"
UPPER_BOUND = "teacher"
TEMPERATURES = (0.01, 0.03, 0.1, 0.3)
# The best single teacher is sought with few examples of a task; so many finalists are then measured on all.
FEW_EXAMPLES, FINALISTS = 6, 8
# Numbers by name of the baseline and of the number.
Numbers = dict[str, dict[str, float]]
# Part of the tasks, and group of baselines.
Piece = tuple[str, str]


def known_baselines(
    cache: Path, data: ExperimentData, lora_model: FunctionalLoRA, part: str = "test"
) -> Numbers:
    """Measure every baseline on the tasks of one part, or read its numbers from the cache; by name."""
    found: Numbers = {}
    # Each group has an entry of its own, so that entries made before a group was added are found.
    for group in GROUPS:
        measure = partial(measure_group, data, lora_model, part, group)
        found |= _kept(cache, _group_key(data, part, group), measure)
    return found


def unknown_groups(cache: Path, data: ExperimentData, part: str) -> list[str]:
    """Return the groups of baselines whose numbers on one part are in no cache."""
    return [
        group
        for group in GROUPS
        if not entry_is_whole(cache / KIND / _group_key(data, part, group))
    ]


def measure_group(
    data: ExperimentData, lora_model: FunctionalLoRA, part: str, group: str
) -> Numbers:
    """Measure the baselines of a group on the tasks of one part; return their numbers by name."""
    return measure_pieces(data, lora_model, [(part, group)])[part, group]


def measure_pieces(
    data: ExperimentData, lora_model: FunctionalLoRA, pieces: Sequence[Piece]
) -> dict[Piece, Numbers]:
    """Measure groups of baselines on parts of the tasks; what one chooses on validation tasks, it chooses once."""
    found: dict[Piece, Numbers] = {piece: {} for piece in pieces}
    for group in dict.fromkeys(group for _, group in pieces):
        rows = {part: list(data.rows[part]) for part, own in pieces if own == group}
        for name, make in GROUPS[group].items():
            values_AV = make(data, lora_model, list(chain.from_iterable(rows.values())))
            parts = values_AV.split([len(own) for own in rows.values()])
            for (part, own), values in zip(rows.items(), parts, strict=True):
                adapters = LoraBatch.unflatten(lora_model.spec, values)
                result = evaluate_adapters(adapters, data, lora_model, own)
                found[part, group][name] = dict(result.metrics)
    return found


def keep_measured(
    cache: Path, data: ExperimentData, part: str, group: str, numbers: Numbers
) -> None:
    """Put the numbers of a group, which were measured elsewhere, into the cache, unless it has them."""
    _kept(cache, _group_key(data, part, group), lambda: numbers, tell=False)


def _group_key(data: ExperimentData, part: str, group: str) -> str:
    parts = () if part == "test" else (part,)  # the key of "test" is older than the parameter
    return content_hash("baselines", VERSION, data.hash, *parts, *filter(None, [group]))


def _kept(cache: Path, key: str, measure: Callable[[], Numbers], tell: bool = True) -> Numbers:
    """Read the numbers of a group from the cache, where they are put if it lacks them."""

    def write(folder: Path) -> None:
        (folder / NUMBERS).write_text(json.dumps(measure(), indent=1))

    entry = build_entry(cache, KIND, key, write, tell)
    found: Numbers = json.loads((entry / NUMBERS).read_text())
    return found


def to_metrics(baselines: Mapping[str, Mapping[str, float]], size: str = "") -> dict[str, float]:
    """Name the numbers of baselines as metrics: `baseline/<name>/<number>`, or `baseline/<name>_<size>/<number>`.

    A study of several model sizes names the size. `from_metrics` is the inverse.
    """
    suffix = f"_{size}" if size else ""
    return {
        f"{PREFIX}/{name}{suffix}/{number}": value
        for name, numbers in baselines.items()
        for number, value in numbers.items()
    }


def from_metrics(
    metrics: Mapping[str, float], sizes: Iterable[str] = ()
) -> dict[str, dict[str, dict[str, float]]]:
    """Read the baselines among metrics, by size, name and number; other metrics are passed over.

    The size is "" where `to_metrics` was given none. `sizes` are those of the study.
    """
    # The longest first: a size may end in the name of another.
    suffixes = {f"_{size}": size for size in sorted(sizes, key=len, reverse=True)}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for metric, value in metrics.items():
        prefix, *rest = metric.split("/")
        if prefix != PREFIX or len(rest) != 2:
            continue
        slug, number = rest
        suffix = next(filter(slug.endswith, suffixes), "")
        by_name = found.setdefault(suffixes.get(suffix, ""), {})
        by_name.setdefault(slug.removesuffix(suffix), {})[number] = value
    return found


def evaluate_baselines(
    data: ExperimentData, lora_model: FunctionalLoRA, part: str = "test"
) -> dict[str, PartResult]:
    """Evaluate every baseline on the tasks of one part; return results by name."""
    return dict(each_baseline(data, lora_model, part))


def each_baseline(
    data: ExperimentData,
    lora_model: FunctionalLoRA,
    part: str = "test",
    names: Iterable[str] | None = None,
) -> Iterator[tuple[str, PartResult]]:
    """Evaluate baselines, by default all, so that the adapters of only one are held; yield name and result."""
    rows = list(data.rows[part])
    for name in BASELINES if names is None else names:
        adapters = LoraBatch.unflatten(lora_model.spec, BASELINES[name](data, lora_model, rows))
        yield name, evaluate_adapters(adapters, data, lora_model, rows)


def no_adapter(data: ExperimentData, lora_model: FunctionalLoRA, rows: Sequence[int]) -> Tensor:
    """Adapters of zeros [A, V]: the base alone.

    Source: ours, a control.
    """
    return torch.zeros_like(data.teachers(rows))


def teacher(data: ExperimentData, lora_model: FunctionalLoRA, rows: Sequence[int]) -> Tensor:
    """Teachers of the tasks themselves [A, V], the upper bound.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685).
    """
    return data.teachers(rows)


def multitask_lora(data: ExperimentData, lora_model: FunctionalLoRA, rows: Sequence[int]) -> Tensor:
    """Multi-task LoRA for every task [A, V]: one adapter trained on all training tasks together.

    Source: Caruana 1997, "Multitask Learning", with one LoRA.
    """
    return data.multitask_V.expand(len(rows), -1)


def mean_adapter(data: ExperimentData, lora_model: FunctionalLoRA, rows: Sequence[int]) -> Tensor:
    """Mean of all training teachers, for every task [A, V].

    Source: Chronopoulou et al. 2023, "AdapterSoup: Weight Averaging to Improve Generalization of Pretrained Language
    Models" (arXiv 2302.07027), of all adapters.
    """
    return data.teachers(data.rows["train"]).mean(0).expand(len(rows), -1)


def nearest_teacher(
    data: ExperimentData, lora_model: FunctionalLoRA, rows: Sequence[int]
) -> Tensor:
    """Training teacher with the nearest mean prompt embedding by cosine [A, V].

    Source: ours, a control: the nearest neighbour of Cover and Hart 1967, "Nearest Neighbor Pattern Classification".
    """
    train = list(data.rows["train"])
    known = normalize(data.prompt_pools.train_ANC[train].mean(1), dim=-1)
    asked = normalize(data.prompt_pools.evaluation_ANC[list(rows)].mean(1), dim=-1)
    nearest = (asked @ known.T).argmax(1).tolist()
    return data.teachers([train[index] for index in nearest])


def best_single(data: ExperimentData, lora_model: FunctionalLoRA, rows: Sequence[int]) -> Tensor:
    """Training teacher with the best validation accuracy, for every task [A, V].

    The best of all on `FEW_EXAMPLES` examples of each validation task are compared on the rest of them too.

    Source: ours, a control; the narrowing is one round of Karnin et al. 2013, "Almost Optimal Exploration in
    Multi-Armed Bandits".
    """
    train, val = list(data.rows["train"]), list(data.rows["val"])

    def best(among: Sequence[int], measured: ExperimentData, count: int) -> list[int]:
        scores = []
        for row in among:
            one = LoraBatch.unflatten(lora_model.spec, data.teachers([row]))
            scores.append(accuracy_per_adapter(lora_model, one, measured, val).item())
        order = np.argsort(-np.array(scores), kind="stable")
        return [among[place] for place in order[:count]]

    finalists = best(train, data.with_few_examples(FEW_EXAMPLES), FINALISTS)
    return data.teachers(best(sorted(finalists), data, 1)).expand(len(rows), -1)


def ridge(data: ExperimentData, lora_model: FunctionalLoRA, rows: Sequence[int]) -> Tensor:
    """Ridge regression from the mean prompt embedding to standardised weights, [A, V].

    The penalty is the one with the best accuracy on the validation tasks.

    Source: Hoerl and Kennard 1970, "Ridge Regression: Biased Estimation for Nonorthogonal Problems".
    """
    from sklearn.linear_model import Ridge

    train, val = list(data.rows["train"]), list(data.rows["val"])
    standardiser = Standardiser.fit(data.teachers(train))
    inputs = data.prompt_pools.train_ANC[train].mean(1).cpu().numpy()
    outputs = standardiser.encode(data.teachers(train)).cpu().numpy()

    def predict(model: Ridge, wanted: Sequence[int]) -> Tensor:
        asked = data.prompt_pools.evaluation_ANC[list(wanted)].mean(1).cpu().numpy()
        tokens = torch.from_numpy(model.predict(asked)).to(standardiser.mean_V)
        return standardiser.decode(tokens)

    def score(model: Ridge) -> float:
        batch = LoraBatch.unflatten(lora_model.spec, predict(model, val))
        return accuracy_per_adapter(lora_model, batch, data, val).mean().item()

    models = [Ridge(alpha=penalty).fit(inputs, outputs) for penalty in RIDGE_PENALTIES]
    return predict(max(models, key=score), rows)


def delta_nearest(data: ExperimentData, lora_model: FunctionalLoRA, rows: Sequence[int]) -> Tensor:
    """Training teacher whose Δ is nearest to the one predicted from the prompts, [A, V].

    Source: ours, a control: deltas as the embedding of Xu et al. 2025 (arXiv 2509.04442), predicted.
    """
    wanted_AD, known_WD = _predicted_deltas(data, rows)
    train = list(data.rows["train"])
    nearest = nearest_weights(wanted_AD, known_WD).argmax(1).tolist()
    return data.teachers([train[index] for index in nearest])


def delta_merge(data: ExperimentData, lora_model: FunctionalLoRA, rows: Sequence[int]) -> Tensor:
    """Mean of the training teachers, weighted by how near their Δ is to the one predicted, [A, V].

    The temperature of the weights is the one with the best accuracy on the validation tasks.

    Source: ours, a control: Chronopoulou et al. 2023, "AdapterSoup: Weight Averaging to Improve Generalization of
    Pretrained Language Models" (arXiv 2302.07027), with predicted deltas as the similarity.
    """
    val = list(data.rows["val"])

    def merge(temperature: float, wanted: Sequence[int]) -> Tensor:
        weights_AW = similarity_weights(*_predicted_deltas(data, wanted), temperature)
        return weighted_teachers(data, weights_AW)

    def score(temperature: float) -> float:
        batch = LoraBatch.unflatten(lora_model.spec, merge(temperature, val))
        return accuracy_per_adapter(lora_model, batch, data, val).mean().item()

    return merge(max(TEMPERATURES, key=score), rows)


def delta_nnls(data: ExperimentData, lora_model: FunctionalLoRA, rows: Sequence[int]) -> Tensor:
    """Sum of training teachers whose weights, of at least 0, make up the predicted Δ of theirs, [A, V].

    Source: ours: Lawson and Hanson 1974, "Solving Least Squares Problems", on predicted deltas.
    """
    return weighted_teachers(data, nonnegative_weights(*_predicted_deltas(data, rows)))


def _predicted_deltas(data: ExperimentData, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Predict Δ of the tasks at some rows, [A, D]; return it with that of the training teachers, [W, D]."""
    known_WD = teacher_means(data.shared_deltas, list(data.rows["train"]))
    return DeltaRegression.fit(data).predict(data, rows), known_WD


def weighted_teachers(data: ExperimentData, weights_AW: Tensor) -> Tensor:
    """Sums of training teachers by weights, A and B apart, [A, V]; some are read at a time."""
    train = list(data.rows["train"])
    found_AV = weights_AW.new_zeros(len(weights_AW), data.multitask_V.shape[-1])
    for start in range(0, len(train), AT_ONCE):
        own = slice(start, start + AT_ONCE)
        found_AV += weights_AW[:, own] @ data.teachers(train[own])
    return found_AV


# By group: the first baselines, and those that were added or changed later, whose numbers count.
GROUPS = {
    "": {
        "base": no_adapter,
        "teacher": teacher,
        "multitask_lora": multitask_lora,
        "mean_adapter": mean_adapter,
        "nearest_teacher": nearest_teacher,
        "ridge": ridge,
    },
    "single": {"best_single": best_single},
    "deltas": {
        "delta_nearest": delta_nearest,
        "delta_merge": delta_merge,
        "delta_nnls": delta_nnls,
    },
}
BASELINES = {name: make for group in GROUPS.values() for name, make in group.items()}
