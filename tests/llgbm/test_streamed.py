"""A bank that is read from the disk: the bits of one in memory, and no table of all teachers anywhere."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_evaluation_memory import Sizes

from llgbm import estimate
from llgbm.dataset import ExperimentData
from llgbm.delta import DeltaCache
from llgbm.estimate import BLOCKS, WorldSketch
from llgbm.evaluation.baselines import mean_adapter, nearest_teacher, no_adapter, teacher
from llgbm.evaluation.metrics import evaluate_generator
from llgbm.generator import generator_config
from llgbm.generator.networks import Standardiser
from llgbm.runtime import UserError
from llgbm.teachers import table
from llgbm.teachers.table import BankTable, build_table, is_streamed, open_values
from llgbm.training import TrainingConfig, train
from llgbm.training.loop import Trial
from llgbm.world import World, delta_probe_sets, gather_data

TERMS = {"importance": 0.1, "layers": 0.1}


@pytest.fixture(scope="module")
def streamed(world: World, tmp_path_factory: pytest.TempPathFactory) -> ExperimentData:
    """The data of the toy world, its teachers on the disk."""
    values = build_table(tmp_path_factory.mktemp("cache"), world.bank)
    return replace(world.data, values_AV=values)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of columns that the toy adapters have several of."""
    monkeypatch.setattr(table, "BLOCK_BYTES", 2**19)
    monkeypatch.setattr(estimate, "BLOCK_BYTES", 2**19)


def test_rows_have_the_bits_of_the_bank(world: World, streamed: ExperimentData) -> None:
    rows = [3, 0, 5]
    assert torch.equal(streamed.teachers(rows), world.data.teachers(rows))
    assert torch.equal(streamed.values_AV[:], world.bank.load().flatten(world.bank.spec))
    again = pickle.loads(pickle.dumps(streamed.values_AV))
    assert torch.equal(again[[1]], world.data.teachers([1]))
    assert len(pickle.dumps(streamed.values_AV)) < 1000 and streamed.to("cpu").values_AV == again


def test_means_and_deviations_have_the_same_bits(world: World, streamed: ExperimentData) -> None:
    rows, values = list(world.data.rows["train"]), streamed.values_AV
    assert isinstance(values, BankTable)
    blocks = list(values.columns(rows))
    whole = Standardiser.fit(world.data.teachers(rows))
    pieces = Standardiser.fit_columns(blocks)
    assert len(blocks) > 2
    assert torch.equal(whole.mean_V, pieces.mean_V) and torch.equal(whole.scale_V, pieces.scale_V)


@pytest.mark.parametrize("generator", ["default", "hyperconv"])
def test_a_training_has_the_same_losses_bit_for_bit(
    generator: str, world: World, streamed: ExperimentData, config: TrainingConfig
) -> None:
    config = replace(
        config, generator=generator_config(generator, hidden=16), terms=TERMS, steps=6, eval_every=3
    )
    curves: list[list[Mapping[str, float]]] = []
    results = []
    for data in (world.data, streamed):
        curve: list[Mapping[str, float]] = []
        outcome = train(config, data, world.lora_model, lambda s, m, c=curve: c.append(m) or True)
        curves.append(curve)
        results.append(evaluate_generator(outcome.generator, data, world.lora_model, "test"))
    assert curves[0] == curves[1] and len(curves[0]) == 6
    assert results[0].metrics == results[1].metrics


def test_baselines_are_the_same(world: World, streamed: ExperimentData) -> None:
    rows = list(world.data.rows["test"])
    for baseline in (no_adapter, teacher, mean_adapter, nearest_teacher):
        first, second = (baseline(d, world.lora_model, rows) for d in (world.data, streamed))
        assert torch.equal(first, second)


def test_deltas_are_measured_with_the_same_bits(world: World, tmp_path: Path) -> None:
    _, batch = open_values(tmp_path, world.bank, "on")
    probes = delta_probe_sets(world.config.suite, world.bank, world.base)["trajectory"]
    found = DeltaCache.build(tmp_path, world.base, world.bank, probes, batch)
    deltas = found.table(world.base, probes)
    assert torch.equal(deltas.delta_APQD, world.data.loss_deltas.delta_APQD)


def test_a_world_takes_it_and_keeps_its_hash(world: World, cache: Path) -> None:
    data = gather_data(cache, world.config, world.base, world.bank, "on")
    assert isinstance(data.values_AV, BankTable) and data.hash == world.data.hash


def many(world: World, count: int, folder: Path) -> ExperimentData:
    """The data with so many training teachers, the few again and again, in a file."""
    rows = list(world.data.rows["train"])
    index = (rows * count)[:count]
    folder.mkdir()
    np.save(folder / "values.npy", world.data.teachers(index).numpy())
    own = world.data.conditions
    held = {name: getattr(own, name)[index] for name in ("train_ANC", "evaluation_ANC")}
    return replace(
        world.data,
        values_AV=BankTable(folder / "values.npy"),
        rows={"train": tuple(range(count)), "val": (), "test": ()},
        tasks=tuple(world.data.tasks[i] for i in index),
        conditions=replace(own, **held),
        loss_deltas=world.data.loss_deltas.select(index),
    )


def most_held(world: World, config: TrainingConfig, data: ExperimentData) -> tuple[int, int]:
    """Bytes of the largest tensor that a start and two steps make, and numpy's peak."""
    tracemalloc.start()
    try:
        with Sizes() as made:
            trial = Trial(config, data, world.lora_model)
            batches: Any = iter(trial.batches())
            trial.advance(next(batches))
            trial.advance(next(batches))
        return max(made.found), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_adapters(
    world: World, config: TrainingConfig, tmp_path: Path
) -> None:
    config = replace(config, generator=generator_config(hidden=16), lambda_delta=0.0)
    counts = (32, 128)
    found = [most_held(world, config, many(world, n, tmp_path / str(n))) for n in counts]
    table_bytes = [4 * n * world.bank.spec.n_values for n in counts]
    # Deltas and prompts are in memory: a few kilobytes for each adapter.
    assert found[1][0] < table_bytes[1] / 4
    assert found[1][1] < 1.5 * found[0][1] and found[1][1] < table_bytes[1] / 4


def test_the_choice_is_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "free_memory", lambda device: 1600.0)
    assert not is_streamed(100) and is_streamed(101)
    assert is_streamed(1, "on") and not is_streamed(10**9, "off")
    with pytest.raises(UserError, match="unknown choice 'often'"):
        is_streamed(1, "often")


def test_the_estimate_counts_it(world: World, config: TrainingConfig) -> None:
    plain, streamed = (WorldSketch(world.config, s).estimate(config) for s in ("off", "on"))
    wanted = min(plain.memory["teachers"], BLOCKS * table.BLOCK_BYTES)
    assert streamed.memory == {**plain.memory, "teachers": wanted}
