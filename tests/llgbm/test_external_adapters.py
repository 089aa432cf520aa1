"""Adapters of others: equal to PeftModel in logits where they are read, refused by name where not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_adapters import (
    CONFIG,
    IDS,
    WEIGHTS,
    as_whole_numbers,
    change,
    logits_of_peft,
    only_a_pickle,
    rekey,
    train_with_peft,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from llgbm.lora import LoraBatch, LoraSpec
from llgbm.lora.apply import adapters_applied
from llgbm.lora.external import PlainAdapter, read_external
from llgbm.lora.plain import CONVERTED_INIT, PLAIN, PLAIN_INIT
from llgbm.models.load import Base
from llgbm.runtime import UserError


def logits_here(base: Base, plain: PlainAdapter) -> Tensor:
    batch = LoraBatch.from_state_dicts([plain.state])
    batch.check(plain.spec)
    with torch.no_grad(), adapters_applied(base.model, batch, plain.spec.scaling):
        return base.model(IDS).logits


def check_parity(base: Base, folder: Path) -> PlainAdapter:
    wanted = logits_of_peft(base, folder)
    plain = read_external(folder, base.model)
    torch.testing.assert_close(logits_here(base, plain), wanted, atol=1e-5, rtol=0)
    with torch.no_grad():
        assert (wanted - base.model(IDS).logits).abs().max() > 0.05
    return plain


# Every field of the allow-list with values that are accepted. A field without an entry fails the test below.
ACCEPTED: dict[str, list[dict[str, Any]]] = {
    "peft_type": [{}],
    "task_type": [{}],
    "bias": [{"bias": "none"}],
    "init_lora_weights": [
        {"init_lora_weights": i} for i in (True, False, "gaussian", "pissa", "olora")
    ],
    "auto_mapping": [{}],
    "peft_version": [{}],
    "base_model_name_or_path": [{}],
    "revision": [{"revision": "main"}],
    "inference_mode": [{"inference_mode": True}],
    "r": [{"r": 2}, {"r": 7}],
    "lora_alpha": [{"lora_alpha": 1}, {"lora_alpha": 5.5}],
    "lora_dropout": [{"lora_dropout": 0.3}],
    "use_rslora": [
        {"use_rslora": True},
        {"use_rslora": True, "init_lora_weights": "pissa"},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    ],
    "rank_pattern": [
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 5}},
        {"rank_pattern": {"v_proj": 3}, "init_lora_weights": "olora"},
    ],
    "alpha_pattern": [{"alpha_pattern": {"v_proj": 12}, "rank_pattern": {r".*\.0\..*": 3}}],
    "target_modules": [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q_proj|up_proj)"},
        {"target_modules": ["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]},
    ],
    "exclude_modules": [{"exclude_modules": ["layers.0.self_attn.q_proj"]}],
    "layers_to_transform": [{"layers_to_transform": [1]}, {"layers_to_transform": 0}],
    "layers_pattern": [{"layers_to_transform": [1], "layers_pattern": "layers"}],
    "megatron_core": [{}],
    "qalora_group_size": [{}],
    "runtime_config": [{}],
    "eva_config": [{}],
    # True on Conv1D (`test_fused_layers`); on Linear layers see below.
    "fan_in_fan_out": [{}],
}


@pytest.mark.parametrize(
    "settings",
    [pytest.param(s, id=f"{field} {s}") for field, own in ACCEPTED.items() for s in own if s],
)
def test_an_accepted_adapter_has_the_logits_of_peft(
    tiny_base: Base, tmp_path: Path, settings: dict[str, Any]
) -> None:
    train_with_peft(tiny_base, tmp_path, **settings)
    plain = check_parity(tiny_base, tmp_path)
    if settings.get("init_lora_weights") in CONVERTED_INIT:
        assert any("initial part" in text for text in plain.converted)
        assert plain.spec.rank == 8


def test_orthogonal_and_eva_adapters_have_the_logits_of_peft(
    tiny_base: Base, tmp_path: Path
) -> None:
    for init in ("orthogonal", "eva"):
        train_with_peft(tiny_base, tmp_path / init)
        change(tmp_path / init, init_lora_weights=init, eva_config={} if init == "eva" else None)
        plain = read_external(tmp_path / init, tiny_base.model)
        change(tmp_path / init, init_lora_weights=True, eva_config=None)
        wanted = logits_of_peft(tiny_base, tmp_path / init)
        torch.testing.assert_close(logits_here(tiny_base, plain), wanted, atol=1e-5, rtol=0)


def test_fan_in_fan_out_on_linear_layers_is_taken_as_peft_takes_it(
    tiny_base: Base, tmp_path: Path
) -> None:
    """PEFT warns and sets it to false: such weights lie as all others do."""
    train_with_peft(tiny_base, tmp_path)
    change(tmp_path, fan_in_fan_out=True)
    plain = read_external(tmp_path, tiny_base.model)
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True but the target module"):
        wanted = logits_of_peft(tiny_base, tmp_path)
    torch.testing.assert_close(logits_here(tiny_base, plain), wanted, atol=1e-5, rtol=0)


def test_the_parity_test_holds_the_whole_allow_list() -> None:
    assert ACCEPTED.keys() == PLAIN.keys()
    tried = {s["init_lora_weights"] for s in ACCEPTED["init_lora_weights"]} | {"orthogonal", "eva"}
    assert tried == {*PLAIN_INIT, *CONVERTED_INIT} - {None}


@pytest.mark.parametrize(
    "new",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: f"module.{key}",
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod.", 1),
        lambda key: f"base_model.model.{key}",
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    ],
    ids=["no prefix", "module", "_orig_mod", "twice", "adapter's name", "checkpointed"],
)
def test_names_of_wrappers_are_read_past(
    tiny_base: Base, tmp_path: Path, new: Callable[[str], str]
) -> None:
    train_with_peft(tiny_base, tmp_path)
    wanted = logits_of_peft(tiny_base, tmp_path)
    rekey(tmp_path, new)
    got = logits_here(tiny_base, read_external(tmp_path, tiny_base.model))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_adapters_of_other_precisions_are_read(
    tiny_base: Base, tmp_path: Path, dtype: torch.dtype
) -> None:
    train_with_peft(tiny_base, tmp_path)
    state = {k: v.to(dtype) for k, v in load_file(tmp_path / WEIGHTS).items()}
    save_file(state, tmp_path / WEIGHTS)
    check_parity(tiny_base, tmp_path)


def test_embeddings_that_are_the_bases_own_are_left_out(tiny_base: Base, tmp_path: Path) -> None:
    train_with_peft(tiny_base, tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    own = tiny_base.model.get_input_embeddings().weight.detach().clone()
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        state[f"base_model.model.{key}"] = own.clone()
    save_file(state, tmp_path / WEIGHTS)
    plain = check_parity(tiny_base, tmp_path)
    assert any("embed_tokens" in text for text in plain.converted)
    state["base_model.model.model.embed_tokens.weight"][0, 0] += 1
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match="weights of its own for .*embed_tokens"):
        read_external(tmp_path, tiny_base.model)


def add_key(folder: Path, key: str, tensor: Tensor) -> None:
    save_file({**load_file(folder / WEIGHTS), key: tensor}, folder / WEIGHTS)


def without_layer(folder: Path) -> None:
    state = {k: v for k, v in load_file(folder / WEIGHTS).items() if "layers.0.mlp" not in k}
    save_file(state, folder / WEIGHTS)


def other_rank(folder: Path) -> None:
    change(folder, r=3)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "use_dora": (lambda f: change(f, use_dora=True), "sets use_dora"),
    "dora by its weights": (
        lambda f: add_key(f, f"{Q}.lora_magnitude_vector", torch.ones(32)),
        "DoRA",
    ),
    "bias": (lambda f: change(f, bias="lora_only"), "sets bias = 'lora_only'"),
    "bias by its weights": (lambda f: add_key(f, f"{Q}.bias", torch.ones(32)), "sets bias"),
    "lora_bias": (lambda f: change(f, lora_bias=True), "sets lora_bias"),
    "modules_to_save": (lambda f: change(f, modules_to_save=["lm_head"]), "sets modules_to_save"),
    "trainable_token_indices": (
        lambda f: change(f, trainable_token_indices=[1, 2]),
        "sets trainable_token_indices",
    ),
    "alora": (
        lambda f: change(f, alora_invocation_tokens=[5, 6]),
        "sets alora_invocation_tokens",
    ),
    "pissa by chance": (
        lambda f: change(f, init_lora_weights="pissa_niter_4"),
        "sets init_lora_weights = 'pissa_niter_4'",
    ),
    "loftq": (lambda f: change(f, init_lora_weights="loftq"), "'loftq'"),
    "corda": (lambda f: change(f, init_lora_weights="corda"), "'corda'"),
    "loftq_config": (lambda f: change(f, loftq_config={"loftq_bits": 4}), "sets loftq_config"),
    "qalora": (lambda f: change(f, use_qalora=True), "sets use_qalora"),
    "layer_replication": (lambda f: change(f, layer_replication=[[0, 2]]), "layer_replication"),
    "target_parameters": (lambda f: change(f, target_parameters=["w"]), "target_parameters"),
    "megatron": (lambda f: change(f, megatron_config={"a": 1}), "sets megatron_config"),
    "another type": (lambda f: change(f, peft_type="IA3"), "sets peft_type = 'IA3'"),
    "another task": (lambda f: change(f, task_type="SEQ_CLS"), "sets task_type"),
    "not known yet": (lambda f: change(f, use_quantum=3), "sets use_quantum = 3"),
    "int8": (as_whole_numbers, "int8"),
    "torn": (without_layer, "lacks the weights of 1 modules"),
    "more than is named": (
        lambda f: change(f, target_modules=["q_proj", "v_proj"]),
        "do not name",
    ),
    "rank": (other_rank, "another rank or base"),
    "embedding": (
        lambda f: add_key(
            f, "base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 9)
        ),
        "an adapted embedding",
    ),
    "two adapters": (
        lambda f: add_key(f, f"{Q}.lora_A.other.weight", torch.ones(4, 32)),
        "several adapters",
    ),
    "half": (
        lambda f: add_key(f, f"{Q.replace('q_', 'k_')}.lora_A.weight", torch.ones(4, 32)),
        "lacks one",
    ),
    "elsewhere": (
        lambda f: rekey(f, lambda k: k.replace("layers.1", "layers.7")),
        "has no module model.layers.7",
    ),
    "pickle": (only_a_pickle, "adapter_model.bin, a pickle"),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=list(SPOILED))
def test_anything_else_is_refused_by_name(
    tiny_base: Base, tmp_path: Path, spoil: tuple[Callable[[Path], None], str]
) -> None:
    train_with_peft(tiny_base, tmp_path)
    spoil[0](tmp_path)
    with pytest.raises(UserError) as refused:
        read_external(tmp_path, tiny_base.model)
    assert spoil[1] in str(refused.value) and str(tmp_path) in str(refused.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_head_as_a_target_is_refused(tiny_base: Base, tmp_path: Path) -> None:
    train_with_peft(tiny_base, tmp_path, target_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match="lm_head, the head"):
        read_external(tmp_path, tiny_base.model)


def test_a_byte_order_mark_is_read_past(tiny_base: Base, tmp_path: Path) -> None:
    train_with_peft(tiny_base, tmp_path)
    path = tmp_path / CONFIG
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_external(tmp_path, tiny_base.model).spec.rank == 4


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"r": "x"}',
        '{"r": 1e400, "lora_alpha": 1}',
        "\x00",
        '{"r": 4, "lora_alpha": 6, "target_modules": 3}',
    ],
)
def test_a_config_that_is_none_is_one_sentence(
    tiny_base: Base, tmp_path: Path, content: str
) -> None:
    train_with_peft(tiny_base, tmp_path)
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(UserError, match="no adapter config"):
        read_external(tmp_path, tiny_base.model)


class Experts(torch.nn.Module):
    """A mixture as transformers 4 has it: each expert a Linear layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        expert = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(4, 4)})
        self.mlp = torch.nn.ModuleDict({"experts": torch.nn.ModuleList([expert])})
        self.q_proj = torch.nn.Linear(4, 4)


def test_experts_of_a_mixture_are_no_targets() -> None:
    with pytest.raises(UserError, match="an expert of a mixture"):
        LoraSpec.from_model(Experts(), 2, 4.0, ["up_proj", "q_proj"])
    assert len(LoraSpec.from_model(Experts(), 2, 4.0, ["q_proj"]).modules) == 1
