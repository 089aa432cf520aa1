"""Requests for one adapter: subsets of prompts, descriptions, and what a generator does not read."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts import random_statistics
from helpers import facts_of

from llgbm.generator import generator_config, make_generator
from llgbm.generator.asked import Asked, draw_subsets
from llgbm.generator.bundle import GeneratorBundle
from llgbm.generator.conditioning import Conditioning
from llgbm.lora import LoraSpec
from llgbm.models.load import Base
from llgbm.runtime import UserError

PROMPTS = [
    "reverse : apple =>",
    "give the last word : river =>",
    "copy : lemon apple =>",
    "first : a =>",
]
TOLD = "give the last word in brackets"


@pytest.fixture
def make(tiny_base: Base, tiny_spec: LoraSpec, tmp_path: Path) -> Any:
    """Return a bundle that was saved and read again, of a random generator with some conditioning."""

    def bundle(how: Conditioning, **options: Any) -> GeneratorBundle:
        config = generator_config(**{"hidden": 16, **options})
        width = tiny_base.model.config.hidden_size * (2 if how.kind == "both" else 1)
        made = make_generator(config, tiny_spec, width, random_statistics(tiny_spec), 0)
        GeneratorBundle.save(tmp_path, made, config, {**facts_of(tiny_base), **how.facts})
        return GeneratorBundle.load(tmp_path)

    return bundle


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in state.values()])


def test_subsets_are_different_halves_and_follow_the_texts_not_their_order() -> None:
    wanted = None
    for order in permutations(range(4)):
        prompts = [PROMPTS[index] for index in order]
        found = draw_subsets(prompts, 5)
        texts = [sorted(prompts[index] for index in own) for own in found]
        assert all(len(own) == len(set(own)) == 2 for own in texts) and len(texts) == 5
        assert len({tuple(own) for own in texts}) == 5
        wanted = wanted or texts
        assert texts == wanted
    assert draw_subsets([*PROMPTS, "another"], 3) != draw_subsets(PROMPTS, 3)
    assert len(draw_subsets([*PROMPTS, "another"], 10)[0]) == 3


@pytest.mark.parametrize("how", [Conditioning(), Conditioning("prompts", 5)], ids=str)
def test_a_mean_over_subsets_is_the_mean_of_their_adapters(make: Any, how: Conditioning) -> None:
    bundle = make(how, pooling="attention")
    means = [
        flat(bundle.generate([PROMPTS[index] for index in own])) for own in draw_subsets(PROMPTS, 4)
    ]
    found = flat(bundle.generate(PROMPTS, subsets=4))
    torch.testing.assert_close(found, torch.stack(means).mean(0), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, flat(bundle.generate(PROMPTS)), atol=1e-4)
    torch.testing.assert_close(found, flat(bundle.generate(PROMPTS[::-1], subsets=4)))
    lineage = bundle.lineage(PROMPTS, subsets=4)
    assert lineage["prompts"]["subsets"] == 4 and lineage["prompts"]["count"] == 4
    assert lineage["made_by"] == "generated from 4 prompts, the mean over 4 subsets"
    assert bundle.pack_adapter(PROMPTS, 4) != bundle.pack_adapter(PROMPTS)


@pytest.mark.parametrize(
    ("n_prompts", "subsets", "said"),
    [
        (1, 2, "2 subsets asked for, of 1 prompts at most 1 are read"),
        (2, 3, "3 subsets asked for, of 2 prompts at most 2 are read"),
        (4, 7, "of 4 prompts at most 6 are read"),
        (4, 1, "a mean over 1 subsets is none"),
        (4, -3, "a mean over -3 subsets is none"),
    ],
)
def test_subsets_that_there_are_not_are_refused(n_prompts: int, subsets: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Asked.of(Conditioning(), PROMPTS[:n_prompts], subsets)


@pytest.mark.parametrize("tokens", [0, 5])
def test_a_bundle_reads_what_its_generator_was_trained_on(make: Any, tokens: int) -> None:
    prompts = make(Conditioning("prompts", tokens))
    plain = flat(prompts.generate(PROMPTS))
    with pytest.raises(UserError, match="trained on prompts alone: leave the description out"):
        prompts.generate(PROMPTS, description=TOLD)
    with pytest.raises(UserError, match="there is no prompt"):
        prompts.generate()

    told = make(Conditioning("description", tokens))
    one = flat(told.generate(description=TOLD))
    assert not torch.allclose(one, flat(told.generate(description="reverse the words")))
    with pytest.raises(UserError, match="reads a description of the task: give it"):
        told.generate(PROMPTS)
    for extra in ({"prompts": PROMPTS}, {"subsets": 2}):
        with pytest.raises(UserError, match="reads a description alone: leave prompts and subsets"):
            told.generate(description=TOLD, **extra)
    assert told.lineage(description=TOLD)["made_by"] == "generated from a description"

    both = make(Conditioning("both", tokens))
    found = flat(both.generate(PROMPTS, description=TOLD))
    for other in (both.generate(PROMPTS[:3], 0, TOLD), both.generate(PROMPTS, 2, TOLD)):
        assert not torch.allclose(found, flat(other), atol=1e-5)
    assert not torch.allclose(found, flat(both.generate(PROMPTS, 0, "reverse the words")))
    for given in ({"prompts": PROMPTS}, {"description": TOLD}):
        with pytest.raises(UserError, match="give it with --description|there is no prompt"):
            both.generate(**given)
    assert "2 subsets" in both.lineage(PROMPTS, 2, TOLD)["made_by"]
    assert plain.shape == found.shape


def test_a_bundle_says_what_it_reads_and_only_where_it_is_no_vector(
    make: Any, tmp_path: Path
) -> None:
    import json

    for how, version in ((Conditioning(), 2), (Conditioning("both", 3), 3)):
        bundle = make(how)
        written = json.loads((tmp_path / "generator.json").read_text())
        assert written["version"] == version and bundle.conditioning == how
        assert ("condition" in written, "prompt_tokens" in written) == (version == 3,) * 2
    for key, value in (("condition", "answers"), ("prompt_tokens", -1)):
        (tmp_path / "generator.json").write_text(json.dumps({**written, key: value}))
        with pytest.raises(UserError, match="unknown condition|tokens of a prompt"):
            GeneratorBundle.load(tmp_path)
