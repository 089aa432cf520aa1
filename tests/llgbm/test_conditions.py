"""Conditions of a generator: states of tokens, a varied number of prompts, descriptions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llgbm.dataset import DeltaAugmentedDataset, Draw
from llgbm.evaluation.baselines import nearest_teacher
from llgbm.evaluation.metrics import evaluate_generator
from llgbm.generator import generator_config, make_generator
from llgbm.generator.conditioning import Conditioning, level_conditions
from llgbm.generator.conditions import (
    BaseModelEncoder,
    TextEncoder,
    build_conditions,
    embed_texts,
    encode_texts,
)
from llgbm.generator.networks import LoraGenerator, Standardiser
from llgbm.generator.pooling import mean_of_rows, rows_of
from llgbm.models.encoding import prompt_tokens
from llgbm.runtime import UserError
from llgbm.tasks.synthetic import PARAPHRASES
from llgbm.training import TrainingConfig, Trial, train
from llgbm.world import World, WorldConfig, gather_data

PROMPTS = [
    "give the last word in brackets : apple lemon =>",
    "reverse : apple =>",
    "give the last word : river stone cloud =>",
]
TOKENS = Conditioning("prompts", 12)


@pytest.fixture(scope="module")
def worlds(cache: Path, world: World) -> Any:
    """Return the toy world with other conditions; base, bank and deltas are those of the shared one."""

    def make(how: Conditioning) -> World:
        config = replace(world.config, encoder="base", condition=how.kind, prompt_tokens=how.tokens)
        return replace(
            world, config=config, data=gather_data(cache, config, world.base, world.bank)
        )

    return make


def test_states_of_the_base_are_those_of_transformers(world: World) -> None:
    """Each prompt alone through the library's own model: its last hidden states, cut to the last tokens."""
    model, tokenizer = world.base.model, world.base.tokenizer
    found = encode_texts(BaseModelEncoder(world.base), PROMPTS, 8)
    lengths = []
    for row, ids in enumerate(prompt_tokens(tokenizer, PROMPTS)):
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_hidden_states=True)
        wanted = output.hidden_states[-1][0, -8:]
        torch.testing.assert_close(found[row, : len(wanted)], wanted, atol=1e-5, rtol=1e-4)
        assert found[row, len(wanted) :].isnan().all()
        lengths.append(len(ids))
    assert min(lengths) < 8 < max(lengths)
    assert found.shape == (3, 8, world.base.model.config.hidden_size)


def test_the_mean_of_the_bases_states_is_its_sentence_form(world: World) -> None:
    encoder = BaseModelEncoder(world.base)
    states = encode_texts(encoder, PROMPTS, 99)
    means = mean_of_rows(*rows_of(states))
    torch.testing.assert_close(means, encoder.encode(PROMPTS), atol=1e-5, rtol=1e-4)


