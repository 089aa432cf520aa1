"""Ability of a base, beside sampling from it and beside a table of probabilities made by hand."""

from __future__ import annotations

import pytest
import torch

from llgbm.models.ability import Ability, measure_ability
from llgbm.models.encoding import encode_pairs
from llgbm.models.load import Base
from llgbm.tasks.suite import Example

QUESTIONS = [
    {
        "first-plain": Example(": apple river =>", " apple"),
        "last-plain": Example(": apple river =>", " river"),
        "copy-shout": Example(": apple river =>", " apple river !"),
        "tail-plain": Example(": apple river =>", " river"),
    }
]


def probability(base: Base, example: Example) -> float:
    """Probability of an answer and its end, one token after the other, from the library's own logits."""
    pairs = encode_pairs(base.tokenizer, [(example.prompt, example.answer)])
    ids, found = pairs.input_ids_ST, 1.0
    with torch.no_grad():
        chances = base.model(input_ids=ids).logits.double().softmax(-1)
    for place in torch.nonzero(pairs.targets_ST[0] >= 0).flatten().tolist():
        found *= chances[0, place, pairs.targets_ST[0, place]].item()
    return found


def test_right_is_the_probability_of_all_right_answers_together(tiny_base: Base) -> None:
    found = measure_ability(tiny_base.model, tiny_base.tokenizer, QUESTIONS)
    first, last, shout, _ = (probability(tiny_base, e) for e in QUESTIONS[0].values())
    assert found.right == pytest.approx(first + last + shout, rel=1e-4)
    assert found.by_part["shout"] == pytest.approx(min(1, 4 * shout), rel=1e-4)
    assert found.by_part["last"] == pytest.approx(min(1, 2 * last), rel=1e-4)
    shares = [min(1, 4 * first), min(1, 2 * last), min(1, 4 * shout), min(1, 2 * last)]
    assert found.balanced == pytest.approx(sum(shares) / 4, rel=1e-4)
    fair = (min(1, 4 * first) + 2 * min(1, 2 * last)) / 3
    assert found.by_part["plain"] == pytest.approx(fair, rel=1e-4)


def test_the_worst_part_is_named() -> None:
    assert Ability(0.5, 0.4, {"copy": 0.4, "shout": 0.1, "plain": 0.9}).worst == ("shout", 0.1)
