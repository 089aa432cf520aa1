"""Mixtures of adapters, their deltas, and what is retrieved or merged by deltas that are predicted from prompts."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

from llgbm.dataset import ExperimentData
from llgbm.delta import DeltaTable
from llgbm.evaluation import baselines
from llgbm.evaluation.algebra import (
    WAYS,
    DeltaRegression,
    draw_by_kinship,
    kinship,
    measure_mixtures,
    mix_teachers,
    nearest_weights,
    nonnegative_weights,
    similarity_weights,
)
from llgbm.evaluation.metrics import evaluate_adapters, mean_delta, teacher_means
from llgbm.functional import FunctionalLoRA
from llgbm.lora import LoraBatch, LoraSpec
from llgbm.lora.adapters import adapter_config, save_adapter
from llgbm.lora.mixtures import sum_of_updates
from llgbm.models.load import Base
from llgbm.models.reading import Question, Questions
from llgbm.world import World

IDS = torch.tensor([[3, 9, 4, 12, 7], [5, 5, 8, 2, 6]])


def updates(batch: LoraBatch) -> dict[str, torch.Tensor]:
    return {name: batch.b[name] @ batch.a[name] for name in batch.a}


def singles(batch: LoraBatch) -> list[LoraBatch]:
    return [batch.select([index]) for index in range(batch.n_adapters)]


@pytest.mark.parametrize("weights", [[0.3, -1.2, 2.0], [0.0, 0.0, 1.0], [1 / 3, 1 / 3, 1 / 3]])
def test_the_sum_is_that_of_formed_updates(weights: list[float], tiny_adapters: LoraBatch) -> None:
    found = updates(sum_of_updates(singles(tiny_adapters), weights))
    for name, formed in updates(tiny_adapters).items():
        wanted = sum(w * own for w, own in zip(weights, formed, strict=True))
        torch.testing.assert_close(found[name][0], wanted, rtol=1e-5, atol=1e-5)


def test_each_adapter_of_a_batch_may_have_its_own_weight(tiny_adapters: LoraBatch) -> None:
    own = torch.tensor([0.2, -1.0, 3.0])
    found = updates(sum_of_updates([tiny_adapters, tiny_adapters], [own, 1.0]))
    for name, formed in updates(tiny_adapters).items():
        torch.testing.assert_close(found[name], (1 + own)[:, None, None] * formed)


def test_a_part_without_a_module_adds_nothing_there(tiny_adapters: LoraBatch) -> None:
    name = next(iter(tiny_adapters.a))
    less = LoraBatch({name: tiny_adapters.a[name]}, {name: tiny_adapters.b[name]})
    found = updates(sum_of_updates([tiny_adapters, less], [1.0, 1.0]))
    for module, formed in updates(tiny_adapters).items():
        torch.testing.assert_close(found[module], (1 + (module == name)) * formed)
    for parts, weights in (([], []), ([tiny_adapters], [1.0, 1.0])):
        with pytest.raises(ValueError, match="each needs one"):
            sum_of_updates(parts, weights)


def wide(base: Base, spec: LoraSpec) -> FunctionalLoRA:
    return FunctionalLoRA(base.model, 2 * spec.rank, 2 * spec.alpha, spec.target_modules)


@pytest.mark.parametrize("share", [0.3, 1.5])
def test_logits_are_those_of_pefts_cat(
    tiny_base: Base, tiny_spec: LoraSpec, tiny_adapters: LoraBatch, tmp_path: Path, share: float
) -> None:
    from peft import PeftModel

    left, right, _ = tiny_adapters.to_state_dicts()
    for name, state in (("left", left), ("right", right)):
        save_adapter(tmp_path / name, state, adapter_config(tiny_spec, tiny_base.path))
    plain = copy.deepcopy(tiny_base.model)
    peft = PeftModel.from_pretrained(plain, tmp_path / "left", adapter_name="left")
    peft.load_adapter(tmp_path / "right", adapter_name="right")
    shares = [1 - share, share]
    peft.base_model.add_weighted_adapter(["left", "right"], shares, "mixed", "cat")
    peft.set_adapter("mixed")
    mixed = sum_of_updates(singles(tiny_adapters)[:2], shares)
    found = wide(tiny_base, tiny_spec).forward_with_lora(mixed, IDS)[0]
    with torch.no_grad():
        torch.testing.assert_close(found, peft(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_an_adapter_mixed_with_itself_is_itself(
    tiny_base: Base, tiny_spec: LoraSpec, tiny_adapters: LoraBatch, share: float
) -> None:
    mixed = sum_of_updates([tiny_adapters, tiny_adapters], [1 - share, share])
    alone = FunctionalLoRA(
        tiny_base.model, tiny_spec.rank, tiny_spec.alpha, tiny_spec.target_modules
    ).forward_with_lora(tiny_adapters, IDS)
    found = wide(tiny_base, tiny_spec).forward_with_lora(mixed, IDS)
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_deltas_at_the_ends_are_the_teachers(world: World, way: str) -> None:
    pairs = [(0, 3), (4, 1)]
    ends = measure_mixtures(world.data, world.lora_model, pairs, (0.0, 1.0), way)
    for end, side in zip(ends, (0, 1), strict=True):
        assert end.error_A.max() < 1e-4 and end.cosine_A.min() > 1 - 1e-5
        rows = [pair[side] for pair in pairs]
        batch = mix_teachers(world.data, world.lora_model, pairs, float(side), way)
        found = mean_delta(world.lora_model, batch, world.data.shared_deltas, rows)
        wanted = teacher_means(world.data.shared_deltas, rows)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_results_of_a_mixture_are_what_their_names_say(world: World, share: float) -> None:
    data, pairs = world.data, [(0, 3), (4, 1), (2, 5)]
    (found,) = measure_mixtures(data, world.lora_model, pairs, (share,), "factors")
    left, right = [0, 4, 2], [3, 1, 5]
    values = (1 - share) * data.teachers(left) + share * data.teachers(right)
    batch = LoraBatch.unflatten(world.lora_model.spec, values)
    delta = mean_delta(world.lora_model, batch, data.shared_deltas, left)
    own, theirs = (data.shared_deltas.mean_AD[rows] for rows in (left, right))
    mean = (1 - share) * own + share * theirs
    torch.testing.assert_close(found.cosine_A, cosine_similarity(delta, mean))
    torch.testing.assert_close(found.control_A, cosine_similarity(delta, mean[[2, 0, 1]]))
    torch.testing.assert_close(found.error_A, (delta - mean).norm(dim=1) / mean.norm(dim=1))
    nearer = torch.stack([cosine_similarity(delta, one) for one in (own, theirs)]).amax(0)
    torch.testing.assert_close(found.parent_A, nearer)
    for side, rows in enumerate((left, right)):
        scored = evaluate_adapters(batch, data, world.lora_model, rows).metrics["accuracy"]
        assert found.accuracies_A2[:, side].mean().item() == pytest.approx(scored)
    assert found.means["share"] == share and found.means["cosine"] < 1


def test_a_mixture_without_a_control_or_by_an_unknown_way_is_refused(world: World) -> None:
    for pairs, way in (([(0, 1)], "updates"), ([(0, 1), (1, 2)], "linear")):
        with pytest.raises(ValueError, match="two or more"):
            measure_mixtures(world.data, world.lora_model, pairs, (0.5,), way)


def test_pairs_are_of_training_tasks_and_of_their_kind(world: World) -> None:
    data = world.data
    found = draw_by_kinship(data, 3)
    assert set(found) == {"same family", "same form", "unrelated"}
    for kind, pairs in found.items():
        assert 2 <= len(pairs) <= 3 and len(set(pairs)) == len(pairs)
        for first, second in pairs:
            assert {first, second} <= set(data.rows["train"])
            parts = [set(data.tasks[row].split("-")) for row in (first, second)]
            assert bool(parts[0] & parts[1]) == (kind != "unrelated")
    assert draw_by_kinship(data, 3) == found != draw_by_kinship(data, 3, seed=1)
    assert kinship(data, 0, 0) is None


def test_a_linear_delta_is_predicted(world: World) -> None:
    """The regression finds the tasks again where Δ is linear in the prompts and is asked of the same prompts."""
    data = world.data
    conditions = replace(data.prompt_pools, evaluation_ANC=data.prompt_pools.train_ANC)
    generator = torch.Generator().manual_seed(0)
    shape = data.shared_deltas.delta_APQD.shape
    linear = torch.randn(conditions.train_ANC.shape[-1], shape[-1], generator=generator)
    deltas = (conditions.train_ANC.mean(1) @ linear)[:, None, None].expand(shape)
    table = DeltaTable(data.shared_deltas.probes, data.shared_deltas.base_APQD, deltas)
    made = replace(data, sentences=conditions, shared_deltas=table)
    train = list(data.rows["train"])
    known = teacher_means(table, train)
    predicted = DeltaRegression.fit(made).predict(made, train)
    assert cosine_similarity(predicted, known).min() > 0.99
    assert torch.equal(nearest_weights(predicted, known), torch.eye(len(train)))
    found = baselines.delta_nearest(made, world.lora_model, train)
    assert torch.equal(found, data.teachers(train))


def test_weights_of_teachers() -> None:
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(5, 16, generator=generator)
    wanted = torch.stack([0.3 * known[0] + 0.5 * known[3], 2 * known[4]])
    parts = torch.tensor([[0.3, 0, 0, 0.5, 0], [0, 0, 0, 0, 2.0]])
    torch.testing.assert_close(nonnegative_weights(wanted, known), parts, rtol=1e-4, atol=1e-5)
    assert nonnegative_weights(-known[:1], known[:1]).item() == 0
    assert nearest_weights(wanted, known).argmax(1).tolist() == [3, 4]
    soft = similarity_weights(wanted, known, 0.1)
    torch.testing.assert_close(soft.sum(1), torch.ones(2))
    cosines = cosine_similarity(wanted[:, None], known[None], dim=-1)
    torch.testing.assert_close(soft, (cosines / 0.1).exp() / (cosines / 0.1).exp().sum(1, True))


def test_merged_teachers_are_the_weighted_sums(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "AT_ONCE", 5)
    train = list(world.data.rows["train"])
    weights = torch.rand(3, len(train), generator=torch.Generator().manual_seed(0))
    wanted = torch.einsum("aw,wv->av", weights, world.data.teachers(train))
    torch.testing.assert_close(baselines.weighted_teachers(world.data, weights), wanted)


def test_baselines_measured_before_a_group_was_added_are_found(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def counted(data: object, lora_model: object, pieces: list[baselines.Piece]) -> dict:
        made.extend(name for _, group in pieces for name in baselines.GROUPS[group])
        return {
            (part, group): {name: {"accuracy": 0.5} for name in baselines.GROUPS[group]}
            for part, group in pieces
        }

    monkeypatch.setattr(baselines, "measure_pieces", counted)
    every = baselines.GROUPS
    monkeypatch.setattr(baselines, "GROUPS", {"": every[""]})
    old = baselines.known_baselines(tmp_path, world.data, world.lora_model)
    assert made == list(old) == list(every[""])
    made.clear()
    monkeypatch.setattr(baselines, "GROUPS", every)
    assert list(baselines.known_baselines(tmp_path, world.data, world.lora_model)) == list(
        baselines.BASELINES
    )
    assert made == ["best_single", "delta_nearest", "delta_merge", "delta_nnls"]


@pytest.mark.whole
def test_baselines_of_two_parts_at_once_are_those_of_each(world: World) -> None:
    pieces = [(part, group) for part in ("test", "val") for group in baselines.GROUPS]
    found = baselines.measure_pieces(world.data, world.lora_model, pieces)
    assert list(found) == pieces
    for part, group in pieces:
        alone = baselines.measure_group(world.data, world.lora_model, part, group)
        assert found[part, group].keys() == alone.keys() == baselines.GROUPS[group].keys()
        for name, numbers in alone.items():
            assert found[part, group][name] == pytest.approx(numbers, abs=1e-5)
    every = baselines.evaluate_baselines(world.data, world.lora_model, "val")
    told = {name: own for group in baselines.GROUPS for name, own in found["val", group].items()}
    assert every.keys() == told.keys()
    assert all(every[name].metrics == pytest.approx(told[name], abs=1e-5) for name in told)


def test_the_best_single_teacher_is_the_best_of_all_on_all_examples(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = world.data, world.lora_model
    train, val = list(data.rows["train"]), list(data.rows["val"])
    # Teachers that are right in all examples of one validation task, in the first half of them, and in none.
    right = torch.tensor([[0.0] * 4, [1.0, 1.0, 0.0, 0.0], [1.0] * 4, *[[0.0] * 4] * len(train)])
    seen: list[tuple[int, int]] = []

    def measured(_: object, batch: LoraBatch, own: ExperimentData, rows: list[int]) -> torch.Tensor:
        values = batch.flatten(model.spec)
        row = next(i for i in train if torch.equal(values[0], data.teachers([i])[0]))
        seen.append((row, own.n_examples))
        assert rows == val and torch.equal(values, data.teachers([row]))
        return right[train.index(row), : own.n_examples].mean()[None]

    monkeypatch.setattr(baselines, "accuracy_per_adapter", measured)
    monkeypatch.setattr(baselines, "FEW_EXAMPLES", 2)
    monkeypatch.setattr(baselines, "FINALISTS", 2)
    found = baselines.best_single(data, model, data.rows["test"])
    wanted = data.teachers([train[2]]).expand(len(data.rows["test"]), -1)
    assert torch.equal(found, wanted)
    finalists = [(train[1], data.n_examples), (train[2], data.n_examples)]
    assert seen == [*((row, 2) for row in train), *finalists]


def test_few_examples_are_the_first_of_each_task(world: World) -> None:
    data = world.data
    few, rows = data.with_few_examples(2), [3, 0]
    every = data.examples_of(rows).input_ids_ST.unflatten(0, (2, -1))
    found = few.examples_of(rows).input_ids_ST
    assert few.n_examples == 2
    assert torch.equal(found, every[:, :2, : found.shape[1]].flatten(0, 1))
    assert not every[:, :2, found.shape[1] :].ne(every[0, 0, -1]).any()
    assert data.with_few_examples(1000).n_examples == data.n_examples
    asked = tuple(Question("text", "", str(i), "") for i in range(len(data.examples)))
    told = replace(data, questions=Questions(None, asked)).with_few_examples(2).questions
    assert told is not None
    n = data.n_examples
    assert told.items[:4] == (asked[0], asked[1], asked[n], asked[n + 1])
    assert len(told.items) == 2 * len(data.tasks)
