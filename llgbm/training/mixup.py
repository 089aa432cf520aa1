"""Mixtures of two teachers as further training rows.

A mixture has half of the prompts and half of the probes of each of its two tasks. Its A and B are the means of the
teachers', and its deltas are measured under them: they are near the mean of the teachers' deltas, but not equal to it.
Axis letters: see `llgbm`.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llgbm.dataset import ExperimentData
from llgbm.delta import DeltaTable, EncodedProbes, measure_deltas
from llgbm.functional import FunctionalLoRA
from llgbm.lora import LoraBatch
from llgbm.runtime import UserError, content_hash, stream_seed
from llgbm.system.cache import build_entry
from llgbm.teachers.table import PairTable

VERSION = (
    1  # Raise it when the same pairs would give other deltas: entries of the cache depend on it.
)
FILE = "deltas.safetensors"
# Adapters that are mixed at once.
AT_ONCE = 32
Pair = tuple[int, int]


def with_mixtures(
    data: ExperimentData, lora_model: FunctionalLoRA, mixup: float, seed: int
) -> ExperimentData:
    """Add `mixup` mixtures for each training row, behind all other rows; with 0 return the data as they are.

    The tables that training reads have the new rows: weights, training prompts and loss deltas. Those of evaluation do
    not. Raises UserError where no mixture can be made.
    """
    if not mixup:
        return data
    of_task = Counter(data.tasks[row] for row in data.rows["train"])
    pairs = draw_pairs(data, count_mixtures(mixup, list(of_task.values())), seed)
    left, right = ([pair[side] for pair in pairs] for side in (0, 1))
    pools_ANC = data.conditions.train_ANC
    if pools_ANC.shape[1] < 2:
        raise UserError(
            "mixup takes prompts of two tasks, and the pools hold one text a task: leave mixup out"
        )
    mixed_ANC = _halves(pools_ANC[left], pools_ANC[right])
    names = tuple(f"{data.tasks[i]}+{data.tasks[j]}" for i, j in pairs)
    first = len(data.tasks)
    table = _measured(data, lora_model, pairs)
    return replace(
        data,
        adapter_ids=(*data.adapter_ids, *names),
        tasks=(*data.tasks, *names),
        families=(*data.families, *("mixture" for _ in pairs)),
        rows={**data.rows, "train": (*data.rows["train"], *range(first, first + len(pairs)))},
        values_AV=_with_means(data, pairs),
        conditions=replace(data.conditions, train_ANC=torch.cat([pools_ANC, mixed_ANC])),
        loss_deltas=_joined(data.loss_deltas, table),
    )


def count_mixtures(mixup: float, of_task: Sequence[int]) -> int:
    """Number of mixtures, `mixup` for each training row, where tasks have so many rows.

    Raises UserError for none, and for more than there are pairs of two tasks.
    """
    rows = sum(of_task)
    count, there = round(mixup * rows), (rows**2 - sum(own**2 for own in of_task)) // 2
    if not 0 < count <= there:
        raise UserError(
            f"mixup asks for {count} mixtures of {rows} training adapters, which have {there} pairs of two tasks: "
            "choose another mixup"
        )
    return count


def draw_pairs(data: ExperimentData, count: int, seed: int) -> list[Pair]:
    """Draw `count` different pairs of training rows, each of two tasks."""
    rows = list(data.rows["train"])
    rng = random.Random(stream_seed("mixup", seed))
    found: dict[Pair, None] = {}
    while len(found) < count:
        low, high = sorted(rng.sample(rows, 2))
        if data.tasks[low] != data.tasks[high]:
            found[low, high] = None
    return list(found)


def _with_means(data: ExperimentData, pairs: Sequence[Pair]) -> Tensor | PairTable:
    """Return the flat adapters with the means of pairs behind them; from the disk these are made when they are read."""
    if isinstance(data.values_AV, Tensor):
        return torch.cat([data.values_AV, _means(data, pairs).to(data.values_AV)])
    return PairTable(data.values_AV.path, tuple(pairs))


def _means(data: ExperimentData, pairs: Sequence[Pair]) -> Tensor:
    """A and B of the mixtures, flat [A, V]."""
    left, right = (data.teachers([pair[side] for pair in pairs]) for side in (0, 1))
    return torch.lerp(left, right, 0.5)


def _halves(left: Tensor, right: Tensor) -> Tensor:
    """First half of the second axis from the left, the rest from the right."""
    half = (left.shape[1] + 1) // 2
    return torch.cat([left[:, :half], right[:, half:]], 1)


def _probes(data: ExperimentData, pairs: Sequence[Pair]) -> EncodedProbes:
    left, right = (
        data.loss_deltas.probes.select([pair[side] for pair in pairs]) for side in (0, 1)
    )
    return EncodedProbes(
        _halves(left.ids_APT, right.ids_APT),
        _halves(left.positions_APQ, right.positions_APQ),
        _halves(left.valid_APQ, right.valid_APQ),
    )


def _measured(
    data: ExperimentData, lora_model: FunctionalLoRA, pairs: Sequence[Pair]
) -> DeltaTable:
    """Measure the mixtures at their probes, or find what was measured in the cache of the data."""
    probes = _probes(data, pairs)

    def measure() -> DeltaTable:
        pieces = []
        for start in range(0, len(pairs), AT_ONCE):
            own = slice(start, start + AT_ONCE)
            batch = LoraBatch.unflatten(lora_model.spec, _means(data, pairs[own]))
            pieces.append(
                measure_deltas(lora_model.model, lora_model.spec, batch, probes.select(own), False)
            )
        base, delta = (torch.cat([getattr(p, n) for p in pieces]) for n in TENSORS)
        return DeltaTable(probes, base, delta)

    # A machine of a cluster may not have the folder that the world was built in.
    if data.cache is None or not data.cache.is_dir():
        return measure()

    def write(folder: Path) -> None:
        table = measure()
        save_file({name: getattr(table, name).cpu() for name in TENSORS}, folder / FILE)

    entry = build_entry(data.cache, "mixtures", _key(data, pairs, probes), write)
    found = load_file(entry / FILE)
    return DeltaTable(probes, *(found[name].to(data.device) for name in TENSORS))


TENSORS = ("base_APQD", "delta_APQD")


def _key(data: ExperimentData, pairs: Sequence[Pair], probes: EncodedProbes) -> str:
    """Key of mixtures in the cache. The hash of the data holds base, bank and code; probes may have been replaced."""
    digest = hashlib.sha256()
    for tensor in (probes.ids_APT, probes.positions_APQ, probes.valid_APQ):
        digest.update(f"{tuple(tensor.shape)}".encode() + tensor.cpu().numpy().tobytes())
    return content_hash("mixtures", VERSION, data.hash, pairs, digest.hexdigest())


def _joined(first: DeltaTable, second: DeltaTable) -> DeltaTable:
    """Put the rows of two tables of as many probes below each other."""
    names = ("ids_APT", "positions_APQ", "valid_APQ")
    probes = [torch.cat([getattr(t.probes, name) for t in (first, second)]) for name in names]
    states = [torch.cat([getattr(t, name) for t in (first, second)]) for name in TENSORS]
    return DeltaTable(EncodedProbes(*probes), *states)
