"""Baselines and the teacher upper bound, fitted on training tasks and tuned on validation tasks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from llgbm.dataset import ExperimentData
from llgbm.evaluation.metrics import PartResult, accuracy_per_adapter, evaluate_adapters
from llgbm.functional import FunctionalLoRA
from llgbm.generator.networks import Standardiser
from llgbm.lora.adapters import LoraBatch
from llgbm.runtime import content_hash
from llgbm.system.cache import build_entry

VERSION = 2
PREFIX = "baseline"
UPPER_BOUND = "teacher"
RIDGE_PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def known_baselines(
    cache: Path, data: ExperimentData, lora_model: FunctionalLoRA, part: str = "test"
) -> dict[str, dict[str, float]]:
    """Measure every baseline on the tasks of one part, or read its numbers from the cache; by name."""
    parts = () if part == "test" else (part,)  # the key of "test" is older than the parameter
    key = content_hash("baselines", VERSION, data.hash, *parts)

    def write(folder: Path) -> None:
        each = each_baseline(data, lora_model, part)
        found = {name: dict(result.metrics) for name, result in each}
        (folder / "metrics.json").write_text(json.dumps(found, indent=1))

    return json.loads((build_entry(cache, "baselines", key, write) / "metrics.json").read_text())


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
    data: ExperimentData, lora_model: FunctionalLoRA, part: str = "test"
) -> Iterator[tuple[str, PartResult]]:
    """Evaluate the baselines one after another, so that the adapters of only one are held; yield name and result."""
    rows = list(data.rows[part])
    for name, make in BASELINES.items():
        adapters = LoraBatch.unflatten(lora_model.spec, make(data, lora_model, rows))
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

    Source: ours, a control.
    """
    train, val = list(data.rows["train"]), list(data.rows["val"])
    scores = []
    for index in train:
        everywhere = LoraBatch.unflatten(
            lora_model.spec, data.teachers([index]).expand(len(val), -1)
        )
        scores.append(accuracy_per_adapter(lora_model, everywhere, data, val).mean().item())
    return data.teachers([train[int(np.argmax(scores))]]).expand(len(rows), -1)


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


BASELINES = {
    "base": no_adapter,
    "teacher": teacher,
    "multitask_lora": multitask_lora,
    "mean_adapter": mean_adapter,
    "nearest_teacher": nearest_teacher,
    "ridge": ridge,
    "best_single": best_single,
}
