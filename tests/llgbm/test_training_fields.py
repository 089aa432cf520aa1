"""A configuration's fields do what they say: dropout, accumulation, precision, and values that are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from llgbm.dataset import create_dataloader
from llgbm.generator import GeneratorConfig
from llgbm.runtime import UserError
from llgbm.training import TrainingConfig, Trial, train
from llgbm.world import World


def losses_of(config: TrainingConfig, world: World, **more: Any) -> list[float]:
    found: list[float] = []

    def report(step: int, metrics: Any) -> bool:
        found.append(metrics["loss/total"])
        return True

    train(config, world.data, world.lora_model, report, **more)
    return found


def test_a_resumed_run_with_dropout_equals_an_unbroken_one(
    world: World, config: TrainingConfig
) -> None:
    dropping = replace(config, generator=GeneratorConfig(dropout=0.3))
    unbroken = losses_of(dropping, world)
    trial = Trial(dropping, world.data, world.lora_model)
    steps = trial.remaining()
    for _ in range(10):
        next(steps)
    state = trial.state()
    torch.rand(7)  # whatever else the process draws meanwhile
    assert losses_of(dropping, world, state=state) == unbroken[10:]


def gradients(config: TrainingConfig, world: World, pieces: list[slice]) -> list[torch.Tensor]:
    """Return the clipped gradients of one step over rows of a batch of 8."""
    trial = Trial(config, world.data, world.lora_model)
    trial.optimizer.zero_grad = lambda **_: None
    loader = create_dataloader(trial.dataset, 8, 1, config.seed)
    batch = next(iter(loader))
    for rows in pieces:
        trial.advance({name: value[rows] for name, value in batch.items()})
    return [p.grad for p in trial.generator.parameters()]


def test_two_pieces_are_the_large_batch(world: World, config: TrainingConfig) -> None:
    """For the weight loss to the bit of rounding; the delta loss is a mean over a piece's own marked positions."""
    config = replace(config, lambda_weight=1.0, lambda_delta=0.0)
    whole = gradients(replace(config, batch_size=8), world, [slice(0, 8)])
    halved = replace(config, batch_size=4, gradient_accumulation=2)
    pieces = gradients(halved, world, [slice(0, 4), slice(4, 8)])
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_rate_and_weights_change_at_whole_steps_only(world: World, config: TrainingConfig) -> None:
    trial = Trial(replace(config, gradient_accumulation=2), world.data, world.lora_model)
    batches = iter(trial.batches())
    before = [p.clone() for p in trial.generator.parameters()]
    trial.advance(next(batches))
    assert trial.schedule.last_epoch == 0
    assert all(torch.equal(a, b) for a, b in zip(before, trial.generator.parameters(), strict=True))
    trial.advance(next(batches))
    assert trial.schedule.last_epoch == 1
    assert not all(
        torch.equal(a, b) for a, b in zip(before, trial.generator.parameters(), strict=True)
    )


def test_precisions_follow_one_another_in_one_process(world: World, config: TrainingConfig) -> None:
    short = replace(config, steps=2, eval_every=2)
    plain = losses_of(short, world)
    assert losses_of(replace(short, mixed_precision="bf16"), world) != plain
    assert losses_of(short, world) == plain


def test_the_environment_of_accelerate_changes_no_number(
    world: World, config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(config, steps=4, eval_every=4)
    plain = losses_of(short, world)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    assert losses_of(short, world) == plain


def test_a_score_that_is_not_a_number_never_wins(world: World, config: TrainingConfig) -> None:
    trial = Trial(config, world.data, world.lora_model)
    trial.keep_if_best(0.25)
    trial.step = 5
    trial.keep_if_best(float("nan"))
    assert (trial.best_score, trial.best_step) == (0.25, 0)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("mixed_precision", "fp8", "unknown mixed precision 'fp8'; there are: no, fp16, bf16"),
        ("weight_decay", -0.1, "weight_decay is -0.1"),
        ("weight_decay", float("nan"), "weight_decay is nan"),
        ("learning_rate", float("inf"), "learning_rate is inf"),
        ("patience", -1, "patience is -1"),
        ("steps", 2.5, "steps is 2.5; it must be a whole number"),
        ("n_probes", True, "n_probes is True"),
        ("gradient_accumulation", 7, "make steps a multiple"),
    ],
)
def test_a_value_that_nothing_can_be_made_of_is_refused(field: str, value: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        TrainingConfig(**{field: value})
