"""The generator `retrieval`: what it mixes, and that in training no task retrieves its own teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from contracts import WIDTH, make_spec, random_conditions, random_rows, random_statistics

from llgbm.generator import RetrievalConfig, RetrievalGenerator, make_generator, read_generator
from llgbm.lora import LoraBatch
from llgbm.runtime import UserError
from llgbm.training import TrainingConfig, Trial
from llgbm.world import World


def prepared(**options: Any) -> RetrievalGenerator:
    """A generator that keeps five random rows, the last two of one task."""
    spec = make_spec()
    config = RetrievalConfig(hidden=16, **options)
    generator = make_generator(config, spec, WIDTH, random_statistics(spec), 0)
    generator.prepare_training(random_rows(spec))
    assert isinstance(generator, RetrievalGenerator)
    return generator


def retrieved_rows(tokens_AV: torch.Tensor, generator: RetrievalGenerator) -> torch.Tensor:
    """Return which of the kept teachers each of the tokens depends on, [A, B]."""
    found = []
    for own_V in tokens_AV:
        (gradient,) = torch.autograd.grad(own_V.sum(), generator.teachers_BV, retain_graph=True)
        found.append((gradient != 0).any(1))
    return torch.stack(found)


@pytest.mark.parametrize(
    "options",
    [{}, {"top": 3}, {"residual": False}, {"unit": "module"}, {"unit": "matrix", "top": 2}],
    ids=str,
)
def test_in_training_no_row_of_a_batch_depends_on_a_teacher_of_its_own_task(
    world: World, config: TrainingConfig, options: dict[str, Any]
) -> None:
    trial = Trial(
        replace(config, generator=RetrievalConfig(**options)), world.data, world.lora_model
    )
    generator, batch = trial.generator, next(iter(trial.batches()))
    assert isinstance(generator, RetrievalGenerator)
    generator.teachers_BV.requires_grad_()
    tasks = [world.data.tasks[row] for row in world.data.rows["train"]]
    own_AB = torch.tensor([[tasks[row] == task for task in tasks] for row in batch["row"]])
    trained, _ = generator.training_forward(batch)
    told = retrieved_rows(trained, generator)
    assert not (told & own_AB).any() and (told.sum(1) >= 1).all()
    # Once trained, a task may retrieve itself.
    asked = retrieved_rows(generator(batch["condition"]), generator)
    assert (asked & own_AB).any()


def test_all_teachers_of_the_own_task_are_hidden_not_the_own_row_alone() -> None:
    generator = prepared(residual=False)
    rows = random_rows(make_spec())
    batch = {"condition": rows.read_conditions()[4:], "row": torch.tensor([4])}
    before = generator.training_forward(batch)[0]
    generator.teachers_BV[3:] += 100.0  # rows 3 and 4 are of one task
    assert torch.equal(generator.training_forward(batch)[0], before)
    generator.teachers_BV[2] += 1.0
    assert not torch.equal(generator.training_forward(batch)[0], before)


def test_the_nearest_alone_is_copied_and_of_two_a_mixture_is_written() -> None:
    alone = prepared(residual=False, top=1)
    rows = random_rows(make_spec())
    torch.testing.assert_close(alone(rows.read_conditions()), alone.teachers_BV)
    two = prepared(top=2)
    (weights_AB,) = two.weigh(two.read(random_conditions(7)))
    assert ((weights_AB > 0).sum(1) == 2).all()
    torch.testing.assert_close(weights_AB.sum(1), torch.ones(7))


def test_fewer_teachers_of_other_tasks_than_asked_for_are_all_that_is_mixed() -> None:
    generator = prepared(top=4)
    rows = random_rows(make_spec())
    hidden_AB = rows.task_B[:, None] == rows.task_B
    (weights_AB,) = generator.weigh(generator.read(rows.read_conditions()), hidden_AB)
    assert torch.equal(weights_AB > 0, ~hidden_AB)


def test_a_lower_temperature_is_sharper_and_it_is_learned() -> None:
    sharp, flat = (prepared(temperature=own) for own in (0.01, 10.0))
    asked = random_conditions(4)
    most = [g.weigh(g.read(asked))[0].max(1).values for g in (sharp, flat)]
    assert (most[0] > 0.9).all() and (most[1] < 0.25).all()
    assert sharp.log_temperature.requires_grad


@pytest.mark.parametrize("unit", ["module", "matrix"])
def test_each_unit_is_a_mixture_of_the_same_unit_by_weights_of_its_own(unit: str) -> None:
    generator = prepared(unit=unit, residual=False, key_width=5)
    asked, spec = random_conditions(4), make_spec()
    weights_GAB = generator.weigh(generator.read(asked))
    n_units = len(spec.pieces) if unit == "matrix" else len(spec.modules)
    assert weights_GAB.shape == (n_units, 4, 5)
    torch.testing.assert_close(weights_GAB.sum(2), torch.ones(n_units, 4))
    assert not torch.allclose(weights_GAB[0], weights_GAB[1], atol=1e-3)
    mixed = LoraBatch.unflatten(spec, generator(asked))
    teachers = LoraBatch.unflatten(spec, generator.teachers_BV)
    for number, (name, side, _) in enumerate(spec.pieces):
        weights_AB = weights_GAB[number if unit == "matrix" else number // 2]
        one, kept = ((own.a if side == "A" else own.b)[name] for own in (mixed, teachers))
        torch.testing.assert_close(one, torch.einsum("ab,b...->a...", weights_AB, kept))
    generator.log_temperature.data[1] = -9.0
    sharper = generator.weigh(generator.read(asked))
    assert torch.equal(sharper[0], weights_GAB[0]) and (sharper[1].max(1).values > 0.99).all()


def test_without_residual_nothing_is_written_beside_the_mixture() -> None:
    generator = prepared(residual=False)
    names = {name.partition(".")[0] for name, _ in generator.named_parameters()}
    assert names == {"norm", "inlet", "trunk", "projection", "log_temperature"}
    assert read_generator("retrieval,residual=false,top=2") == RetrievalConfig(
        residual=False, top=2
    )


def test_a_single_task_is_refused() -> None:
    rows = random_rows(make_spec())
    spec = make_spec()
    generator = make_generator(RetrievalConfig(), spec, WIDTH, random_statistics(spec), 0)
    with pytest.raises(UserError, match="at least two training tasks"):
        generator.prepare_training(replace(rows, tasks=("one",) * 5))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("retrieval,top=-1", "top >= 0"),
        ("retrieval,temperature=0", "temperature above 0"),
        ("retrieval,temperature=nan", "temperature above 0"),
        ("retrieval,temperature=inf", "temperature above 0"),
        ("retrieval,residual=perhaps", "must be true or false"),
        ("retrieval,unit=matrix,key_width=0", "keys of at least one number"),
        ("retrieval,key_width=8", "of a retrieval by module or matrix"),
        ("retrieval,unit=row", "there are: adapter, module, matrix"),
    ],
)
def test_options_that_cannot_be_are_a_users_mistake(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_generator(text)
