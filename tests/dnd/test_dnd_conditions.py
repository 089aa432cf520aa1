"""Token-level features of prompts: shapes, the chosen layer, windows, refusals."""

from __future__ import annotations

import pytest
import torch
from dnd.conditions import TokenFeatures, condition_texts, encode_texts
from dnd.errors import DndError
from torch import Tensor, nn
from transformers import BertConfig, BertModel, Qwen2Config, Qwen2Model, T5Config, T5Model

from llgbm.models.load import Base

SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}


def make_tokens(length: int = 6) -> dict[str, Tensor]:
    ids = torch.randint(1, 20, (2, 3, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=20, **SMALL)).eval()


def qwen() -> nn.Module:
    torch.manual_seed(0)
    return Qwen2Model(Qwen2Config(vocab_size=20, num_key_value_heads=1, **SMALL)).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    return T5Model(
        T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2)
    ).eval()


@pytest.mark.parametrize("make", [bert, qwen, t5])
def test_features_are_those_of_each_prompt_alone(make) -> None:
    features, tokens = TokenFeatures(make()), make_tokens()
    with torch.no_grad():
        got = features(tokens)
        alone = features.encoder(
            input_ids=tokens["input_ids"][1, 2:], attention_mask=torch.ones(1, 6)
        ).last_hidden_state
    assert got.shape == (2, 3, 6, 8)
    torch.testing.assert_close(got[1, 2], alone[0])


def test_the_chosen_layer_is_the_one_taken() -> None:
    model, tokens = qwen(), make_tokens()
    with torch.no_grad():
        wanted = model(
            input_ids=tokens["input_ids"].flatten(0, 1), output_hidden_states=True
        ).hidden_states[1]
        got = TokenFeatures(model, layer=0)(tokens)
        last = TokenFeatures(model, layer=-1)(tokens)
        torch.testing.assert_close(got.flatten(0, 1), wanted)
        torch.testing.assert_close(model.norm(last), TokenFeatures(model)(tokens))


def test_long_texts_are_read_in_windows() -> None:
    features, tokens = TokenFeatures(bert(), window=4), make_tokens(8)
    with torch.no_grad():
        second = features({name: t[:, :, 4:] for name, t in tokens.items()})
        torch.testing.assert_close(features(tokens)[:, :, 4:], second)
    with pytest.raises(DndError, match="windows of 4"):
        features(make_tokens(6))


def test_parts_of_an_example_and_their_encoding(tiny_base: Base) -> None:
    examples = [{"prompt": "first", "response": "one"}, {"prompt": "second", "response": "two"}]
    assert condition_texts(examples) == ["first", "second"]
    assert condition_texts(examples, "answers") == ["one", "two"]
    assert condition_texts(examples, "prompts+answers") == ["first\none", "second\ntwo"]
    encoded = encode_texts(tiny_base.tokenizer, ["a", "a a a"], 2)
    assert encoded["input_ids"].shape == (2, 2) and encoded["attention_mask"].tolist() == [
        [1, 0],
        [1, 1],
    ]


def test_wrong_conditions_are_refused(tiny_base: Base) -> None:
    with pytest.raises(DndError, match="unknown part"):
        condition_texts([{"prompt": "x"}], "prompt")  # type: ignore[arg-type]
    for examples in ([], [{"prompt": "x"}]):
        with pytest.raises(DndError, match="without response"):
            condition_texts(examples, "answers")
    with pytest.raises(DndError, match="no text"):
        encode_texts(tiny_base.tokenizer, [], 4)
    with pytest.raises(DndError, match="layer 2 asked for"):
        TokenFeatures(bert(), layer=2)
    with pytest.raises(DndError, match=r"\[B, N, L\]"):
        TokenFeatures(bert())({name: t[0] for name, t in make_tokens().items()})
