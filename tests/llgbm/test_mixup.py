"""Mixtures of teachers as training rows: what they are made of, and that training with them is exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llgbm.dataset import ExperimentData
from llgbm.functional import compute_delta_differentiable
from llgbm.generator import GeneratorConfig
from llgbm.lora import LoraBatch
from llgbm.runtime import UserError
from llgbm.teachers.table import open_values
from llgbm.terms.registry import built_in_terms
from llgbm.training import TrainingConfig, Trial, train
from llgbm.training import mixup as module
from llgbm.training.mixup import draw_pairs, with_mixtures
from llgbm.world import World


@pytest.fixture
def data(world: World) -> ExperimentData:
    """The toy world's data, without its cache."""
    return replace(world.data, cache=None)


def rows_of(mixed: ExperimentData, data: ExperimentData) -> list[int]:
    return list(mixed.rows["train"])[len(data.rows["train"]) :]


def test_none_are_added_unless_asked_for(world: World) -> None:
    assert with_mixtures(world.data, world.lora_model, 0.0, 0) is world.data


def test_a_mixture_has_half_of_both_tasks_and_the_mean_of_their_weights(
    world: World, data: ExperimentData
) -> None:
    mixed = with_mixtures(data, world.lora_model, 0.5, 0)
    rows, pairs = rows_of(mixed, data), draw_pairs(data, 7, 0)
    assert len(rows) == 7 == len(set(pairs)) and min(rows) == len(data.tasks)
    assert mixed.rows["train"][: len(data.rows["train"])] == data.rows["train"]
    assert (mixed.rows["val"], mixed.rows["test"]) == (data.rows["val"], data.rows["test"])
    for row, (left, right) in zip(rows, pairs, strict=True):
        assert {left, right} <= set(data.rows["train"]) and data.tasks[left] != data.tasks[right]
        assert mixed.tasks[row] == f"{data.tasks[left]}+{data.tasks[right]}"
        both = data.teachers([left, right])
        torch.testing.assert_close(mixed.teachers([row])[0], both.mean(0))
        pools, probes = data.conditions.train_ANC, data.loss_deltas.probes.ids_APT
        half = pools.shape[1] // 2
        assert torch.equal(
            mixed.conditions.train_ANC[row], torch.cat([pools[left, :half], pools[right, half:]])
        )
        half = probes.shape[1] // 2
        assert torch.equal(
            mixed.loss_deltas.probes.ids_APT[row],
            torch.cat([probes[left, :half], probes[right, half:]]),
        )
    old = slice(0, len(data.tasks))
    assert torch.equal(mixed.loss_deltas.select(old).delta_APQD, data.loss_deltas.delta_APQD)
    assert torch.equal(mixed.conditions.train_ANC[old], data.conditions.train_ANC)


def test_deltas_are_measured_under_the_mixture(world: World, data: ExperimentData) -> None:
    mixed = with_mixtures(data, world.lora_model, 0.5, 0)
    rows, pairs = rows_of(mixed, data), draw_pairs(data, 7, 0)
    left, right = ([pair[side] for pair in pairs] for side in (0, 1))
    values = (data.teachers(left) + data.teachers(right)) / 2
    table = mixed.loss_deltas.select(rows)
    batch = LoraBatch.unflatten(world.lora_model.spec, values)
    with torch.no_grad():
        again = compute_delta_differentiable(world.lora_model, batch, table.probes, table.base_APQD)
    valid = table.probes.valid_APQ
    torch.testing.assert_close(table.delta_APQD[valid], again[valid], rtol=1e-4, atol=1e-5)
    half = table.delta_APQD.shape[1] // 2
    own = data.loss_deltas.delta_APQD[left]
    assert (table.delta_APQD - own)[:, :half][valid[:, :half]].abs().max() > 1e-3


def test_the_seed_draws_the_pairs(data: ExperimentData) -> None:
    assert draw_pairs(data, 9, 0) == draw_pairs(data, 9, 0) != draw_pairs(data, 9, 1)
    n_rows = len(data.rows["train"])
    every = n_rows * (n_rows - 1) // 2
    assert len(set(draw_pairs(data, every, 3))) == every


def test_deltas_are_measured_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = replace(world.data, cache=tmp_path)
    shared = replace(data, loss_deltas=data.shared_deltas)
    first, of_shared = (with_mixtures(own, world.lora_model, 0.5, 0) for own in (data, shared))
    monkeypatch.setattr(module, "measure_deltas", lambda *_: pytest.fail("measured again"))
    for own, found in ((data, first), (shared, of_shared)):
        again = with_mixtures(own, world.lora_model, 0.5, 0)
        for name in ("base_APQD", "delta_APQD"):
            assert torch.equal(getattr(found.loss_deltas, name), getattr(again.loss_deltas, name))
    # Shared probes are the same for any pairs.
    others = [(data, 0.5, 1), (data, 0.6, 0), (shared, 0.5, 1), (replace(data, hash="x"), 0.5, 0)]
    others += [(replace(data, cache=tmp_path / "elsewhere"), 0.5, 0)]
    others += [(replace(data, loss_deltas=data.generic_deltas), 0.5, 0)]
    for changed, mixup, seed in others:
        with pytest.raises(pytest.fail.Exception, match="measured again"):
            with_mixtures(changed, world.lora_model, mixup, seed)


