"""Evaluation in chunks: the numbers of one pass over all adapters, and no tensor that grows with their number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llgbm.dataset import ExperimentData
from llgbm.evaluation import metrics
from llgbm.evaluation.metrics import (
    evaluate,
    evaluate_generator,
    inner_products,
    nearest_teacher_distance,
)
from llgbm.functional import FunctionalLoRA
from llgbm.generator import make_generator
from llgbm.generator.networks import GeneratorConfig, LoraGenerator, Standardiser
from llgbm.lora.adapters import LoraBatch
from llgbm.lora.geometry import delta_w_inner
from llgbm.world import World

FEW, MANY = 4, 32
Measure = Callable[[LoraGenerator, ExperimentData, FunctionalLoRA, str], object]


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


def test_the_nearest_teacher_is_as_far_as_the_formed_matrices_say(
    world: World, generator: LoraGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "AT_ONCE", 3)
    data, spec = world.data, world.lora_model.spec
    rows = list(data.rows["test"])
    adapters = generator.generate(data.conditions.evaluation_ANC[rows])

    def formed(batch: LoraBatch) -> Tensor:
        return torch.cat([(batch.b[name] @ a).flatten(1) for name, a in batch.a.items()], dim=1)

    teachers = formed(LoraBatch.unflatten(spec, data.teachers(list(data.rows["train"]))))
    wanted = (torch.cdist(formed(adapters), teachers) / teachers.norm(dim=1)).amin(1)
    found = nearest_teacher_distance(adapters, data, world.lora_model)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


class Sizes(TorchDispatchMode):
    """Bytes of every storage that operations make while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if is_tensor(t)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in filter(is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given:
                self.found.append(storage.nbytes())
        return out


def sizes(measure: Measure, generator: LoraGenerator, world: World, count: int) -> list[int]:
    """Bytes of what an evaluation of so many adapters makes, the largest first."""
    data = with_rows(world.data, count)
    with Sizes() as made:
        measure(generator, data, world.lora_model, "test")
    return sorted(made.found, reverse=True)


def test_nothing_that_is_made_grows_with_the_number_of_adapters(
    world: World, generator: LoraGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "AT_ONCE", FEW)
    few, many = (sizes(evaluate, generator, world, count) for count in (FEW, MANY))
    assert many[0] == few[0]


@pytest.mark.whole
def test_a_full_evaluation_makes_the_generated_adapters_and_no_other_table(
    world: World, generator: LoraGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "AT_ONCE", FEW)
    table = MANY * world.lora_model.spec.n_values * 4
    made = sizes(evaluate_generator, generator, world, MANY)
    assert [size for size in made if size >= table] == [table]
