"""Tables of token ids: each row from its start on, the filler beside it, and no answer without a prompt."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llgbm.models.encoding import encode_pairs, place_tokens
from llgbm.models.pretrain import make_tokenizer

Row = tuple[list[int], int]
TOKENS = st.lists(st.integers(0, 2**40), max_size=5)


@given(st.lists(st.tuples(TOKENS, st.integers(0, 3)), min_size=1, max_size=6))
def test_tokens_stand_where_their_row_begins(rows: list[Row]) -> None:
    wanted = torch.full((len(rows), 8), -100)
    for number, (tokens, start) in enumerate(rows):
        for place, token in enumerate(tokens):
            wanted[number, start + place] = token
    found = place_tokens([tokens for tokens, _ in rows], [start for _, start in rows], 8, -100)
    assert torch.equal(found, wanted) and found.dtype == wanted.dtype


def test_an_answer_needs_a_prompt() -> None:
    tokenizer = make_tokenizer(["red", "blue"])
    with pytest.raises(ValueError, match="a prompt is empty"):
        encode_pairs(tokenizer, [("red", " blue"), ("", " red")])