def curve(config: TrainingConfig, data: ExperimentData, world: World, **more: Any) -> list[float]:
    found: list[float] = []
    train(
        config, data, world.lora_model, lambda s, m: found.append(m["loss/total"]) or True, **more
    )
    return found


def test_a_resumed_run_equals_an_unbroken_one(
    world: World, data: ExperimentData, config: TrainingConfig
) -> None:
    mixing = replace(config, mixup=1.0, steps=8)
    unbroken = curve(mixing, data, world)
    trial = Trial(mixing, data, world.lora_model)
    steps = trial.remaining()
    for _ in range(3):
        next(steps)
    state = trial.state()
    assert curve(mixing, data, world, state=state) == unbroken[3:]
    assert curve(replace(mixing, mixup=0.0), data, world) != unbroken


@pytest.mark.parametrize("generator", ["default", "hyperconv"])
def test_every_term_but_that_of_labels_reads_mixtures(
    world: World, data: ExperimentData, config: TrainingConfig, generator: str
) -> None:
    terms = {name: 1.0 for name in built_in_terms() if name != "labels"}
    own = GeneratorConfig(generator, hidden=16)
    mixing = replace(config, mixup=2.0, terms=terms, generator=own, steps=1)
    trial = Trial(mixing, data, world.lora_model)
    assert len(trial.dataset) == 3 * len(data.rows["train"])
    losses = next(trial.remaining())
    assert all(losses[f"loss/{name}"] > 0 for name in terms)


def test_teachers_alone_are_standardised_by(
    world: World, data: ExperimentData, config: TrainingConfig
) -> None:
    mixing, plain = (
        Trial(replace(config, mixup=mixup), data, world.lora_model).generator.standardiser
        for mixup in (1.0, 0.0)
    )
    assert torch.equal(mixing.mean_V, plain.mean_V) and torch.equal(mixing.scale_V, plain.scale_V)


def test_a_bank_on_the_disk_gives_the_same_bits(
    world: World, data: ExperimentData, config: TrainingConfig, tmp_path: Path
) -> None:
    values, _ = open_values(tmp_path, world.bank, "on")
    streamed = replace(data, values_AV=values)
    mixing = replace(config, mixup=1.0, steps=3)
    assert curve(mixing, streamed, world) == curve(mixing, data, world)
    mixed = with_mixtures(streamed, world.lora_model, 1.0, 0)
    in_memory = with_mixtures(data, world.lora_model, 1.0, 0)
    assert len(mixed.values_AV) == len(in_memory.values_AV)
    rows = [0, len(mixed.values_AV) - 1, 3]
    assert torch.equal(mixed.values_AV[rows], in_memory.values_AV[rows])
    assert torch.equal(mixed.values_AV[-2:], in_memory.values_AV[-2:])


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf"), True, "1"])
def test_a_mixup_that_is_no_share_is_refused(config: TrainingConfig, value: Any) -> None:
    with pytest.raises(UserError, match="mixup is .*; it must be a finite number of at least 0"):
        replace(config, mixup=value)


def test_mixtures_have_no_labels(config: TrainingConfig) -> None:
    with pytest.raises(UserError, match="labels reads labelled examples, which mixtures do not"):
        replace(config, mixup=1.0, terms={"labels": 1.0})
    assert replace(config, mixup=0, terms={"labels": 1.0}).mixup == 0


@pytest.mark.parametrize("mixup", [0.01, 100.0])
def test_a_mixup_that_can_add_nothing_or_has_no_more_pairs_is_refused(
    data: ExperimentData, world: World, mixup: float
) -> None:
    with pytest.raises(UserError, match="pairs of two tasks: choose another mixup"):
        with_mixtures(data, world.lora_model, mixup, 0)


def test_teachers_of_one_task_have_no_mixture(data: ExperimentData, world: World) -> None:
    train = data.rows["train"][:2]
    tasks = ["one" if row in train else task for row, task in enumerate(data.tasks)]
    alone = replace(data, tasks=tuple(tasks), rows={**data.rows, "train": train})
    with pytest.raises(UserError, match="which have 0 pairs of two tasks"):
        with_mixtures(alone, world.lora_model, 1.0, 0)


def test_pools_of_one_prompt_have_no_halves(data: ExperimentData, world: World) -> None:
    one = replace(data.conditions, train_ANC=data.conditions.train_ANC[:, :1])
    with pytest.raises(UserError, match="the pools hold one text a task"):
        with_mixtures(replace(data, conditions=one), world.lora_model, 1.0, 0)
