"""The adapter of all training tasks: trained on nothing else, on each as much as on any other, and found again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from llgbm.evaluation.baselines import (
    evaluate_baselines,
    from_metrics,
    known_baselines,
    multitask_lora,
    to_metrics,
)
from llgbm.evaluation.metrics import mean_by_task
from llgbm.lora import LoraBatch
from llgbm.models.scoring import adapter_losses, encode_examples
from llgbm.tasks.synthetic import SyntheticSuite
from llgbm.teachers.build import build_multitask, mixture
from llgbm.world import World


def test_the_mixture_is_of_training_tasks_in_equal_parts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Counter[tuple[str, str]] = Counter()
    draw = SyntheticSuite.examples

    def counted(self, task, purpose, count, stream, share=(0, 1)):
        asked[task, purpose] += count
        return draw(self, task, purpose, count, stream, share)

    monkeypatch.setattr(SyntheticSuite, "examples", counted)
    config, split = world.config.teachers, world.config.suite.split
    at = mixture(world.config.suite, world.base, config)
    assert set(asked) == {(task, "train") for task in split.train}
    assert len(set(asked.values())) == 1
    texts = [at(step) for step in range(config.steps)]
    assert all(len(batch) == config.examples for batch in texts)
    seen = sum(asked.values()) - config.steps * config.examples
    assert 0 <= seen < len(split.train)


def test_it_learns_its_mixture_and_is_found_again(
    world: World, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    suite, base, spec = world.config.suite, world.base, world.bank.spec
    values_V = build_multitask(cache, base, suite, world.config.teachers, spec)
    assert "cached" in capfd.readouterr().err
    assert torch.equal(values_V.to(world.data.multitask_V), world.data.multitask_V)
    examples = [
        e for task in suite.split.train for e in suite.examples(task, "train", 8, "a fresh stream")
    ]
    texts = encode_examples(base, examples)
    both = LoraBatch.unflatten(spec, torch.stack([torch.zeros_like(values_V), values_V]))
    twice = type(texts)(texts.input_ids_ST.repeat(2, 1), texts.targets_ST.repeat(2, 1))
    with torch.no_grad():
        without, with_it = adapter_losses(base.model, spec, both, twice).tolist()
    assert with_it < 0.95 * without


def test_it_is_a_baseline_for_every_task(world: World) -> None:
    rows = list(world.data.rows["test"])
    flat_AV = multitask_lora(world.data, world.lora_model, rows)
    assert flat_AV.shape == (len(rows), world.bank.spec.n_values) and torch.equal(
        flat_AV[0], flat_AV[-1]
    )
    assert "multitask_lora" in evaluate_baselines(world.data, world.lora_model)


@pytest.mark.whole
def test_baselines_are_measured_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {
        name: dict(result.metrics)
        for name, result in evaluate_baselines(world.data, world.lora_model).items()
    }
    assert known_baselines(tmp_path, world.data, world.lora_model) == measured
    monkeypatch.setattr(
        "llgbm.evaluation.baselines.measure_pieces", lambda *_: pytest.fail("measured again")
    )
    assert known_baselines(tmp_path, world.data, world.lora_model) == measured


def test_several_teachers_of_a_task_are_averaged() -> None:
    assert mean_by_task(["b", "a", "b"], torch.tensor([0.0, 0.5, 1.0])) == {"b": 0.5, "a": 0.5}


@pytest.mark.parametrize("size", ["", "nano", "base-my_nano"])
def test_metrics_of_baselines_are_read_back_as_they_were(size: str) -> None:
    baselines = {"mean_adapter": {"accuracy": 0.25}, "ridge_": {"accuracy": 0.5, "cosine": 0.1}}
    logged = {**to_metrics(baselines, size), "world/nano/base_accuracy": 0.0, "baseline/odd": 1.0}
    assert from_metrics(logged, ["nano", "base-my_nano"]) == {size: baselines}
