"""Evaluation in chunks: the numbers of one pass over all adapters, and memory that does not grow with their number."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from timing import peak_memory

from llgbm.dataset import ExperimentData
from llgbm.evaluation import metrics
from llgbm.evaluation.metrics import evaluate, evaluate_generator, inner_products
from llgbm.generator import make_generator
from llgbm.generator.networks import GeneratorConfig, LoraGenerator, Standardiser
from llgbm.lora.geometry import delta_w_inner
from llgbm.world import World

MEGABYTE = 2**20
FEW, MANY = 24, 144


@pytest.fixture(scope="module")
def generator(world: World) -> LoraGenerator:
    data, spec = world.data, world.lora_model.spec
    width = data.conditions.train_ANC.shape[-1]
    standardiser = Standardiser.fit(data.values_AV[list(data.rows["train"])])
    return make_generator(GeneratorConfig(hidden=32), spec, width, standardiser, 0)


def with_rows(data: ExperimentData, count: int) -> ExperimentData:
    """The data with so many rows to evaluate: the few that there are, again and again."""
    rows = (data.rows["test"] * count)[:count]
    return replace(data, rows={**data.rows, "test": rows})


def test_chunks_give_what_one_pass_gives(
    world: World, generator: LoraGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for at_once in (1000, 3):
        monkeypatch.setattr(metrics, "AT_ONCE", at_once)
        found.append(evaluate_generator(generator, world.data, world.lora_model, "test"))
    whole, pieces = found
    assert pieces.metrics == pytest.approx(whole.metrics, rel=1e-4, abs=1e-6)
    assert pieces.accuracy_by_task == whole.accuracy_by_task
    torch.testing.assert_close(pieces.delta_AD, whole.delta_AD, atol=1e-5, rtol=1e-4)
    for name, own in pieces.adapters.a.items():
        torch.testing.assert_close(own, whole.adapters.a[name])
    blocks = inner_products(whole.adapters, pieces.adapters)
    torch.testing.assert_close(blocks, delta_w_inner(whole.adapters, pieces.adapters))


def test_memory_does_not_grow_with_the_number_of_adapters(
    world: World, generator: LoraGenerator
) -> None:
    def peak(count: int) -> int:
        data = with_rows(world.data, count)
        evaluate(generator, data, world.lora_model, "test")
        return peak_memory(lambda: evaluate(generator, data, world.lora_model, "test"))

    few, many = peak(FEW), peak(MANY)
    table = (MANY - FEW) * world.lora_model.spec.n_values * 4
    assert table > 15 * MEGABYTE
    assert many - few < table / 2


def test_a_full_evaluation_holds_the_generated_adapters_and_no_other_table(
    world: World, generator: LoraGenerator
) -> None:
    def peak(count: int) -> int:
        data = with_rows(world.data, count)
        return peak_memory(lambda: evaluate_generator(generator, data, world.lora_model, "test"))

    few, many = peak(FEW), peak(MANY)
    table = (MANY - FEW) * world.lora_model.spec.n_values * 4
    assert many - few < 1.5 * table
