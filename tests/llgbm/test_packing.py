"""Texts packed into rows: nothing is lost, and a loss and its gradients are those of the same texts apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llgbm.models.encoding import IGNORED, EncodedPairs
from llgbm.models.load import model_size
from llgbm.models.packing import pack, packed_answer_loss
from llgbm.models.pretrain import make_tokenizer, new_model
from llgbm.models.scoring import answer_loss

WORDS = ["red", "green", "blue", "sun", "moon"]


def texts_of(lengths: list[int], answers: list[int], n_words: int = 5) -> EncodedPairs:
    """Texts of these lengths whose last places predict an answer, right-padded."""
    generator = torch.Generator().manual_seed(sum(lengths))
    shape = len(lengths), max(lengths)
    ids = torch.randint(1, n_words, shape, generator=generator)
    targets = torch.full(shape, IGNORED)
    for row, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
        start = max(0, length - answer)
        targets[row, start:length] = torch.randint(1, n_words, (length - start,))
        ids[row, length:] = 0
    return EncodedPairs(ids, targets)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 6)), min_size=1, max_size=40))
def test_every_text_lies_whole_in_one_row_and_none_over_another(
    sizes: list[tuple[int, int]],
) -> None:
    lengths, answers = map(list, zip(*sizes, strict=True))
    texts = texts_of(lengths, answers)
    packed = pack(texts, width=20)
    assert packed.ids_RT.shape[1] <= max(20, *lengths)
    assert (packed.texts_RT >= 0).sum() == sum(lengths)
    for text, length in enumerate(lengths):
        here = packed.texts_RT == text
        assert here.any(1).sum() == 1
        assert packed.places_RT[here].tolist() == list(range(length))
        assert torch.equal(packed.ids_RT[here], texts.input_ids_ST[text, :length])
        assert torch.equal(packed.targets_RT[here], texts.targets_ST[text, :length])
    assert (packed.targets_RT[packed.texts_RT < 0] == IGNORED).all()


def test_short_texts_leave_little_room() -> None:
    lengths = [7, 9, 12, 15, 20, 11] * 10
    packed = pack(texts_of(lengths, [3] * 60), width=64)
    assert len(packed.ids_RT) <= -(-sum(lengths) // 64) + 1


def test_a_token_sees_those_before_it_of_its_own_text() -> None:
    packed = pack(texts_of([3, 2, 4], [1, 1, 1]), width=6)
    seen = packed.mask(torch.float32)[:, 0] == 0
    for row, own in enumerate(packed.texts_RT.tolist()):
        for here, text in enumerate(own):
            wanted = [there for there in range(here + 1) if own[there] == text]
            assert seen[row, here].nonzero().flatten().tolist() == wanted


@pytest.mark.parametrize("size", ["nano", "micro"])
def test_loss_and_gradients_are_those_of_texts_apart(size: str) -> None:
    tokenizer = make_tokenizer(WORDS)
    model = new_model(model_size(size), tokenizer, 3).train()
    texts = texts_of([5, 33, 12, 20, 2, 17, 9], [2, 6, 3, 1, 1, 4, 5], len(tokenizer))
    losses, gradients = [], []
    for loss_of in (answer_loss, packed_answer_loss):
        model.zero_grad()
        loss = loss_of(model, texts)
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, atol=1e-6, rtol=1e-4)
