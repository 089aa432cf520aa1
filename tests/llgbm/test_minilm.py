"""The packaged MiniLM gives the bits of sentence-transformers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from llgbm.generator.conditions import LibraryModel, _packaged_minilm
from llgbm.generator.minilm import MiniLM
from llgbm.runtime import UserError

WORDS = "Give the last word red naïve Straße 漢字 don't 3.14 (a) ... \n x_y 🙂".split(" ")


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    return MiniLM(_packaged_minilm())


def test_embeddings_are_bit_identical_to_the_library(minilm: MiniLM) -> None:
    """Single prompts, batches with and without padding, prompts longer than the limit, more than one batch."""
    library, draw = LibraryModel(_packaged_minilm()), random.Random(0)
    for count, longest in ((1, 5), (1, 700), (3, 1), (16, 30), (130, 12)):
        prompts = [
            "a " + " ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(count)
        ]
        assert torch.equal(minilm.encode(prompts), library.encode(prompts)), (count, longest)
    spaced = ["  hello there ", "\tB\n"]
    assert torch.equal(minilm.encode(spaced), library.encode(spaced))


def test_states_of_tokens_are_those_of_the_library(minilm: MiniLM) -> None:
    """Each prompt has as many as it has tokens, at most the encoder's limit, and no padding."""
    library = LibraryModel(_packaged_minilm())
    prompts = ["a", " give the last word : red green ", "one two " * 200, "three"]
    pairs = zip(minilm.token_states(prompts), library.token_states(prompts), strict=True)
    for own, wanted in pairs:
        torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-4)
    counts = [len(states) for states in minilm.token_states(prompts)]
    assert counts == [3, 9, 256, 3]


def test_another_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mpnet", "hidden_act": "gelu"}')
    with pytest.raises(UserError, match="holds no MiniLM"):
        MiniLM(tmp_path)
