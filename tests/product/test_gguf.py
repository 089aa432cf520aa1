"""Adapters and merged models as GGUF: the file that llama.cpp's own converter gives, and how it is missed or fails.

The converter is looked for as the command does (LLAMA_CPP, PATH); files are read by the package gguf.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from output_checks import one_sentence, tree
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from llgbm.__main__ import main
from llgbm.models.pretrain import make_tokenizer
from llgbm.runtime import UserError
from llgbm.system.gguf import ADAPTER_SCRIPT, VARIABLES, Converter

HEADS, KV_HEADS = 4, 2
PLACES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


@pytest.fixture
def installed() -> Any:
    """The module gguf, where it and the converter are installed."""
    module = pytest.importorskip("gguf", reason="the package gguf is not installed")
    try:
        Converter.find(ADAPTER_SCRIPT, None)
    except UserError as error:
        pytest.skip(str(error))
    return module


def read(installed: Any, file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    reader = installed.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}


def paired(weight: Tensor, heads: int) -> Tensor:
    """Reorder rows as llama.cpp rotates: a pair side by side, where transformers has it in two halves of a head."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def place_of(key: str) -> tuple[str, str]:
    """Return the name in GGUF of a weight of a block, and its kind of layer."""
    parts = key.removeprefix("base_model.model.").split(".")
    return f"blk.{parts[2]}.{PLACES[parts[4]]}.weight", parts[4]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer of the kind that llama.cpp knows for it, bytes as a fallback."""
    folder = tmp_path_factory.mktemp("llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b"]
    bpe = models.BPE(
        {t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def adapt(base: Path, folder: Path, **settings: Any) -> None:
    """Save a random adapter as PEFT does."""
    torch.manual_seed(1)
    model = LlamaForCausalLM.from_pretrained(base)
    config = LoraConfig(
        r=3, lora_alpha=6, task_type="CAUSAL_LM", init_lora_weights=False, **settings
    )
    get_peft_model(model, config).save_pretrained(folder)


@pytest.mark.whole
def test_an_adapter_of_qwen2_has_the_same_tensors(
    installed: Any, source: Path, user: Path, capsys: Any
) -> None:
    assert main(["gguf", "--adapter", str(source / "one"), "--out", "out"]) == 0
    fields, found = read(installed, user / "out" / "one.gguf")
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert (fields["general.architecture"], fields["adapter.lora.alpha"]) == ("qwen2", 6.0)
    wanted = {}
    for key, tensor in load_file(source / "one" / "adapter_model.safetensors").items():
        side = "lora_a" if "lora_A" in key else "lora_b"
        wanted[f"{place_of(key)[0]}.{side}"] = tensor
    assert found.keys() == wanted.keys() and len(found) == 28
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.whole
def test_an_adapter_of_llama_is_the_same_update(
    installed: Any, llama: Path, user: Path, capsys: Any
) -> None:
    """With rsLoRA and a rank and an alpha of some layers' own, which the converter does not read."""
    adapt(
        llama,
        user / "odd",
        target_modules=list(PLACES),
        use_rslora=True,
        rank_pattern={"k_proj": 2},
        alpha_pattern={"q_proj": 5},
    )
    command = ["gguf", "--adapter", "odd", "--base", str(llama), "--out", "out"]
    assert main(command) == 0, capsys.readouterr().err
    fields, found = read(installed, user / "out" / "odd.gguf")
    state, checked = load_file(user / "odd" / "adapter_model.safetensors"), 0
    for key, a in state.items():
        if "lora_B" in key:
            continue
        name, kind = place_of(key)
        alpha, rank = {"q_proj": 5}.get(kind, 6), len(a)
        update = alpha / rank**0.5 * state[key.replace("lora_A", "lora_B")] @ a
        if kind in ("q_proj", "k_proj"):
            update = paired(update, HEADS if kind == "q_proj" else KV_HEADS)
        own_a, own_b = found[f"{name}.lora_a"], found[f"{name}.lora_b"]
        # llama.cpp takes the rank off the tensor.
        got = fields["adapter.lora.alpha"] / len(own_a) * own_b @ own_a
        torch.testing.assert_close(got, update, atol=1e-6, rtol=1e-5)
        checked += 1
    assert checked == 14


