"""The world that the program makes: sizes, files that other programs read, rows, conditions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from llgbm.generator.conditions import (
    BaseModelEncoder,
    MiniLMEncoder,
    TextEncoder,
    build_conditions,
)
from llgbm.models.ability import Ability
from llgbm.models.load import model_size
from llgbm.models.pretrain import PretrainConfig, make_tokenizer, new_model, pretrain
from llgbm.runtime import UserError
from llgbm.tasks.synthetic import SyntheticSuite
from llgbm.world import (
    PRACTISED_AT_LEAST,
    World,
    WorldConfig,
    build_base,
    describe_world,
    smoke_world,
)


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_rows_cover_every_task_once(world: World) -> None:
    rows = [row for part in ("train", "val", "test") for row in world.data.rows[part]]
    assert sorted(rows) == list(range(len(world.data.tasks)))
    assert len(set(world.data.tasks)) == len(world.data.tasks) == 20


def test_nano_is_under_a_million_and_micro_two_to_four_times_that() -> None:
    tokenizer = make_tokenizer(SyntheticSuite().vocabulary)
    sizes = {
        name: parameters(new_model(model_size(name), tokenizer, 0)) for name in ("nano", "micro")
    }
    assert sizes["nano"] < 1_000_000
    assert 2 <= sizes["micro"] / sizes["nano"] <= 4
    with pytest.raises(UserError, match="nano, micro"):
        model_size("giant")


def test_the_saved_base_is_what_the_auto_classes_load(world: World) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.base.path)
    tokenizer = AutoTokenizer.from_pretrained(world.base.path)
    assert isinstance(model, Qwen2ForCausalLM)
    for (name, ours), theirs in zip(
        world.base.model.named_parameters(), model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    fresh = make_tokenizer(world.config.suite.vocabulary)
    for task in world.data.tasks:
        for example in world.config.suite.examples(task, "train", 4, "tokens"):
            ids = tokenizer(example.prompt + example.answer)["input_ids"]
            assert ids == fresh(example.prompt + example.answer)["input_ids"]
            assert tokenizer.decode(ids) == example.prompt + example.answer
            assert len(ids) == len((example.prompt + example.answer).split())


def test_pretraining_lowers_the_loss_and_is_the_same_again(world: World) -> None:
    from llgbm.models.encoding import encode_pairs

    tokenizer = make_tokenizer(world.config.suite.vocabulary)
    pairs = [
        (e.prompt, e.answer) for e in world.config.suite.examples("copy-plain", "train", 16, "x")
    ]
    texts = encode_pairs(tokenizer, pairs)
    curves = [
        pretrain(
            new_model(model_size("nano"), tokenizer, 0),
            PretrainConfig(steps=8),
            lambda count, bare: texts,
        )
        for _ in range(2)
    ]
    assert curves[0] == curves[1]
    assert curves[0][-1] < curves[0][0]


def test_a_base_practises_what_it_cannot_do_until_its_worst_task_is_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The abilities are made up: poor in one task within and after the first round, good enough after the second."""
    toy = smoke_world(WorldConfig())
    names = [task.name for task in toy.suite.tasks]
    shares = iter([0.3, 0.2, 0.7, 0.9])
    asked: list[Any] = []
    drawn = SyntheticSuite.pretraining_example

    def measured(*_: Any) -> Ability:
        share = next(shares)
        return Ability(0.9, {**dict.fromkeys(names, 1.0), names[3]: share})

    def recorded(suite: SyntheticSuite, rng: Any, bare: bool, needs: Any = None) -> Any:
        asked.append(needs)
        return drawn(suite, rng, bare, needs)

    monkeypatch.setattr("llgbm.world.measure_ability", measured)
    monkeypatch.setattr(SyntheticSuite, "pretraining_example", recorded)
    steps = {"steps": 3, "more_steps": 2, "batch_size": 2, "target": 0.5, "rounds": 5}
    build_base(tmp_path, replace(toy, pretrain=replace(toy.pretrain, **steps)), "cpu")
    assert asked[:2] == [None] * 2 and len(asked) == 6 + 4
    for own, need in ((asked[2:6], 0.75), (asked[6:], 0.85)):
        wanted = {**dict.fromkeys(names, PRACTISED_AT_LEAST), names[3]: need}
        assert all(needs == pytest.approx(wanted) for needs in own)


def test_a_base_is_measured_from_the_middle_of_the_first_round_on() -> None:
    config = PretrainConfig(steps=100, measure_every=20, more_steps=50)
    assert list(config.measured_at) == [50, 70, 90]
    assert list(config.of_round(1).measured_at) == [20, 40]


def test_a_plan_reads_the_cache_and_writes_nothing(world: World, cache, tmp_path) -> None:
    assert set(describe_world(tmp_path, world.config).values()) == {"would be built"}
    assert not list(tmp_path.iterdir())
    assert describe_world(cache, world.config)["base"] == "cached"


@pytest.fixture(scope="module", params=["minilm", "base"])
def encoder(request: pytest.FixtureRequest, world: World) -> TextEncoder:
    return MiniLMEncoder() if request.param == "minilm" else BaseModelEncoder(world.base)


class TestEncoderContract:
    def test_shape_and_type(self, encoder: TextEncoder) -> None:
        embedded = encoder.encode(["copy plainly : apple =>", "reverse : apple lemon river =>"])
        assert embedded.shape == (2, encoder.width)
        assert embedded.dtype == torch.float32 and torch.isfinite(embedded).all()

    def test_neighbours_change_nothing(self, encoder: TextEncoder) -> None:
        texts = [
            "copy plainly : apple =>",
            "reverse the words in order of the list : apple lemon river harbor =>",
        ]
        together, alone = encoder.encode(texts), torch.cat([encoder.encode([t]) for t in texts])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("prompts", [[], [""], ["x", "  "]])
    def test_nothing_to_encode_is_refused(self, encoder: TextEncoder, prompts: list[str]) -> None:
        with pytest.raises(ValueError):
            encoder.encode(prompts)

    def test_pools_are_the_encodings_of_the_banks_prompts(
        self, encoder: TextEncoder, world: World, tmp_path
    ) -> None:
        pools = build_conditions(tmp_path, encoder, world.bank, ["nonsense", "words"])
        first = next(iter(world.bank.adapters))
        prompts = world.bank.prompts(first)
        torch.testing.assert_close(
            pools.train_ANC[0], encoder.encode(prompts["train"]), atol=1e-5, rtol=1e-4
        )
        assert not set(prompts["train"]) & set(prompts["evaluation"])


def test_world_hash_follows_what_it_depends_on() -> None:
    assert WorldConfig().hash == WorldConfig().hash
    assert WorldConfig().hash != WorldConfig(eval_examples=25).hash
