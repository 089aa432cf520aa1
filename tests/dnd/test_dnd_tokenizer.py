"""Adapters as tokens: layout, round trips, gradients, importance weights, refusals."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from dnd.errors import DndError
from dnd.importance import importance_weights, load_importance
from dnd.tokenizer.register import (
    Qwen257BLoRA_Tokenizer2D,
    Qwen2505LoRA_Tokenizer2D,
    Qwen2515LoRA_Tokenizer2D,
)
from dnd.tokenizer.tokenizer import LoraTokenizer2D, default_token_size
from helpers import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor


def make_adapter(
    sizes: list[tuple[int, int]], rank: int, seed: int = 0, lead: tuple[int, ...] = ()
) -> OrderedDict[str, Tensor]:
    """Modules of (in, out) widths, with values of the size that LoRA weights have."""
    noise = torch.Generator().manual_seed(seed)
    state: OrderedDict[str, Tensor] = OrderedDict()
    for index, (n_in, n_out) in enumerate(sizes):
        state[f"layers.{index}.proj.lora_A.weight"] = (
            torch.randn(*lead, rank, n_in, generator=noise) * 0.05 + 0.01
        )
        state[f"layers.{index}.proj.lora_B.weight"] = (
            torch.randn(*lead, n_out, rank, generator=noise) * 0.02
        )
    return state


def qwen_layer(hidden: int, kv: int, inner: int) -> list[tuple[int, int]]:
    return [
        (hidden, hidden),
        (hidden, kv),
        (hidden, kv),
        (hidden, hidden),
        *[(hidden, inner)] * 2,
        (inner, hidden),
    ]


def plain_tokens(state: dict[str, Tensor], height: int, width: int) -> list[list[list[float]]]:
    """The layout chunk by chunk, value by value; modules must be in order, A before B."""
    tokens = []
    for key, tensor in state.items():
        wide = tensor if ".lora_A." in key else tensor.T
        for start in range(0, wide.shape[1], width - 2):
            chunk = wide[:, start : start + width - 2].double()
            mean, deviation = chunk.mean().item(), chunk.std().item()
            token = [[math.nan] * width for _ in range(height)]
            for i, row in enumerate(chunk.tolist()):
                token[i][: len(row)] = [(value - mean) / deviation for value in row]
            scale = [8 * mean, math.log(0.9 * deviation + 0.1) + 1.6]
            for i in range(height):
                for j in range(width):
                    if i >= height - 2 or j >= width - 2:
                        token[i][j] = scale[j % 2]
            tokens.append(token)
    return tokens


def largest_error(state: dict[str, Tensor], back: dict[str, Tensor]) -> float:
    assert list(state) == list(back)
    return max((state[k] - back[k]).abs().max().item() for k in state)


def test_tokens_equal_a_plain_implementation() -> None:
    state = make_adapter([(12, 6), (4, 18), (3, 6)], rank=3)
    ours, wanted = LoraTokenizer2D((6, 8)).tokenize(state), torch.tensor(plain_tokens(state, 6, 8))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "make"),
    [("qwen2505", Qwen2505LoRA_Tokenizer2D), ("qwen2515", Qwen2515LoRA_Tokenizer2D)],
)
def test_tokens_equal_the_stored_values(name: str, make: type[LoraTokenizer2D]) -> None:
    file = SHARED / "goldens" / f"tokenizer_{name}.safetensors"
    if not file.is_file():
        pytest.skip("../shared/goldens is absent: no stored tokens to compare with")
    with safe_open(file, "pt") as stored:
        facts, wanted = stored.metadata(), stored.get_tensor("tokens")
        state = OrderedDict(
            (k, stored.get_tensor(f"lora.{k}")) for k in json.loads(facts["key_order"])
        )
    tokenizer = make()
    assert tokenizer.token_size == tuple(json.loads(facts["token_size"]))
    torch.testing.assert_close(tokenizer.tokenize(state), wanted, rtol=0, atol=1e-6, equal_nan=True)
    assert largest_error(state, tokenizer.detokenize(state, wanted)) < 1e-6


@pytest.mark.parametrize(
    ("make", "layer", "rank", "count"),
    [
        (Qwen2505LoRA_Tokenizer2D, qwen_layer(896, 128, 4864), 8, 179),
        (Qwen2515LoRA_Tokenizer2D, qwen_layer(1536, 256, 8960), 16, 161),
        (Qwen257BLoRA_Tokenizer2D, qwen_layer(3584, 512, 18944), 16, 176),
    ],
)
def test_token_counts_of_a_layer(
    make: type[LoraTokenizer2D], layer: list, rank: int, count: int
) -> None:
    assert make().n_tokens(make_adapter(layer, rank)) == count


shapes = st.lists(
    st.tuples(st.sampled_from([1, 3, 6, 12, 30]), st.sampled_from([1, 5, 6, 18])),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(
    shapes, st.integers(1, 4), st.integers(0, 2), st.sampled_from([0, 1, 2]), st.integers(0, 10**6)
)
def test_round_trip(
    sizes: list[tuple[int, int]], rank: int, spare: int, n_lead: int, seed: int
) -> None:
    state = make_adapter(sizes, rank, seed, (2,) * n_lead)
    kept = {k: v.clone() for k, v in state.items()}
    tokenizer = LoraTokenizer2D((rank + 2 + spare, 8))
    tokens = tokenizer.tokenize(state)
    assert tokens.shape == (*(2,) * n_lead, tokenizer.n_tokens(state), rank + 2 + spare, 8)
    assert largest_error(state, tokenizer.detokenize(state, tokens)) < 1e-6
    stored = LoraTokenizer2D(tokenizer.token_size, torch.bfloat16)
    assert stored.tokenize(state).dtype == torch.bfloat16
    assert largest_error(state, stored.detokenize(state, stored.tokenize(state))) < 1e-3
    assert all(torch.equal(kept[k], v) for k, v in state.items())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
def test_round_trip_of_a_layer_of_full_size(dtype: torch.dtype, bound: float) -> None:
    state = make_adapter(qwen_layer(896, 128, 4864), rank=8)
    tokenizer = Qwen2505LoRA_Tokenizer2D(dtype=dtype)
    assert largest_error(state, tokenizer.detokenize(state, tokenizer.tokenize(state))) < bound


@pytest.mark.parametrize("width", [3, 5, 11])
def test_an_odd_token_width_loses_nothing(width: int) -> None:
    state, tokenizer = make_adapter([(9, 3), (18, 9)], rank=2), LoraTokenizer2D((4, width))
    assert largest_error(state, tokenizer.detokenize(state, tokenizer.tokenize(state))) < 1e-6


def test_a_chunk_without_spread_round_trips() -> None:
    state = make_adapter([(6, 12)], rank=2)
    state["layers.0.proj.lora_B.weight"].zero_()
    state["layers.0.proj.lora_A.weight"].fill_(0.25)
    tokenizer = LoraTokenizer2D((4, 8))
    tokens = tokenizer.tokenize(state)
    assert tokens.isfinite().all()
    assert largest_error(state, tokenizer.detokenize(state, tokens)) < 1e-6


def test_key_order_is_module_by_module_and_kept_on_the_way_back() -> None:
    state = make_adapter([(6, 6), (12, 6)], rank=2)
    mixed = OrderedDict((key, state[key]) for key in [list(state)[i] for i in (1, 2, 0, 3)])
    tokenizer = LoraTokenizer2D((4, 8))
    assert torch.equal(tokenizer.tokenize(mixed), tokenizer.tokenize(state))
    assert largest_error(mixed, tokenizer.detokenize(mixed, tokenizer.tokenize(mixed))) < 1e-6


def test_detokenize_is_differentiable_and_ignores_padding() -> None:
    state = make_adapter([(6, 3)], rank=1)
    tokenizer = LoraTokenizer2D((4, 8))
    tokens = tokenizer.tokenize(state).requires_grad_()
    sum(t.square().sum() for t in tokenizer.detokenize(state, tokens).values()).backward()
    assert tokens.grad is not None and tokens.grad.isfinite().all()
    padding = tokens.detach().isnan()
    assert (
        padding.any() and (tokens.grad[padding] == 0).all() and (tokens.grad[~padding] != 0).all()
    )


def test_a_stack_is_tokenized_as_its_adapters_are() -> None:
    stack = make_adapter([(12, 6)], rank=2, lead=(3,))
    tokenizer = LoraTokenizer2D((4, 8))
    alone = torch.stack([tokenizer.tokenize({k: v[i] for k, v in stack.items()}) for i in range(3)])
    torch.testing.assert_close(tokenizer.tokenize(stack), alone, rtol=0, atol=1e-6)


def test_default_token_size_divides_or_holds_every_matrix() -> None:
    assert default_token_size(make_adapter([(128, 64), (128, 256)], rank=4)) == (6, 66)
    assert default_token_size(make_adapter([(48, 32)], rank=2)) == (4, 18)
    assert default_token_size(make_adapter([(5, 7), (9, 5)], rank=2)) == (4, 11)


def renamed(state: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {k.replace(old, new): v for k, v in state.items()}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {
                **make_adapter([(6, 6)], 2),
                **renamed(make_adapter([(6, 6)], 1), "layers.0", "layers.1"),
            },
            "mixes the ranks",
        ),
        (renamed(make_adapter([(6, 6)], 2), "lora_A", "weight_A"), "no matrix of a LoRA"),
        ({"q.lora_A.weight": torch.zeros(2, 6)}, "lacks lora_A or lora_B"),
        ({}, "lacks lora_A or lora_B"),
        (
            {**make_adapter([(6, 6)], 2), "layers.0.proj.lora_A.default.weight": torch.zeros(2, 6)},
            "stands twice",
        ),
        (make_adapter([(13, 6)], 2), "do not divide"),
        (make_adapter([(6, 6)], 3), "a token of height 4 holds 2"),
        ({k: v * math.nan for k, v in make_adapter([(6, 6)], 2).items()}, "NaN or infinite"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(DndError, match=message):
        LoraTokenizer2D((4, 8)).tokenize(state)


def test_tokens_and_sizes_that_do_not_fit_are_refused() -> None:
    state = make_adapter([(6, 6)], 2)
    with pytest.raises(DndError, match=r"needs \[..., \*\(2, 4, 8\)\]"):
        LoraTokenizer2D((4, 8)).detokenize(state, torch.zeros(3, 4, 8))
    with pytest.raises(DndError, match="cannot be stored"):
        LoraTokenizer2D((4, 8), torch.int8)
    for size in (None, (2, 8), (4, 8, 8)):
        with pytest.raises(DndError, match="token size"):
            LoraTokenizer2D(size)


def test_importance_weights_equal_the_two_pass_formula() -> None:
    bank = [make_adapter([(12, 3)], rank=2, seed=seed) for seed in range(5)]
    tokenizer = LoraTokenizer2D((4, 8))
    tokens = torch.stack([tokenizer.tokenize(state) for state in bank]).double()
    deviation = tokens.std(0, correction=0)
    wanted = deviation.nanmean((-2, -1)) / deviation.nansum() * (~deviation.isnan()).sum()
    ours = importance_weights((state for state in bank), tokenizer)
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=0)


def test_a_bank_that_has_no_importance_is_refused() -> None:
    bank, tokenizer = [make_adapter([(12, 6)], rank=2)], LoraTokenizer2D((4, 8))
    with pytest.raises(DndError, match="at least two"):
        importance_weights(bank, tokenizer)
    with pytest.raises(DndError, match="alike"):
        importance_weights(bank * 3, tokenizer)
    with pytest.raises(DndError, match="one bank, one shape"):
        importance_weights([*bank, make_adapter([(6, 6)], rank=2)], tokenizer)


@pytest.mark.parametrize(
    ("name", "count"), [("qwen2.5-0.5b_ARC-c", 24 * 179), ("qwen2.5-1.5b_Math-Plus", 28 * 161)]
)
def test_published_importance_weights_load(name: str, count: int) -> None:
    file = SHARED / "criterion_weight" / f"{name}.pt"
    if not file.is_file():
        pytest.skip("../shared/criterion_weight is absent: no published weights to load")
    weight_T = load_importance(file, count)
    assert weight_T.shape == (count,) and weight_T.mean().item() == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(DndError, match="one each"):
        load_importance(file, count + 1)


@pytest.mark.parametrize(
    "stored", [torch.tensor([1.0, -1.0]), torch.tensor([1.0, math.nan]), torch.zeros(3), [1.0]]
)
def test_foreign_importance_weights_are_refused(tmp_path: Path, stored: object) -> None:
    torch.save(stored, tmp_path / "weights.pt")
    with pytest.raises(DndError, match="importance weights"):
        load_importance(tmp_path / "weights.pt")