@pytest.mark.whole
def test_a_merged_model_has_its_weights(
    installed: Any, llama: Path, user: Path, capsys: Any
) -> None:
    adapt(llama, user / "one", target_modules=list(PLACES))
    merge = ["merge", "--adapter", "one", "--base", str(llama), "--out", "merged"]
    assert main(merge) == 0
    assert main(["gguf", "--model", "merged", "--out", "out"]) == 0, capsys.readouterr().err
    fields, found = read(installed, user / "out" / "merged.gguf")
    assert fields["general.architecture"] == "llama"
    for key, weight in load_file(user / "merged" / "model.safetensors").items():
        if "proj" in key:
            name, kind = place_of(key)
            heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(kind)
            assert torch.equal(found[name], paired(weight, heads) if heads else weight)
        elif key == "model.embed_tokens.weight":
            assert torch.equal(found["token_embd.weight"], weight)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No converter where the command looks."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", os.defpath)


def scripted(folder: Path, lines: str) -> None:
    """Put a program in the converter's place that ends as it may end."""
    folder.mkdir()
    (folder / ADAPTER_SCRIPT).write_text(lines)


def test_a_missing_converter_says_what_to_install(
    nowhere: None, source: Path, user: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["gguf", "--adapter", str(source / "one"), "--out", "deep/out"]
    assert main(command) == 2
    said = one_sentence(capsys)
    assert "clone https://github.com/ggml-org/llama.cpp" in said and "LLAMA_CPP" in said
    monkeypatch.setenv("LLAMA_CPP", str(user))
    assert main(command) == 2
    assert f"LLAMA_CPP names {user}" in one_sentence(capsys)
    assert main([*command, "--converter", "elsewhere"]) == 2
    assert "--converter names elsewhere" in one_sentence(capsys)
    assert tree(user) == {}


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("print('Loading')\nraise SystemExit('Model X is not supported')", "X is not supported"),
        ("import gguf_that_is_not_here", "No module named 'gguf_that_is_not_here'"),
        ("", "wrote no GGUF file to one.gguf"),
        (
            "import sys, struct\nopen(sys.argv[2], 'wb').write(struct.pack('<4sIQ', b'GGUF', 3, 26))",
            "26 tensors",
        ),
    ],
    ids=["it fails", "it lacks a package", "it writes nothing", "it leaves layers out"],
)
def test_a_converter_that_fails_is_told_in_one_sentence(
    lines: str, says: str, nowhere: None, source: Path, user: Path, capsys: Any
) -> None:
    scripted(user / "llama.cpp", lines)
    before = tree(user)
    command = ["gguf", "--adapter", str(source / "one"), "--converter", "llama.cpp"]
    assert main([*command, "--out", "deep/out"]) == 2
    assert says in one_sentence(capsys)
    assert tree(user) == before


def test_files_of_others_and_of_other_commands_stay(
    nowhere: None, source: Path, user: Path, capsys: Any
) -> None:
    """Checked before the work: the converter is not even looked for."""
    (user / "theirs").mkdir()
    (user / "theirs" / "one.gguf").write_text("theirs")
    stack = ["stack", "--adapter", str(source / "one"), str(source / "two"), "--out", "stacked"]
    assert main(stack) == 0
    capsys.readouterr()
    before = tree(user)
    for out, says in (("theirs", "did not write"), ("stacked", "would take out")):
        assert main(["gguf", "--adapter", str(source / "one"), "--out", out]) == 2
        assert says in one_sentence(capsys)
    assert tree(user) == before


def test_conv1d_is_refused(nowhere: None, user: Path, capsys: Any) -> None:
    """The converter turns Conv1D's own weight, and with it the adapter, which is not stored so."""
    make_tokenizer(["red", "green"]).save_pretrained("base")
    sizes = {"vocab_size": 320, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)).save_pretrained("base")
    config = LoraConfig(
        target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False, r=2
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained("base"), config).save_pretrained("one")
    scripted(user / "llama.cpp", "")
    command = ["gguf", "--adapter", "one", "--base", "base", "--converter", "llama.cpp"]
    assert main([*command, "--out", "out"]) == 2
    assert "c_attn is a Conv1D" in one_sentence(capsys)
