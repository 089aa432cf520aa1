"""Blocks written out: states and gradients of the model with hooks, and of PEFT; everything else is the model's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llgbm.lora import LoraBatch, LoraSpec, products
from llgbm.lora.apply import Applied, adapters_applied, final_hidden, states_at, states_at_marks
from llgbm.lora.blocks import at_positions, can_run
from llgbm.lora.shapes import TARGET_MODULES

VOCABULARY = 50
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def model_of(kind: str = "qwen2", **settings: Any) -> PreTrainedModel:
    """A random model whose norms, biases and weights all move its states."""
    config = Qwen2Config if kind == "qwen2" else LlamaConfig
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = (Qwen2ForCausalLM if kind == "qwen2" else LlamaForCausalLM)(
        config(**{**sizes, **settings})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model.eval().requires_grad_(False)


def adapters_of(
    model: PreTrainedModel, n: int, targets: tuple[str, ...] = TARGET_MODULES, rank: int = 3
) -> tuple[LoraSpec, Tensor]:
    spec = LoraSpec.from_model(model, rank, 2.0 * rank, targets)
    noise = torch.randn(n, spec.n_values, generator=torch.Generator().manual_seed(1))
    return spec, 0.1 * noise


def both_ways(
    model: PreTrainedModel, spec: LoraSpec, values_AV: Tensor, ids_ST: Tensor, positions: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """States at positions and the gradients of a weighted sum of them: written out, and by hooks."""
    found = []
    for written_out in (True, False):
        leaf = values_AV.clone().requires_grad_()
        batch = LoraBatch.unflatten(spec, leaf)
        if written_out:
            assert can_run(model, batch)
            states = states_at(model, ids_ST, positions, Applied(batch, spec.scaling))
        else:
            with adapters_applied(model, batch, spec.scaling):
                states = at_positions(final_hidden(model, ids_ST), positions)
        weight = torch.randn(states.shape, generator=torch.Generator().manual_seed(2))
        (states * weight.to(states)).sum().backward()
        found.append((states.detach(), leaf.grad))
    return found


def gap(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over that of what is wanted."""
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-12))


CONFIGS = st.fixed_dictionaries(
    {
        "num_hidden_layers": st.integers(1, 3),
        "intermediate_size": st.sampled_from([4, 20, 33]),
        "tie_word_embeddings": st.booleans(),
        "rms_norm_eps": st.sampled_from([1e-6, 1e-2]),
    }
)
HEADS = st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1), (6, 2), (6, 3)])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), config=CONFIGS, heads=HEADS, kind=st.sampled_from(["qwen2", "llama"]))
def test_states_and_gradients_are_those_of_the_model_with_hooks(
    data: st.DataObject, config: dict[str, Any], heads: tuple[int, int], kind: str
) -> None:
    if kind == "llama":
        bias = st.booleans()
        config |= {"attention_bias": data.draw(bias), "mlp_bias": data.draw(bias)}
        config |= {"head_dim": data.draw(st.sampled_from([4, 10]))}
    # A norm over two or three values enlarges rounding at will.
    width = heads[0] * data.draw(st.sampled_from([8, 12]))
    config |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    model = model_of(kind, hidden_size=width, **config)
    # The values always have a gradient; that of the queries of a text's first token is mere rounding.
    targets = data.draw(st.sets(st.sampled_from(TARGET_MODULES))) | {"v_proj"}
    adapters, texts, tokens, read = (data.draw(st.integers(1, 4)) for _ in range(4))
    spec, values_AV = adapters_of(model, adapters, tuple(targets), data.draw(st.integers(1, 5)))
    tokens *= data.draw(st.sampled_from([1, 5, 24]))
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCABULARY, (adapters * texts, tokens), generator=generator)
    positions = torch.randint(tokens, (adapters * texts, read), generator=generator)
    (states, gradient), (wanted, wanted_gradient) = both_ways(
        model, spec, values_AV, ids, positions
    )
    assert gap(states, wanted) < 5e-5
    assert gap(gradient, wanted_gradient) < 5e-5


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("short", [0, 64], ids=["fused attention", "two products"])
def test_both_ways_of_attention_give_what_peft_gives(
    kind: str, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "SHORT_TEXT", short)
    model = model_of(kind)
    spec, values_AV = adapters_of(model, 2)
    ids = torch.arange(2 * 3 * 9).view(6, 9) * 7 % VOCABULARY
    leaf = values_AV.clone().requires_grad_()
    batch = LoraBatch.unflatten(spec, leaf)
    states = states_at(model, ids, applied=Applied(batch, spec.scaling))
    states.square().sum().backward()
    assert leaf.grad is not None
    for index, state in enumerate(LoraBatch.unflatten(spec, values_AV).to_state_dicts()):
        config = LoraConfig(r=3, lora_alpha=6, target_modules=list(TARGET_MODULES))
        peft = get_peft_model(model_of(kind), config)
        set_peft_model_state_dict(peft, state)
        own = peft(input_ids=ids[3 * index : 3 * index + 3], output_hidden_states=True)
        own.hidden_states[-1].square().sum().backward()
        gradients = {n.replace(".default", ""): p.grad for n, p in peft.named_parameters()}
        gradients = {name: grad for name, grad in gradients.items() if grad is not None}
        wanted = LoraBatch.from_state_dicts([gradients]).flatten(spec)[0]
        assert gap(states[3 * index : 3 * index + 3], own.hidden_states[-1]) < 1e-5
        assert gap(leaf.grad[index], wanted) < 1e-5


