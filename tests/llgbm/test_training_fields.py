"""A configuration's fields do what they say: dropout, accumulation, precision, and values that are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from llgbm.dataset import DeltaAugmentedDataset, Draw, create_dataloader
from llgbm.generator import GeneratorConfig, LatentConfig
from llgbm.runtime import UserError
from llgbm.system.accumulation import weighted_pieces
from llgbm.terms.registry import built_in_terms
from llgbm.training import TrainingConfig, Trial, train
from llgbm.world import World


def losses_of(config: TrainingConfig, world: World, **more: Any) -> list[float]:
    found: list[float] = []

    def report(step: int, metrics: Any) -> bool:
        found.append(metrics["loss/total"])
        return True

    train(config, world.data, world.lora_model, report, **more)
    return found


@pytest.mark.parametrize("name", ["default", "latent", "retrieval"])
def test_a_resumed_run_with_dropout_equals_an_unbroken_one(
    world: World, config: TrainingConfig, name: str
) -> None:
    generator = GeneratorConfig(name, dropout=0.3)
    dropping = replace(config, steps=8, eval_every=4, generator=generator)
    unbroken = losses_of(dropping, world)
    trial = Trial(dropping, world.data, world.lora_model)
    steps = trial.remaining()
    for _ in range(4):
        next(steps)
    state = trial.state()
    torch.rand(7)  # whatever else the process draws meanwhile
    assert losses_of(dropping, world, state=state) == unbroken[4:]


def gradients(config: TrainingConfig, world: World, n_pieces: int) -> list[torch.Tensor]:
    """Return the gradients, before clipping, of one step over 8 rows in equal pieces."""
    per_piece = 8 // n_pieces
    own = replace(config, batch_size=per_piece, gradient_accumulation=n_pieces)
    trial = Trial(own, world.data, world.lora_model)
    trial.optimizer.zero_grad = lambda **_: None
    trial.accelerator.clip_grad_norm_ = lambda *_: None
    loader = create_dataloader(trial.dataset, 8, 1, config.seed)
    batch = next(iter(loader))
    # Texts of one mark in the first half: the pieces average over unequal numbers of marked positions.
    batch["valid"][:4, :, 1:] = False
    rows = [slice(at, at + per_piece) for at in range(0, 8, per_piece)]
    trial.batches = lambda: [{k: v[own] for k, v in batch.items()} for own in rows]
    steps = trial.remaining()
    for _ in rows:
        next(steps)
    return [p.grad for p in trial.generator.parameters()]


@pytest.mark.parametrize("reading", ["per_probe", "mean"])
@pytest.mark.parametrize("lambdas", [(1.0, 0.0), (0.0, 1.0), (0.3, 1.0)])
def test_pieces_are_the_large_batch(
    world: World, config: TrainingConfig, lambdas: tuple[float, float], reading: str
) -> None:
    weight, delta = lambdas
    config = replace(config, lambda_weight=weight, lambda_delta=delta, delta_reading=reading)
    whole = gradients(config, world, 1)
    for n_pieces in (2, 4):
        for one, other in zip(whole, gradients(config, world, n_pieces), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_pieces_are_the_large_batch_for_every_term(world: World, config: TrainingConfig) -> None:
    # A generator with a part of the loss of its own.
    config = replace(
        config, terms=dict.fromkeys(built_in_terms(), 1.0), generator=LatentConfig(beta=1.0)
    )
    pairs = zip(gradients(config, world, 1), gradients(config, world, 2), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_piece_counts_for_as_much_as_it_holds() -> None:
    rows = [[1.0, 5.0], [3.0], [2.0], [4.0, 6.0, 9.0]]
    found = [
        factors["mean"] * sum(row) / len(row) / 2
        for row, factors in weighted_pieces(rows, 2, lambda row: {"mean": len(row)})
        if factors
    ]
    assert found[0] + found[1] == pytest.approx(3) and found[2] + found[3] == pytest.approx(5.25)
    with pytest.raises(ValueError, match="no piece holds a value of mean"):
        next(weighted_pieces([[]], 2, lambda row: {"mean": len(row)}))


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
    trial.keep_if_good(0.25)
    trial.step = 5
    trial.keep_if_good(float("nan"))
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


def test_teachers_of_one_task_draw_prompts_and_probes_of_their_own(world: World) -> None:
    row = world.data.rows["train"][0]
    pools = world.data.conditions.train_ANC[[row, row]]
    deltas = world.data.loss_deltas.select([row, row])
    dataset = DeltaAugmentedDataset(pools, world.data.values_AV[[row, row]], deltas, 4, 2, seed=0)
    drawn = [[dataset[Draw(teacher, step)] for step in range(4)] for teacher in (0, 1)]
    for name in ("condition", "probes"):
        assert any(not torch.equal(a[name], b[name]) for a, b in zip(*drawn, strict=True))
    again = dataset[Draw(1, 3)]
    assert torch.equal(again["condition"], drawn[1][3]["condition"])


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_teacher_and_student_are_read_by_one_instrument(
    world: World, config: TrainingConfig, precision: str
) -> None:
    """A student that predicts its teacher's tokens has no loss, whatever the precision."""
    own = replace(config, lambda_weight=0.0, lambda_delta=1.0, mixed_precision=precision)
    trial = Trial(own, world.data, world.lora_model)
    batch = next(iter(trial.batches()))
    nothing = 0 * sum(p.sum() for p in trial.generator.parameters())
    trial.generator.forward = lambda _: batch["tokens"] + nothing
    assert trial.advance(batch)["loss/total"] == pytest.approx(0, abs=2e-6)


def test_the_generator_that_is_scored_is_the_one_that_is_registered(
    world: World, config: TrainingConfig
) -> None:
    own = replace(config, steps=2, eval_every=2, mixed_precision="bf16")
    outcome = train(own, world.data, world.lora_model)
    fresh = Trial(config, world.data, world.lora_model).generator.eval()
    fresh.load_state_dict(outcome.generator.state_dict())
    pools = world.data.conditions.train_ANC[:2]
    with torch.no_grad():
        assert torch.equal(outcome.generator(pools), fresh(pools))