def test_what_is_cut_is_said(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = BaseModelEncoder(world.base)
    encode_texts(encoder, PROMPTS, 8)
    assert "2 of 3 texts have more than 8 tokens: their last 8 are read" in capsys.readouterr().err
    encode_texts(encoder, PROMPTS, 99)
    assert "more than" not in capsys.readouterr().err


class Odd(TextEncoder):
    """Encoder of one vector a prompt, which may be no number."""

    name, hash, width = "odd", "odd-1", 2

    def __init__(self, value: float = 1.0) -> None:
        self.value = value

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return torch.full((len(prompts), 2), self.value)


class OddTokens(Odd):
    def token_states(self, prompts: Sequence[str]) -> Iterator[Tensor]:
        return (torch.full((2, 2), self.value) for _ in prompts)


def test_an_encoder_without_states_and_values_that_are_none_are_refused() -> None:
    with pytest.raises(UserError, match="odd gives one vector a prompt.*leave --prompt-tokens out"):
        encode_texts(Odd(), ["a"], 4)
    for encoder, tokens in ((Odd(torch.nan), 0), (OddTokens(torch.inf), 2)):
        with pytest.raises(UserError, match="NaN or infinite"):
            encode_texts(encoder, ["a"], tokens)


def test_conditions_of_tokens_are_kept_apart_from_vectors(world: World, tmp_path: Path) -> None:
    encoder = BaseModelEncoder(world.base)
    for tokens in (0, 4, 6):
        for _ in range(2):
            pools = build_conditions(tmp_path, encoder, world.bank, ["a", "b"], tokens)
            texts = embed_texts(tmp_path, encoder, PROMPTS, tokens)
        first = world.bank.prompts(next(iter(world.bank.adapters)))["train"]
        torch.testing.assert_close(
            pools.train_ANC[0],
            encode_texts(encoder, first, tokens),
            equal_nan=True,
            atol=1e-5,
            rtol=1e-4,
        )
        assert torch.equal(texts.isnan(), encode_texts(encoder, PROMPTS, tokens).isnan())
    assert len([f for f in (tmp_path / "conditions").iterdir() if f.is_dir()]) == 3


@pytest.mark.parametrize(
    "options",
    [{"pooling": "mean"}, {"pooling": "attention"}, {"name": "hyperconv_tokens", "length": 12}],
    ids=str,
)
@pytest.mark.parametrize("how", [TOKENS, Conditioning("both", 12)], ids=str)
def test_a_generator_trains_on_states_and_prompts_in_any_order_are_one(
    worlds: Any, config: TrainingConfig, options: dict, how: Conditioning
) -> None:
    own = worlds(how)
    config = replace(
        config,
        generator=generator_config(**({"hidden": 16} if len(options) == 1 else {}), **options),
        condition=how.kind,
        prompt_tokens=how.tokens,
        n_prompts_min=1,
        lambda_delta=0.0,
        lambda_weight=1.0,
        steps=3,
        eval_every=3,
    )
    outcome = train(config, own.data, own.lora_model)
    asked = own.data.conditions.evaluation_ANC[:3]
    order = torch.randperm(asked.shape[1], generator=torch.Generator().manual_seed(0))
    spec = own.bank.spec
    torch.testing.assert_close(
        outcome.generator.generate(asked[:, order]).flatten(spec),
        outcome.generator.generate(asked).flatten(spec),
        atol=1e-5,
        rtol=1e-4,
    )


def test_a_description_is_the_condition(worlds: Any, config: TrainingConfig) -> None:
    own = worlds(Conditioning("description"))
    data, suite = own.data, own.config.suite
    encoder = BaseModelEncoder(own.base)
    told = encoder.encode([suite.description(task) for task in data.tasks])
    for pool in (data.conditions.train_ANC, data.conditions.evaluation_ANC):
        torch.testing.assert_close(pool, told[:, None], atol=1e-5, rtol=1e-4)
    short = replace(config, condition="description", lambda_delta=0.0, steps=2, eval_every=2)
    generator = train(short, data, own.lora_model).generator
    metrics = evaluate_generator(generator, data, own.lora_model, "test").metrics
    assert {"accuracy", "accuracy_nonsense_prompts", "accuracy_shuffled_prompts"} <= set(metrics)
    level = level_conditions(
        Path(own.base.path).parents[1], encoder, suite, PARAPHRASES, 2, Conditioning("description")
    )
    unseen = [suite.description(task, PARAPHRASES) for task in suite.levels[0].tasks]
    assert suite.levels[0].name == PARAPHRASES and level.shape == (len(unseen), 1, encoder.width)
    torch.testing.assert_close(level[:, 0], encoder.encode(unseen), atol=1e-5, rtol=1e-4)
    assert not set(unseen) & {suite.description(task) for task in suite.levels[0].tasks}


def test_beside_prompts_a_description_follows_every_vector(worlds: Any) -> None:
    own, plain = worlds(Conditioning("both")), worlds(Conditioning())
    width, suite = plain.data.conditions.train_ANC.shape[-1], own.config.suite
    both = own.data.conditions
    assert torch.equal(both.train_ANC[..., :width], plain.data.conditions.train_ANC)
    assert torch.equal(both.nonsense_NC[..., :width], plain.data.conditions.nonsense_NC)
    told = BaseModelEncoder(own.base).encode([suite.description(t) for t in own.data.tasks])
    torch.testing.assert_close(
        both.evaluation_ANC[..., width:],
        told[:, None].expand(-1, both.evaluation_ANC.shape[1], -1),
        atol=1e-5,
        rtol=1e-4,
    )
    assert len({own.data.hash, plain.data.hash, worlds(TOKENS).data.hash}) == 3
    states = worlds(Conditioning("both", 12)).data.conditions.train_ANC
    assert torch.equal(states.isnan().any(-1), states.isnan().all(-1)) and states.isnan().any()


def test_baselines_read_a_vector_of_each_prompt_whatever_generators_read(worlds: Any) -> None:
    plain = worlds(Conditioning())
    rows = list(plain.data.rows["test"])
    wanted = nearest_teacher(plain.data, plain.lora_model, rows)
    for how in (TOKENS, Conditioning("description"), Conditioning("both", 12)):
        assert torch.equal(nearest_teacher(worlds(how).data, plain.lora_model, rows), wanted)


def samples(world: World, n_prompts: int | tuple[int, int], seed: int = 0) -> DeltaAugmentedDataset:
    rows = list(world.data.rows["train"])
    return DeltaAugmentedDataset(
        world.data.conditions.train_ANC[rows],
        world.data.teachers(rows),
        world.data.loss_deltas.select(rows),
        n_prompts,
        1,
        seed,
    )


def test_the_number_of_prompts_is_drawn_for_each_sample(world: World) -> None:
    varied, whole = samples(world, (2, 6)), samples(world, 6)
    counts = []
    for draw in (Draw(row, step) for row in range(8) for step in range(8)):
        sample, again, full = varied[draw], samples(world, (2, 6))[draw], whole[draw]
        kept = ~sample["condition"].isnan().any(-1)
        counts.append(int(kept.sum()))
        assert kept[: counts[-1]].all()
        assert torch.equal(sample["condition"][kept], full["condition"][kept])
        assert all(torch.equal(sample[key], full[key]) for key in full if key != "condition")
        torch.testing.assert_close(sample["condition"], again["condition"], equal_nan=True)
    assert set(counts) == {2, 3, 4, 5, 6}
    # The pool of which samples are drawn is as it was.
    assert not world.data.conditions.train_ANC.isnan().any()


def test_a_resumed_run_with_a_varied_number_equals_an_unbroken_one(
    world: World, config: TrainingConfig
) -> None:
    varied = replace(config, n_prompts_min=1, lambda_delta=0.0, steps=6, eval_every=6)
    losses = [m["loss/total"] for m in Trial(varied, world.data, world.lora_model).remaining()]
    assert losses != [
        m["loss/total"]
        for m in Trial(replace(varied, n_prompts_min=0), world.data, world.lora_model).remaining()
    ]
    trial = Trial(varied, world.data, world.lora_model)
    steps = trial.remaining()
    for _ in range(3):
        next(steps)
    resumed = Trial(varied, world.data, world.lora_model)
    resumed.restore(trial.state())
    assert [m["loss/total"] for m in resumed.remaining()] == losses[3:]


class Plain(LoraGenerator):
    """Generator of somebody else, which knows no padding."""

    @property
    def standardiser(self) -> Standardiser:
        return self.statistics

    def forward(self, condition_ANC: Tensor) -> Tensor:
        return condition_ANC.mean(1) @ torch.ones(self.condition_width, self.spec.n_values)


def test_a_generator_that_reads_no_padding_is_given_none(world: World) -> None:
    statistics = Standardiser.fit(world.data.teachers(list(world.data.rows["train"])))
    generator = Plain(world.bank.spec, 4, statistics)
    generator.check_reads(0, padded=False)
    for tokens, padded in ((0, True), (4, False)):
        with pytest.raises(UserError, match="Plain reads no padding"):
            generator.check_reads(tokens, padded)
    config = generator_config("hyperconv_tokens", length=4)
    reads_four = make_generator(config, world.bank.spec, 8, statistics, 0)
    reads_four.check_reads(4, padded=True)
    with pytest.raises(UserError, match="reads 4 tokens of a prompt.*up to 5.*option length"):
        reads_four.check_reads(5, padded=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"condition": "answers"}, "unknown condition 'answers'; there are: prompts, description"),
        ({"n_prompts_min": -1}, "at least 0"),
        ({"n_prompts_min": 16}, "n_prompts_min is 16 and n_prompts 16: nothing varies"),
        ({"n_prompts_min": 2, "condition": "description"}, "has none: leave it out"),
        ({"mixup": 1.0, "condition": "description"}, "half of the prompts of each task"),
        ({"prompt_tokens": 1.5}, "whole number"),
        (
            {"generator": generator_config("hyperconv_tokens")},
            "hyperconv_tokens reads states of tokens: give prompt_tokens",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        TrainingConfig(**change)


def test_data_with_other_conditions_are_refused(worlds: Any, config: TrainingConfig) -> None:
    own = worlds(TOKENS)
    with pytest.raises(UserError, match="names conditioning .*its data are of"):
        Trial(config, own.data, own.lora_model)
    with pytest.raises(UserError, match="names conditioning"):
        Trial(replace(config, prompt_tokens=12, condition="both"), own.data, own.lora_model)


def test_worlds_are_told_apart_by_what_conditions_hold(world: World) -> None:
    changes = ({}, {"prompt_tokens": 8}, {"condition": "both"}, {"condition": "description"})
    assert len({replace(world.config, **change).hash for change in changes}) == 4
    told = replace(world.config, condition="description")
    assert replace(told, condition="prompts") == world.config and told.descriptions_hash
    other = replace(told, suite=replace(told.suite, n_formats=3, n_val=1, n_test=2))
    assert other.descriptions_hash != told.descriptions_hash
    assert WorldConfig().descriptions_hash == ""
