"""Algebra of behaviour: predict Δ from prompts, merge teachers towards a Δ, and compare Δ of a mixture with the mean.

Axis letters: see `llgbm`. The second adapter axis of weights, W, is that of the known teachers.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize, one_hot

from llgbm.dataset import ExperimentData
from llgbm.evaluation.metrics import accuracy_per_adapter, mean_delta, teacher_means
from llgbm.functional import FunctionalLoRA
from llgbm.lora.adapters import LoraBatch
from llgbm.lora.mixtures import sum_of_updates
from llgbm.runtime import UserError, stream_seed

RIDGE_PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
# `updates`: the exact mean of ΔW, of twice the rank; `factors`: the means of A and of B, of the same rank.
WAYS = ("updates", "factors")
KINSHIPS = ("same family", "same form", "unrelated")
Pair = tuple[int, int]


@dataclass(frozen=True)
class DeltaRegression:
    """Ridge regression from the mean prompt embedding to Δ on the shared probes.

    The penalty is the one with the best cosine of Δ on the validation tasks.
    """

    model: Any

    @classmethod
    def fit(cls, data: ExperimentData) -> DeltaRegression:
        """Fit on the training teachers."""
        from sklearn.linear_model import Ridge

        train, val = list(data.rows["train"]), list(data.rows["val"])
        inputs = data.prompt_pools.train_ANC[train].mean(1).cpu().numpy()
        outputs = teacher_means(data.shared_deltas, train).cpu().numpy()
        wanted_AD = teacher_means(data.shared_deltas, val)

        def score(fitted: DeltaRegression) -> float:
            found_AD = fitted.predict(data, val)
            return cosine_similarity(found_AD, wanted_AD, dim=-1).mean().item()

        models = [cls(Ridge(alpha=penalty).fit(inputs, outputs)) for penalty in RIDGE_PENALTIES]
        return max(models, key=score)

    def predict(self, data: ExperimentData, rows: Sequence[int]) -> Tensor:
        """Predict Δ [A, D] of the tasks at some rows from their evaluation prompts."""
        asked = data.prompt_pools.evaluation_ANC[list(rows)].mean(1).cpu().numpy()
        return torch.from_numpy(self.model.predict(asked)).to(data.shared_deltas.delta_APQD)


def nearest_weights(wanted_AD: Tensor, known_WD: Tensor) -> Tensor:
    """Weights [A, W] that are 1 for the teacher of the nearest Δ by cosine, and 0 for all others."""
    nearest_A = _cosines(wanted_AD, known_WD).argmax(1)
    return one_hot(nearest_A, len(known_WD)).to(wanted_AD)


def similarity_weights(wanted_AD: Tensor, known_WD: Tensor, temperature: float) -> Tensor:
    """Weights [A, W] that are the softmax of cosine / temperature."""
    return (_cosines(wanted_AD, known_WD) / temperature).softmax(1)


def nonnegative_weights(wanted_AD: Tensor, known_WD: Tensor) -> Tensor:
    """Weights [A, W] of at least 0 whose sum of Δs is nearest to the one wanted.

    Source: Lawson and Hanson 1974, "Solving Least Squares Problems", chapter 23.
    """
    from scipy.optimize import nnls

    known = known_WD.T.double().cpu().numpy()
    found = [nnls(known, one)[0] for one in wanted_AD.double().cpu().numpy()]
    return torch.from_numpy(np.stack(found)).to(wanted_AD)


def _cosines(left_AD: Tensor, right_WD: Tensor) -> Tensor:
    return normalize(left_AD, dim=-1) @ normalize(right_WD, dim=-1).T


@dataclass(frozen=True)
class MixtureResult:
    """Mixtures of pairs at one share of the second adapter, pair by pair, on the shared probes.

    `cosine_A` and `error_A` compare Δ of the mixture with the mean of both Δs, the error relative to it; `control_A` is
    the cosine with the mean of the next pair, `parent_A` that with the nearer of the two adapters alone.
    `accuracies_A2` are those on the tasks of the first and of the second.
    """

    share: float
    cosine_A: Tensor
    error_A: Tensor
    control_A: Tensor
    parent_A: Tensor
    accuracies_A2: Tensor

    @property
    def means(self) -> dict[str, float]:
        """Return the share and the means over pairs, by name."""
        first, second = self.accuracies_A2.mean(0).tolist()
        return {
            "share": self.share,
            "cosine": self.cosine_A.mean().item(),
            "error": self.error_A.mean().item(),
            "control": self.control_A.mean().item(),
            "nearer parent": self.parent_A.mean().item(),
            "accuracy, first task": first,
            "accuracy, second task": second,
        }


def measure_mixtures(
    data: ExperimentData,
    lora_model: FunctionalLoRA,
    pairs: Sequence[Pair],
    shares: Sequence[float],
    way: str = "updates",
) -> list[MixtureResult]:
    """Mix the teachers at pairs of rows; return one result a share.

    Raises ValueError for fewer than two pairs, which have no control, and for an unknown way.
    """
    if len(pairs) < 2 or way not in WAYS:
        raise ValueError(
            f"{len(pairs)} pairs mixed by {way!r}: give two or more, and one of {WAYS}"
        )
    left, right = ([pair[side] for pair in pairs] for side in (0, 1))
    ours_AD, theirs_AD = (teacher_means(data.shared_deltas, rows) for rows in (left, right))
    results = []
    for share in shares:
        batch = mix_teachers(data, lora_model, pairs, share, way)
        found_AD = mean_delta(lora_model, batch, data.shared_deltas, left)
        mean_AD = torch.lerp(ours_AD, theirs_AD, share)
        parents = [cosine_similarity(found_AD, own, dim=-1) for own in (ours_AD, theirs_AD)]
        accuracies = [accuracy_per_adapter(lora_model, batch, data, own) for own in (left, right)]
        results.append(
            MixtureResult(
                share,
                cosine_similarity(found_AD, mean_AD, dim=-1),
                (found_AD - mean_AD).norm(dim=-1) / mean_AD.norm(dim=-1),
                cosine_similarity(found_AD, mean_AD.roll(1, 0), dim=-1),
                torch.maximum(*parents),
                torch.stack(accuracies, 1),
            )
        )
    return results


def mix_teachers(
    data: ExperimentData,
    lora_model: FunctionalLoRA,
    pairs: Sequence[Pair],
    share: float,
    way: str = "updates",
) -> LoraBatch:
    """Return (1 - share) x first + share x second of each pair, by one of `WAYS`.

    A batch of `updates` has twice the rank; the factor on B A is that of the teachers.
    """
    left_AV, right_AV = (data.teachers([pair[side] for pair in pairs]) for side in (0, 1))
    if way == "factors":
        return LoraBatch.unflatten(lora_model.spec, torch.lerp(left_AV, right_AV, share))
    parts = [LoraBatch.unflatten(lora_model.spec, values) for values in (left_AV, right_AV)]
    return sum_of_updates(parts, (1 - share, share))


def draw_by_kinship(data: ExperimentData, count: int, seed: int = 0) -> dict[str, list[Pair]]:
    """Draw up to `count` pairs of training teachers of each of `KINSHIPS`; a kind with fewer than two is left out.

    Raises UserError where no kind has two.
    """
    pairs = list(itertools.combinations(data.rows["train"], 2))
    random.Random(stream_seed("kinship", seed)).shuffle(pairs)
    found: dict[str, list[Pair]] = {kind: [] for kind in KINSHIPS}
    for pair in pairs:
        kind = kinship(data, *pair)
        if kind is not None and len(found[kind]) < count:
            found[kind].append(pair)
    found = {kind: own for kind, own in found.items() if len(own) > 1}
    if not found:
        raise UserError("mixtures need two pairs of training teachers of different tasks")
    return found


def kinship(data: ExperimentData, first: int, second: int) -> str | None:
    """Return what two tasks share, one of `KINSHIPS`: their family, or the rest of their name; None for one task."""
    families, tasks = (
        [table[row] for row in (first, second)] for table in (data.families, data.tasks)
    )
    if tasks[0] == tasks[1]:
        return None
    if families[0] == families[1]:
        return "same family"
    forms = {task.removeprefix(family) for task, family in zip(tasks, families, strict=True)}
    return "same form" if len(forms) == 1 else "unrelated"
