"""Ability of a base, beside probabilities taken token after token from the library's own logits."""

from __future__ import annotations

import pytest
import torch

from llgbm.models.ability import Ability, measure_ability
from llgbm.models.encoding import encode_pairs
from llgbm.models.load import Base
from llgbm.tasks.suite import Example

TOLD = {
    "first-plain": [
        Example(": apple river k0 k5 =>", " apple"),
        Example(": stone river k0 k5 =>", " stone"),
    ],
    "last-shout": [Example(": apple river k1 k6 =>", " river !")],
    "last-plain": [Example(": apple river k1 k5 =>", " river")],
}


def probability(base: Base, example: Example) -> float:
    """Probability of an answer and its end, one token after the other, from the library's own logits."""
    pairs = encode_pairs(base.tokenizer, [(example.prompt, example.answer)])
    ids, found = pairs.input_ids_ST, 1.0
    with torch.no_grad():
        chances = base.model(input_ids=ids).logits.double().softmax(-1)
    for place in torch.nonzero(pairs.targets_ST[0] >= 0).flatten().tolist():
        found *= chances[0, place, pairs.targets_ST[0, place]].item()
    return found


def test_right_is_the_mean_over_tasks_of_the_probability_of_the_answer(tiny_base: Base) -> None:
    found = measure_ability(tiny_base.model, tiny_base.tokenizer, TOLD)
    one, other, shout, last = (probability(tiny_base, e) for own in TOLD.values() for e in own)
    first = (one + other) / 2
    assert found.right == pytest.approx((first + shout + last) / 3, rel=1e-4)
    tasks = {"first-plain": first, "last-shout": shout, "last-plain": last}
    assert found.by_task == pytest.approx(tasks, rel=1e-4)


def test_the_worst_task_is_named() -> None:
    assert Ability(0.4, {"copy-plain": 0.4, "first-shout": 0.1}).worst == ("first-shout", 0.1)
