"""The training loop: to the last bit the same, resumable, never silently without a loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from llgbm.dataset import DeltaAugmentedDataset, ExperimentData, StepSampler, create_dataloader
from llgbm.evaluation.metrics import (
    accuracy_per_adapter,
    control_accuracies,
    error_of_mean,
    evaluate,
    evaluate_adapters,
    evaluate_generator,
    other_task,
)
from llgbm.generator.networks import Standardiser
from llgbm.runtime import UserError
from llgbm.teachers.train import TeacherConfig
from llgbm.training import TrainingConfig, Trial, train
from llgbm.world import World, WorldConfig, build_world, smoke_world

GOLDEN_TOTAL = [
    *(
        0.528688,
        0.493654,
        0.460245,
        0.36702,
        0.52431,
        0.440171,
        0.356683,
        0.335636,
        0.482836,
        0.37883,
        0.447117,
        0.298513,
        0.366725,
        0.392816,
        0.303012,
        0.375609,
        0.305555,
        0.299375,
        0.260946,
        0.349191,
    ),
]


def curve(config: TrainingConfig, world: World) -> list[Mapping[str, float]]:
    found: list[Mapping[str, float]] = []
    train(config, world.data, world.lora_model, lambda step, metrics: found.append(metrics) or True)
    return found


@pytest.mark.whole
def test_golden_curve_of_twenty_steps(tmp_path: Path, config: TrainingConfig) -> None:
    """Base and teachers take few and small steps, so that rounding on another processor does not grow."""
    toy = smoke_world(WorldConfig())
    pretrain = replace(toy.pretrain, steps=20, learning_rate=1e-3, vector_rate=1e-3)
    teachers = replace(toy.teachers, steps=10, learning_rate=5e-3, betas=TeacherConfig.betas)
    little = replace(toy, pretrain=pretrain, teachers=teachers)
    totals = [m["loss/total"] for m in curve(config, build_world(tmp_path, little, "cpu"))]
    np.testing.assert_allclose(totals, GOLDEN_TOTAL, rtol=1e-2)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(
    world: World, config: TrainingConfig
) -> None:
    first, second = curve(config, world), curve(config, world)
    assert first == second
    assert curve(replace(config, seed=1), world)[0] != first[0]


def test_evaluations_hold_the_controls_of_the_final_one(
    world: World, config: TrainingConfig
) -> None:
    seen: list[Mapping[str, float]] = []
    config = replace(config, eval_every=20)
    found = train(config, world.data, world.lora_model, lambda _, own: seen.append(own) or True)
    final = evaluate_generator(found.generator, world.data, world.lora_model, "val").metrics
    for name in ("accuracy", "accuracy_shuffled_prompts", "accuracy_nonsense_prompts"):
        assert seen[-1][f"val/{name}"] == final[name]
    trained = evaluate_generator(found.generator, world.data, world.lora_model, "train").metrics
    assert final.keys() - trained.keys() == {
        "accuracy_shuffled_prompts",
        "accuracy_nonsense_prompts",
    }


def test_training_tasks_are_measured_on_the_first_of_their_examples(
    world: World, config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = world.data, world.lora_model
    generator = train(config, data, model).generator
    monkeypatch.setattr("llgbm.evaluation.metrics.TRAIN_EXAMPLES", 3)
    for texts, count in ((1, 3), (5 * len(data.rows["train"]) - 1, 5), (10**6, data.n_examples)):
        monkeypatch.setattr("llgbm.evaluation.metrics.TRAIN_TEXTS", texts)
        for part, kept in (("train", count), ("test", data.n_examples)):
            found = evaluate_generator(generator, data, model, part)
            rows = list(data.rows[part])
            few = data.with_few_examples(kept)
            wanted = evaluate_adapters(found.adapters, few, model, rows)
            assert found.accuracy_by_task == wanted.accuracy_by_task


def test_controls_are_accuracies_from_the_prompts_of_others(
    world: World, config: TrainingConfig
) -> None:
    data, model = world.data, world.lora_model
    generator = train(config, data, model).generator
    rows = list(data.rows["train"])
    found = control_accuracies(generator, data, model, rows)
    pools = data.conditions
    asked = {
        "accuracy_shuffled_prompts": pools.evaluation_ANC[other_task(data, rows)],
        "accuracy_nonsense_prompts": torch.stack([pools.nonsense_NC] * len(rows)),
    }
    for name, condition_ANC in asked.items():
        accuracies = accuracy_per_adapter(model, generator.generate(condition_ANC), data, rows)
        assert found[name] == pytest.approx(accuracies.mean().item())


def test_the_same_seed_gives_the_same_evaluation(world: World, config: TrainingConfig) -> None:
    results = [
        evaluate_generator(
            train(config, world.data, world.lora_model).generator,
            world.data,
            world.lora_model,
            "test",
        ).metrics
        for _ in range(2)
    ]
    assert results[0] == results[1]


def test_a_resumed_run_equals_an_unbroken_one(world: World, config: TrainingConfig) -> None:
    states: list[dict] = []
    curve_whole: list[Mapping[str, float]] = []

    def keep(state: dict) -> None:
        states.append({k: _copy(v) for k, v in state.items()})

    whole = train(
        config, world.data, world.lora_model, lambda s, m: curve_whole.append(m) or True, keep
    )
    rest: list[Mapping[str, float]] = []
    resumed = train(
        config, world.data, world.lora_model, lambda s, m: rest.append(m) or True, state=states[0]
    )
    assert rest == curve_whole[10:]
    for name, value in whole.generator.state_dict().items():
        assert torch.equal(value, resumed.generator.state_dict()[name]), name


def _copy(value: object) -> object:
    import copy

    return copy.deepcopy(value)


def test_a_report_that_says_no_ends_the_run(world: World, config: TrainingConfig) -> None:
    outcome = train(config, world.data, world.lora_model, lambda step, metrics: step < 7)
    assert outcome.steps_run == 7


def test_patience_ends_a_run_that_no_longer_gets_better(
    world: World, config: TrainingConfig
) -> None:
    trial = Trial(replace(config, patience=2), world.data, world.lora_model)
    trial.step = 10
    trial.keep_if_good(0.5)
    trial.step = 20
    trial.keep_if_good(0.5)
    assert not trial.should_stop and trial.best_step == 20
    trial.step = 30
    assert trial.should_stop


def test_of_scores_within_a_standard_error_the_longest_trained_is_kept(
    world: World, config: TrainingConfig
) -> None:
    trial = Trial(config, world.data, world.lora_model)
    kept = []
    for step, (score, error) in enumerate(
        [(0.8, 0.05), (0.74, 0.3), (0.76, 0.3), (0.81, 0.02), (0.78, 0.3), (0.8, 0.0), (0.5, 0.5)]
    ):
        trial.step = step
        trial.keep_if_good(score, error)
        kept.append((trial.best_step, trial.best_score))
    assert kept == [(0, 0.8), (0, 0.8), (2, 0.76), (3, 0.81), (3, 0.81), (5, 0.8), (5, 0.8)]
    resumed = Trial(config, world.data, world.lora_model)
    resumed.restore(trial.state())
    resumed.step = 7
    resumed.keep_if_good(0.785)
    assert resumed.best_step == 5
    resumed.keep_if_good(0.795)
    assert resumed.best_step == 7


def test_the_error_of_validation_accuracy_is_that_of_a_mean_over_tasks(
    world: World, config: TrainingConfig
) -> None:
    trial = Trial(config, world.data, world.lora_model)
    found = evaluate(trial.generator, world.data, world.lora_model, "train")
    rows = list(world.data.rows["train"])
    adapters = trial.generator.generate(world.data.conditions.evaluation_ANC[rows])
    right = accuracy_per_adapter(world.lora_model, adapters, world.data, rows)
    by_task = pd.Series(right.tolist(), index=[world.data.tasks[row] for row in rows])
    wanted = by_task.groupby(level=0).mean().sem()
    assert found["train/accuracy_error"] == pytest.approx(wanted)
    assert error_of_mean(["one"], torch.tensor([0.3])) == 0.0
    twice = error_of_mean(["one", "one", "other"], torch.tensor([0.0, 1.0, 0.75]))
    assert twice == pytest.approx(pd.Series([0.5, 0.75]).sem())


def test_training_lowers_each_loss_and_uses_only_what_has_a_weight(
    world: World, config: TrainingConfig
) -> None:
    for weights, name, other in (
        ((1.0, 0.0), "loss/weight", "loss/delta"),
        ((0.0, 1.0), "loss/delta", "loss/weight"),
    ):
        found = curve(
            replace(config, lambda_weight=weights[0], lambda_delta=weights[1], steps=60), world
        )
        assert other not in found[0]
        losses = [metrics[name] for metrics in found]
        assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_held_out_tasks_change_nothing_in_training(world: World, config: TrainingConfig) -> None:
    data = world.data
    held = [*data.rows["val"], *data.rows["test"]]
    values, conditions = data.values_AV.clone(), data.conditions.train_ANC.clone()
    values[held], conditions[held] = 1e3, -1e3
    poisoned: ExperimentData = replace(
        data, values_AV=values, conditions=replace(data.conditions, train_ANC=conditions)
    )
    losses = [[m["loss/total"] for m in _curve_of(config, d, world)] for d in (data, poisoned)]
    assert losses[0] == losses[1]


def _curve_of(
    config: TrainingConfig, data: ExperimentData, world: World
) -> list[Mapping[str, float]]:
    found: list[Mapping[str, float]] = []
    train(config, data, world.lora_model, lambda step, metrics: found.append(metrics) or True)
    return found


def test_a_task_in_two_parts_is_refused(world: World) -> None:
    rows = {**world.data.rows, "val": world.data.rows["test"]}
    with pytest.raises(ValueError, match="two parts"):
        replace(world.data, rows=rows)


def test_a_rate_that_diverges_is_an_error_not_a_number(
    world: World, config: TrainingConfig
) -> None:
    with pytest.raises(
        (FloatingPointError, ValueError), match="lower the learning rate|NaN or infinite"
    ):
        train(replace(config, learning_rate=1e18, steps=60), world.data, world.lora_model)


@pytest.mark.parametrize(
    "change",
    [
        {"lambda_weight": -1.0},
        {"lambda_weight": 0.0, "lambda_delta": 0.0},
        {"lambda_delta": float("nan")},
        {"model_size": "giant"},
        {"delta_probes": "none"},
        {"delta_loss": "l3"},
        {"steps": 0},
        {"learning_rate": 0.0},
    ],
)
def test_an_impossible_setting_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(UserError):
        TrainingConfig(**change)  # type: ignore[arg-type]


def test_use_small_model_picks_the_size() -> None:
    assert TrainingConfig(use_small_model=True).model_size == "nano"
    assert TrainingConfig(use_small_model=False).model_size != "nano"


def test_every_row_comes_once_an_epoch_and_a_late_start_continues(world: World) -> None:
    whole = list(StepSampler(n_rows=12, batch_size=4, start=0, stop=6, seed=3))
    assert sorted(d.row for batch in whole[:3] for d in batch) == list(range(12))
    assert list(StepSampler(n_rows=12, batch_size=4, start=2, stop=6, seed=3)) == whole[2:]


def test_prompts_are_drawn_anew_every_step(world: World) -> None:
    rows = list(world.data.rows["train"])
    standardiser = Standardiser.fit(world.data.values_AV[rows])
    tokens = standardiser.encode(world.data.values_AV[rows])
    torch.testing.assert_close(standardiser.decode(tokens), world.data.values_AV[rows])
    dataset = DeltaAugmentedDataset(
        world.data.conditions.train_ANC[rows],
        tokens,
        world.data.loss_deltas.select(rows),
        4,
        2,
        seed=0,
    )
    first, second = list(create_dataloader(dataset, len(rows), 2))
    order = [torch.argsort(b["tokens"][:, 0]) for b in (first, second)]
    assert torch.equal(first["tokens"][order[0]], second["tokens"][order[1]])
    assert not torch.equal(first["condition"][order[0]], second["condition"][order[1]])


def test_a_checkpoint_with_the_older_name_of_a_field_is_resumed(
    world: World, config: TrainingConfig
) -> None:
    trial = Trial(replace(config, patience=2), world.data, world.lora_model)
    trial.step = 10
    trial.keep_if_good(0.5)
    state = trial.state()
    state["risen_step"] = state.pop("last_improvement")
    del state["highest"], state["least"]
    resumed = Trial(trial.config, world.data, world.lora_model)
    resumed.restore(state)
    assert resumed.last_improvement == 10
    resumed.step = 20
    resumed.keep_if_good(0.49, 0.1)
    assert resumed.best_step == 10
