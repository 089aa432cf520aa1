"""The whole way on a GPU: a world is built there, and everything that a trial does runs there (marked `gpu`)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llgbm.delta import compute_adapter_delta, compute_base_activation
from llgbm.evaluation.baselines import evaluate_baselines
from llgbm.evaluation.levels import evaluate_levels
from llgbm.evaluation.metrics import evaluate_generator
from llgbm.generator import GENERATORS, OF_TOKENS, generator_config
from llgbm.probes import create_generic_probes
from llgbm.terms.registry import built_in_terms
from llgbm.training import TrainingConfig, train
from llgbm.world import World, WorldConfig, build_world, smoke_world

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def on_cpu(folder: Path) -> World:
    return build_world(folder, smoke_world(WorldConfig(encoder="base")), "cpu")


@pytest.fixture(scope="module")
def on_gpu(folder: Path, on_cpu: World) -> World:
    """The same world, read from the cache onto the GPU."""
    return build_world(folder, on_cpu.config, "cuda")


def short(**settings: object) -> TrainingConfig:
    return replace(TrainingConfig(steps=6, batch_size=4, eval_every=3, n_prompts=4), **settings)


def test_a_world_is_built_on_a_gpu(tmp_path: Path) -> None:
    world = build_world(tmp_path, smoke_world(WorldConfig(encoder="base")), "cuda")
    assert world.data.device.type == world.base.model.device.type == "cuda"
    found = evaluate_baselines(world.data, world.lora_model, "test")
    assert found["teacher"].metrics["accuracy"] > found["base"].metrics["accuracy"]


def test_losses_and_metrics_are_those_of_the_cpu(on_cpu: World, on_gpu: World) -> None:
    found = []
    for world in (on_cpu, on_gpu):
        losses: list[float] = []
        outcome = train(
            short(),
            world.data,
            world.lora_model,
            lambda step, metrics, kept=losses: kept.append(metrics["loss/total"]) or True,
        )
        result = evaluate_generator(outcome.generator, world.data, world.lora_model, "test")
        found.append((losses, result.metrics))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-2)
    assert found[1][1] == pytest.approx(found[0][1], rel=0.1, abs=0.02)
    assert len(on_gpu.lora_model.graphs.recorded) == 1


@pytest.mark.parametrize("name", [*GENERATORS, *OF_TOKENS])
def test_every_generator_trains_and_is_measured(on_gpu: World, name: str) -> None:
    tokens = {"prompt_tokens": 4} if name in OF_TOKENS else {}
    config = replace(on_gpu.config, **tokens)
    world = build_world(on_gpu.data.cache, config, "cuda") if tokens else on_gpu
    training = short(generator=generator_config(name), **tokens)
    outcome = train(training, world.data, world.lora_model)
    result = evaluate_generator(outcome.generator, world.data, world.lora_model, "val")
    assert all(math.isfinite(value) for value in result.metrics.values())


@pytest.mark.parametrize("name", sorted(built_in_terms()))
def test_every_term_trains(on_gpu: World, name: str) -> None:
    own = {"weight": {"lambda_weight": 1.0}, "delta": {"lambda_delta": 1.0}}
    settings = {"lambda_weight": 0.0, "lambda_delta": 0.0} | own.get(name, {"terms": {name: 1.0}})
    outcome = train(short(**settings), on_gpu.data, on_gpu.lora_model)
    assert outcome.steps_run == 6


def test_mixtures_levels_and_single_deltas_are_measured(on_gpu: World, on_cpu: World) -> None:
    outcome = train(short(mixup=0.5), on_gpu.data, on_gpu.lora_model)
    assert evaluate_levels(outcome.generator, on_gpu.lora_model, on_gpu.data.levels)
    probes = create_generic_probes()
    deltas = []
    for world in (on_cpu, on_gpu):
        adapter = world.bank.load().to_state_dicts()[0]
        activation = compute_base_activation(world.base, probes)
        found = compute_adapter_delta(world.base, world.bank.spec, adapter, probes, activation)
        deltas.append(found.cpu())
    torch.testing.assert_close(deltas[1], deltas[0], rtol=1e-3, atol=1e-3)
