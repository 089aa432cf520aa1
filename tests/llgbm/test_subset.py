"""Training on fewer tasks, teachers or trajectories: what is kept, and that nothing else is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llgbm.dataset import ExperimentData
from llgbm.generator import GeneratorConfig
from llgbm.runtime import UserError
from llgbm.training import TrainingConfig, train
from llgbm.training.subset import with_fewer
from llgbm.world import World
from tuning.studies.spec import TrialSpec
from tuning.sweep.artifacts import read_per_task
from tuning.sweep.checkpoints import TrialCheckpoints
from tuning.sweep.worker import Outputs, run_trial


def tasks_of(data: ExperimentData) -> set[str]:
    return {data.tasks[row] for row in data.rows["train"]}


def of_pairs(data: ExperimentData) -> ExperimentData:
    """The same data with two teachers a task: its training rows by twos, under the name of the first."""
    rows, names = data.rows["train"], list(data.tasks)
    for left, right in zip(rows[::2], rows[1::2], strict=True):
        names[right] = names[left]
    return replace(data, tasks=tuple(names))


@given(
    counts=st.lists(st.integers(1, 14), min_size=2, max_size=2).map(sorted), seed=st.integers(0, 99)
)
@settings(max_examples=20, deadline=None)
def test_a_smaller_draw_is_a_part_of_a_larger_one(
    world: World, counts: list[int], seed: int
) -> None:
    few, more = (
        with_fewer(world.data, TrainingConfig(n_tasks=count, seed=seed)) for count in counts
    )
    assert (len(tasks_of(few)), len(tasks_of(more))) == tuple(counts)
    assert tasks_of(few) <= tasks_of(more) <= tasks_of(world.data)
    assert list(few.rows["train"]) == sorted(few.rows["train"])
    assert (few.rows["val"], few.rows["test"]) == (world.data.rows["val"], world.data.rows["test"])


def test_all_is_the_data_as_they_are_and_seeds_draw_other_tasks(world: World) -> None:
    for config in (TrainingConfig(), TrainingConfig(n_tasks=14), TrainingConfig(n_trajectories=4)):
        assert with_fewer(world.data, config) is world.data
    draws = [with_fewer(world.data, TrainingConfig(n_tasks=5, seed=seed)) for seed in range(6)]
    assert len({frozenset(tasks_of(data)) for data in draws}) > 1


def test_the_first_teachers_and_trajectories_of_each_task_are_kept(world: World) -> None:
    pairs = of_pairs(world.data)
    config = TrainingConfig(n_tasks=3, n_teachers=1, n_trajectories=2, seed=1)
    few = with_fewer(pairs, config)
    assert len(few.rows["train"]) == 3 == len(tasks_of(few))
    assert set(few.rows["train"]) <= set(pairs.rows["train"][::2])
    whole, cut = pairs.loss_deltas, few.loss_deltas
    assert torch.equal(cut.delta_APQD, whole.delta_APQD[:, :2])
    assert torch.equal(cut.base_APQD, whole.base_APQD[:, :2])
    assert torch.equal(cut.probes.ids_APT, whole.probes.ids_APT[:, :2])
    assert few.shared_deltas is pairs.shared_deltas
    assert with_fewer(few, config) is few


def test_labelled_examples_stay_with_their_rows(world: World) -> None:
    few = with_fewer(world.data, TrainingConfig(n_tasks=4, seed=2))
    assert few.labelled is not None and world.data.labelled is not None
    each = len(world.data.labelled) // 14
    assert len(few.labelled) == 4 * each
    for place, row in enumerate(few.rows["train"]):
        old = world.data.rows["train"].index(row)
        wanted = world.data.labelled.select(slice(old * each, (old + 1) * each))
        found = few.labelled.select(slice(place * each, (place + 1) * each))
        assert torch.equal(found.input_ids_ST, wanted.input_ids_ST)
        assert torch.equal(found.targets_ST, wanted.targets_ST)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"n_tasks": 15}, "15 training tasks are asked for, and the world has 14"),
        ({"n_teachers": 2}, "2 teachers a task are asked for, and .* has 1"),
        (
            {"n_trajectories": 5},
            "5 trajectories of each teacher are asked for, and the world has 4",
        ),
    ],
)
def test_more_than_there_is_is_refused(world: World, changes: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        with_fewer(world.data, TrainingConfig(**changes))


def test_shared_probes_are_no_trajectories() -> None:
    with pytest.raises(UserError, match="n_trajectories limits trajectories"):
        TrainingConfig(delta_probes="domain", n_trajectories=2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lambda_weight": 0.0, "lambda_delta": 0.0, "terms": {"kl": 1.0, "labels": 0.5}},
        {"generator": GeneratorConfig("retrieval")},
        {"mixup": 0.5},
    ],
    ids=["multitask", "kl and labels", "retrieval", "mixtures"],
)
@pytest.mark.whole
def test_what_is_not_drawn_changes_nothing_in_training(
    world: World, config: TrainingConfig, changes: dict[str, Any]
) -> None:
    short = replace(config, steps=6, eval_every=6, n_tasks=6, n_trajectories=2, n_prompts=4)
    config = replace(short, **changes)
    data = replace(world.data, cache=None)
    kept = set(with_fewer(data, config).rows["train"])
    others = [row for row in range(len(data.tasks)) if row not in kept]
    values, conditions = data.values_AV[:], data.conditions.train_ANC.clone()
    values, deltas = values.clone(), data.loss_deltas.delta_APQD.clone()
    values[others], conditions[others], deltas[others], deltas[:, 2:] = 1e3, -1e3, 1e3, 1e3
    spoiled = replace(
        data,
        values_AV=values,
        conditions=replace(data.conditions, train_ANC=conditions),
        loss_deltas=replace(data.loss_deltas, delta_APQD=deltas),
    )

    def losses(own: ExperimentData) -> list[float]:
        found: list[float] = []
        train(config, own, world.lora_model, lambda _, m: found.append(m["loss/total"]) or True)
        return found

    assert losses(data) == losses(spoiled)
    assert losses(data) != losses_of_all(world, config)


def losses_of_all(world: World, config: TrainingConfig) -> list[float]:
    found: list[float] = []
    whole = replace(config, n_tasks=0)
    train(whole, world.data, world.lora_model, lambda _, m: found.append(m["loss/total"]) or True)
    return found


class Kept:
    """Keep what a trial logs: its table of tasks in a folder, its metrics in a dictionary."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.metrics = folder, dict[str, float]()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics |= metrics

    def is_flushed(self) -> bool:
        return True

    def log_artifacts(self, folder: Path, artifact_path: str | None = None) -> None:
        folder.joinpath("per_task.json").rename(self.folder / "per_task.json")

    def set_tag(self, key: str, value: str) -> None:
        """No tag is read here."""


def test_training_tasks_of_a_trial_are_those_it_was_trained_on(
    world: World, config: TrainingConfig, tmp_path: Path
) -> None:
    trial = TrialSpec("few", replace(config, n_tasks=5), world.config)
    log = Kept(tmp_path)
    run_trial(trial, world, Outputs(log, TrialCheckpoints(str(tmp_path / "state"), trial.id)))
    found = read_per_task(tmp_path / "per_task.json")
    assert set(found["train"]["accuracy"]) == tasks_of(with_fewer(world.data, trial.config))
    assert len(found["test"]["accuracy"]) == 4 and "train/accuracy" in log.metrics
