"""Terms in a configuration: one form and one id for equal trainings, and ids that hold what the numbers depend on."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from own_package import OWN, PARTS, write_package

from llgbm.generator import GeneratorConfig
from llgbm.runtime import UserError
from llgbm.system.plugins import offered
from llgbm.terms.registry import find_term
from llgbm.training import TrainingConfig, train
from llgbm.world import World, WorldConfig


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"terms": {"weight": 0.3, "delta": 1}}),
        ({}, {"terms": {"kl": 0, "answers": 0.0}}),
        ({}, {"term_options": {"delta.loss": "cosine_norm", "delta.reading": "per_probe"}}),
        ({"delta_loss": "mse"}, {"term_options": {"delta.loss": "mse"}}),
        ({"lambda_weight": 2}, {"terms": {"weight": 2.0}}),
        ({"terms": {"kl": 1}}, {"terms": {"kl": 1.0}}),
        ({"terms": {"kl": 1}}, {"terms": {"kl": 1}, "term_options": {"kl.temperature": 1}}),
        ({"terms": {"kl": 1, "answers": 2}}, {"terms": {"answers": 2, "kl": 1}}),
        (
            {"terms": {"kl": 1}, "term_options": {"kl.top_k": "4"}},
            {"terms": {"kl": 1}, "term_options": {"kl.top_k": 4.0}},
        ),
    ],
)
def test_equal_trainings_are_one_configuration(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = TrainingConfig(**one), TrainingConfig(**other)
    assert first == second and first.hash == second.hash and hash(first) == hash(second)
    assert replace(first, seed=1) == replace(second, seed=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"terms": {"kl": 1}},
        {"terms": {"kl": 2}},
        {"terms": {"kl": 1}, "lambda_delta": 0},
        {"terms": {"kl": 1}, "term_options": {"kl.temperature": 2}},
        {"terms": {"answers": 1}},
    ],
)
def test_other_trainings_have_other_ids(changes: dict[str, Any]) -> None:
    others = [TrainingConfig(), TrainingConfig(terms={"kl": 0.5})]
    assert TrainingConfig(**changes).hash not in {config.hash for config in others}


def test_weights_are_read_by_name() -> None:
    config = TrainingConfig(lambda_weight=0, terms={"kl": 0.5, "answers": 0})
    assert config.weights == {"delta": 1.0, "kl": 0.5}
    assert config.objective.reads == {"states", "logits"}
    assert config.objective.matches == ("behaviour",)
    assert TrainingConfig(delta_loss="mse").objective.terms[1].loss == "mse"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"terms": {"kl": -1}}, "the weight of the loss term kl is -1"),
        ({"terms": {"kl": float("nan")}}, "the weight of the loss term kl is nan"),
        ({"terms": {"kl": True}}, "the weight of the loss term kl is True"),
        ({"terms": {"l7": 1}}, "unknown loss term 'l7'"),
        ({"terms": {"kl": 0, "weight": 0, "delta": 0}}, "there is no loss to train on"),
        ({"term_options": {"kl.temperature": 2}}, "is of a loss term without a weight"),
        ({"terms": {"delta": -1}}, "the weight of the loss term delta is -1"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        TrainingConfig(**changes)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of somebody else, on the path; its file with a loss term."""
    write_package(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    offered.cache_clear()
    yield tmp_path / "own_terms.py"
    for name in ("own_terms", "own_parts"):
        sys.modules.pop(name, None)
    find_term.cache_clear()
    offered.cache_clear()


@pytest.mark.parametrize("name", ["small", "own_terms:Small"])
def test_a_term_of_another_package_trains(
    package: Path, name: str, world: World, config: TrainingConfig
) -> None:
    found: list[dict[str, float]] = []
    own = replace(
        config,
        lambda_weight=0,
        lambda_delta=0,
        terms={name: 0.1, "kl": 1},
        term_options={f"{name}.power": 1},
        steps=2,
        eval_every=2,
    )
    train(own, world.data, world.lora_model, lambda step, metrics: found.append(metrics) or True)
    losses = found[0]
    assert {"loss/total", "loss/kl", "loss/small"} <= set(losses)
    assert losses["loss/total"] == pytest.approx(losses["loss/kl"] + 0.1 * losses["loss/small"])


def test_the_code_of_another_package_is_part_of_an_id(package: Path) -> None:
    before = TrainingConfig(terms={"own_terms:Small": 1})
    assert before.plugin_code.keys() == {"own_terms:Small"}
    package.write_text(OWN.replace(".mean()", ".sum()"))
    sys.modules.pop("own_terms")
    find_term.cache_clear()
    shutil.rmtree(package.parent / "__pycache__", ignore_errors=True)
    assert TrainingConfig(terms={"own_terms:Small": 1}).hash != before.hash


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name: ClassVar = "small"', "", "declares no `name`"),
        ('ClassVar = "small"', 'ClassVar = "Small one"', "is called 'Small one'"),
        ('"tokens"', '"stars"', r"reads \['stars'\]"),
        ('"size"', '"luck"', "matches 'luck'"),
        ('ClassVar = "small"', 'ClassVar = "kl"', "two loss terms are called 'kl'"),
    ],
)
def test_a_term_that_lacks_something_is_refused(
    package: Path, old: str, new: str, said: str
) -> None:
    package.write_text(OWN.replace(old, new))
    with pytest.raises(UserError, match=said):
        assert TrainingConfig(terms={"own_terms:Small": 1, "kl": 1}).objective


def test_a_generator_and_an_encoder_of_another_package_are_part_of_an_id(package: Path) -> None:
    config = TrainingConfig(generator=GeneratorConfig("straight"))
    world = WorldConfig(encoder="letters")
    assert config.plugin_code.keys() == {"generator"} and world.hash != WorldConfig().hash
    (package.parent / "own_parts.py").write_text(PARTS.replace("mean(1)", "sum(1)"))
    shutil.rmtree(package.parent / "__pycache__", ignore_errors=True)
    sys.modules.pop("own_parts")
    assert TrainingConfig(generator=GeneratorConfig("straight")).hash != config.hash
    assert WorldConfig(encoder="letters").hash != world.hash


def test_what_nobody_offers_is_answered_with_what_there_is(package: Path) -> None:
    known = "default, heads, hyperconv, latent, mixture, retrieval, hyperconv_tokens, straight"
    with pytest.raises(UserError, match=f"there are: {known}"):
        TrainingConfig(generator=GeneratorConfig("bent"))
    with pytest.raises(UserError, match="small, or your own"):
        TrainingConfig(terms={"tiny": 1})
    (package.parent / "own_parts.py").write_text("import nothing_of_this_name")
    with pytest.raises(
        UserError, match="'straight' is offered as own_parts:Straight, which cannot"
    ):
        TrainingConfig(generator=GeneratorConfig("straight"))
