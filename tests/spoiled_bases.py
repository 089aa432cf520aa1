"""Folders of bases that cannot be: what is done to a good one, and words of the refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llgbm.models.pretrain import make_tokenizer


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite(folder: Path, new: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / "model.safetensors"
    save_file(new(load_file(path)), path, {"format": "pt"})


def with_one_nan(state: dict[str, Any]) -> dict[str, Any]:
    name = next(key for key in state if key.endswith("layers.0.self_attn.q_proj.weight"))
    state[name][1, 2] = float("nan")
    return state


def sharded(folder: Path, listed: dict[str, str]) -> None:
    (folder / "model.safetensors").rename(folder / "part-1.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "part-1.safetensors", **listed}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_tokenizer(folder: Path) -> None:
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        path.unlink()


def without_end(folder: Path) -> None:
    change(folder / "config.json", model_type="llama")
    path = folder / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}
    path.write_text(json.dumps({**kept, "tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n"
CONFIGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "no utf-8": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff\xfe"}'), "config.json"),
    "no object": (lambda f: (f / "config.json").write_text("[1]"), "no JSON object"),
    "a pointer of a config": (lambda f: (f / "config.json").write_bytes(POINTER), "git lfs pull"),
    "unknown type": (
        lambda f: change(f / "config.json", model_type="unheard"),
        "knows no models of type 'unheard'",
    ),
    "no type": (lambda f: change(f / "config.json", model_type=None), "config.json"),
    "code of its own": (
        lambda f: change(f / "config.json", model_type="mine", auto_map={"AutoConfig": "x.Mine"}),
        "code of its own",
    ),
    "quantised": (
        lambda f: change(f / "config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "quantised (bitsandbytes)",
    ),
    "quantised oddly": (lambda f: change(f / "config.json", quantization_config=[4]), "unnamed"),
    "another head": (
        lambda f: change(f / "config.json", architectures=["Qwen2ForSequenceClassification"]),
        "a Qwen2ForSequenceClassification, whose head writes no text",
    ),
    "no writer of text": (lambda f: change(f / "config.json", model_type="vit"), "token by token"),
}
FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a pointer": (lambda f: (f / "model.safetensors").write_bytes(POINTER), "git lfs pull"),
    "cut": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-9]
        ),
        "model.safetensors is truncated",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "pickles": (pickled, ".bin"),
    "a part is missing": (
        lambda f: sharded(f, {"b": "part-2.safetensors"}),
        "part-2.safetensors is missing",
    ),
}
CONTENTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a weight that is no number": (
        lambda f: rewrite(f, with_one_nan),
        "layers.0.self_attn.q_proj.weight holds NaN or infinite values",
    ),
    "weights missing": (
        lambda f: rewrite(f, lambda s: {k: v for k, v in s.items() if "layers.1.mlp" not in k}),
        "lack 3 weights of the model, such as model.layers.1.mlp",
    ),
    "another width": (lambda f: change(f / "config.json", hidden_size=32), "do not fit"),
    "another tokenizer": (lambda f: change(f / "config.json", vocab_size=9), "tokens, the model 9"),
    "too many tokens": (
        lambda f: make_tokenizer(
            [a + b for a in "klmnopqrst" for b in "abcdefghij"]
        ).save_pretrained(f),
        "tokens, the model 320",
    ),
    "foreign tokenizer": (
        lambda f: change(f / "tokenizer.json", model={"type": "Mine"}),
        "tokenizer",
    ),
    "no tokenizer": (without_tokenizer, "tokenizer"),
    "no end token": (without_end, "end token"),
}