def test_right_padding_and_marks_change_no_state_and_marks_come_row_by_row() -> None:
    model = model_of()
    spec, values_AV = adapters_of(model, 2)
    applied = Applied(LoraBatch.unflatten(spec, values_AV), spec.scaling)
    lengths = torch.tensor([9, 3, 6, 1])
    ids = torch.arange(4 * 9).view(4, 9) * 7 % VOCABULARY
    marks = torch.arange(9) < lengths[:, None]
    marks[0, :5] = marks[2, 3] = False
    full = states_at(model, ids, applied=applied)
    padded = ids.where(torch.arange(9) < lengths[:, None], 0)
    assert torch.allclose(states_at_marks(model, padded, marks, applied), full[marks], atol=1e-5)
    for row, length in enumerate(lengths):
        one = replace(applied, batch=applied.batch.select([row // 2]))
        alone = states_at(model, ids[row : row + 1, :length], applied=one)
        assert torch.allclose(full[row, :length], alone[0], atol=1e-5)


def test_without_adapters_and_at_inner_layers_the_states_are_the_model_s_own() -> None:
    model = model_of()
    ids = torch.arange(4 * 9).view(4, 9) * 7 % VOCABULARY
    positions = torch.tensor([[8, 2], [0, 8], [3, 3], [5, 4]])
    own = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    wanted = torch.stack([at_positions(states, positions) for states in own])
    for layers in ([0, 1, 2], [1], [2, 0]):
        assert torch.allclose(
            states_at(model, ids, positions, layers=layers), wanted[layers], atol=1e-5
        )
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert not can_run(model, None)
    assert torch.equal(states_at(model, ids, positions, layers=[1, 2]), wanted[[1, 2]])
    handle.remove()
    assert can_run(model, None)


def test_in_bfloat16_the_error_is_no_larger_than_that_of_the_model() -> None:
    model = model_of(hidden_size=64, intermediate_size=96, num_hidden_layers=4)
    spec, values_AV = adapters_of(model, 3)
    ids = torch.randint(VOCABULARY, (12, 20), generator=torch.Generator().manual_seed(0))
    positions = torch.full((12, 1), 19)
    exact = both_ways(model, spec, values_AV, ids, positions)[1]
    nn.Module.to(model, torch.bfloat16)
    ours, hooks = both_ways(model, spec, values_AV, ids, positions)
    assert ours[0].dtype == torch.bfloat16
    for got, usual, wanted in zip(ours, hooks, exact, strict=True):
        assert gap(got, wanted) < 1.2 * gap(usual, wanted) < 0.2


class _Wrapped(nn.Linear):
    """A Linear layer of another class, as quantised ones are."""


def _wrap(model: PreTrainedModel) -> None:
    old = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = _Wrapped(old.in_features, old.out_features, bias=False)
    model.requires_grad_(False)


def _window(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.sliding_window = 4


CHANGES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "a hook": lambda m: m.model.layers[0].mlp.register_forward_hook(lambda *_: None),
    "a hook before": lambda m: m.model.norm.register_forward_pre_hook(lambda *_: None),
    "a forward of its own": lambda m: setattr(m.model.norm, "forward", m.model.norm.forward),
    "training": lambda m: m.train(),
    "trained weights": lambda m: m.model.layers[0].mlp.up_proj.requires_grad_(True),
    "another class": _wrap,
    "a window": _window,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_what_it_does_not_know_is_left_to_the_model(
    change: Callable[[PreTrainedModel], Any],
) -> None:
    model = model_of()
    assert can_run(model, None)
    change(model)
    assert not can_run(model, None)


@pytest.mark.parametrize(
    "settings",
    [{"hidden_act": "gelu"}, {"use_sliding_window": True, "max_window_layers": 1}],
    ids=["gelu", "sliding window"],
)
def test_other_configurations_are_left_to_the_model(settings: dict[str, Any]) -> None:
    model = model_of(**settings)
    assert not can_run(model, None)
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(states_at(model, ids), final_hidden(model, ids))


def test_other_modules_autocast_and_subclasses_are_left_to_the_model() -> None:
    model = model_of()
    spec, values_AV = adapters_of(model, 1, ("q_proj",))
    batch = LoraBatch.unflatten(spec, values_AV)
    assert can_run(model, batch)
    head = LoraBatch({"lm_head": torch.ones(1, 2, 24)}, {"lm_head": torch.ones(1, VOCABULARY, 2)})
    assert not can_run(model, head)
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_run(model, batch)
    model.model.__class__ = type("Other", (type(model.model),), {})
    assert not can_run(model, batch)


def test_scaled_rotary_embeddings_are_the_model_s_own() -> None:
    model = model_of("llama", rope_scaling=LLAMA3)
    spec, values_AV = adapters_of(model, 2)
    ids = torch.arange(2 * 40).view(2, 40) * 7 % VOCABULARY
    positions = torch.tensor([[39, 20]] * 2)
    (states, gradient), (wanted, wanted_gradient) = both_ways(
        model, spec, values_AV, ids, positions
    )
    assert gap(states, wanted) < 1e-5 and gap(gradient, wanted_gradient) < 1e-5


def test_a_second_derivative_is_refused_not_wrong() -> None:
    model = model_of()
    spec, values_AV = adapters_of(model, 1)
    leaf = values_AV.requires_grad_()
    applied = Applied(LoraBatch.unflatten(spec, leaf), spec.scaling)
    states = states_at(model, torch.arange(6)[None], applied=applied)
    (gradient,) = torch.autograd.grad(states.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
