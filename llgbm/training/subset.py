"""Train on fewer tasks, teachers or trajectories than a world has: the points of a learning curve.

Axis letters: see `llgbm`.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import torch

from llgbm.dataset import ExperimentData
from llgbm.models.encoding import EncodedPairs
from llgbm.runtime import UserError, stream_seed
from llgbm.training.config import TrainingConfig


def with_fewer(data: ExperimentData, config: TrainingConfig) -> ExperimentData:
    """Keep what a configuration trains on: `n_tasks` tasks, `n_teachers` of each, `n_trajectories` of a teacher.

    The seed of the configuration draws the tasks, each smaller draw a part of the larger one. Of teachers and of
    trajectories the first are kept. Validation and held-out tasks stay. Data that was cut so is returned as it is.
    Raises UserError where there are fewer than asked for.
    """
    rows = list(data.rows["train"])
    kept = _first_teachers(data, _drawn(data, rows, config), config.n_teachers)
    if kept != rows:
        data = replace(
            data, rows={**data.rows, "train": tuple(kept)}, labelled=_labelled(data, kept)
        )
    count, there = config.n_trajectories, data.loss_deltas.delta_APQD.shape[1]
    if count > there:
        raise UserError(
            f"{count} trajectories of each teacher are asked for, and the world has {there}: give fewer, or build more"
        )
    if not count or count == there:
        return data
    return replace(data, loss_deltas=data.loss_deltas.select(slice(None), slice(0, count)))


def _drawn(data: ExperimentData, rows: list[int], config: TrainingConfig) -> list[int]:
    """Return the rows of the tasks that are drawn, in their order."""
    tasks = list(dict.fromkeys(data.tasks[row] for row in rows))
    if config.n_tasks > len(tasks):
        raise UserError(
            f"{config.n_tasks} training tasks are asked for, and the world has {len(tasks)}: give fewer"
        )
    if not config.n_tasks:
        return rows
    rng = random.Random(stream_seed("training tasks", config.seed))
    place = {task: rng.random() for task in sorted(tasks)}
    drawn = set(sorted(tasks, key=place.__getitem__)[: config.n_tasks])
    return [row for row in rows if data.tasks[row] in drawn]


def _first_teachers(data: ExperimentData, rows: list[int], count: int) -> list[int]:
    """Return the first `count` rows of each task (0: all)."""
    if not count:
        return rows
    numbers = Counter[str]()
    kept = []
    for row in rows:
        numbers[data.tasks[row]] += 1
        if numbers[data.tasks[row]] <= count:
            kept.append(row)
    fewest = min(numbers, key=numbers.__getitem__)
    if numbers[fewest] < count:
        raise UserError(
            f"{count} teachers a task are asked for, and {fewest} has {numbers[fewest]}: give fewer, or train more"
        )
    return kept


def _labelled(data: ExperimentData, kept: list[int]) -> EncodedPairs | None:
    """Return the labelled examples of some of the training rows."""
    if data.labelled is None:
        return None
    rows = data.rows["train"]
    each = len(data.labelled) // len(rows)
    places = torch.tensor([rows.index(row) for row in kept])
    index = (places[:, None] * each + torch.arange(each)).flatten()
    return data.labelled.select(index.to(data.labelled.input_ids_ST.device))
