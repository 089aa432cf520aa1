"""Adapters of others from the command line: what `evaluate` and `bank import` do with each kind is one thing.

Of the inputs that once failed, these are tried elsewhere:
  fields one by one, each accepted kind against PEFT      tests/llgbm/test_external_adapters.py
  names of tasks by layouts, states of one training       tests/llgbm/test_imported_bank.py
  adapters of a commit of a base                          tests/llgbm/test_provenance.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft_adapters as made
import pytest
import torch
from output_checks import one_sentence, tree
from peft_adapters import change, train_with_peft
from safetensors.torch import load_file, save_file

from llgbm.__main__ import main
from llgbm.lora.apply import adapters_applied
from llgbm.models.load import Base
from llgbm.teachers.bank import Bank

Change = Callable[[Path], object]
SHORT = ["--trajectories", "1", "--max-tokens", "2"]


def import_command(base: Base, out: str, *sources: str) -> list[str]:
    return ["bank", "import", *sources, "--base", base.path, *SHORT, "--out", out]


def evaluate_command(*adapter: str) -> list[str]:
    return ["evaluate", "--task", "copy-plain", "--examples", "2", "--adapter", *adapter]


def saved(base: Base, folder: Path, settings: dict[str, Any], then: Change | None) -> Path:
    """Train an adapter with PEFT, with prompts beside it, and change its files."""
    train_with_peft(base, folder, **settings)
    (folder / "prompts.json").write_text(json.dumps([f"count : {word} =>" for word in "abc"]))
    if then is not None:
        then(folder)
    return folder


def with_mark(folder: Path) -> None:
    for name in (made.CONFIG, "prompts.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())


def compiled(folder: Path) -> None:
    made.rekey(folder, lambda key: key.replace(".model.model.", ".model._orig_mod.model.", 1))


# Settings of PEFT, what is done to the files then, and words of what is said of a conversion.
READ: dict[str, tuple[dict[str, Any], Change | None, str]] = {
    "pissa": ({"init_lora_weights": "pissa"}, None, "pissa, less its initial part"),
    "olora": ({"init_lora_weights": "olora"}, None, "olora, less its initial part"),
    "rslora": ({"use_rslora": True}, None, "rsLoRA, its factor in alpha"),
    "regular expression": ({"target_modules": r".*\.(q_proj|up_proj)"}, None, ""),
    "all-linear": ({"target_modules": "all-linear"}, None, ""),
    "dotted": ({"target_modules": ["layers.0.self_attn.q_proj"]}, None, "1 layers without"),
    "some layers": ({"layers_to_transform": [1]}, None, "3 layers without an adapter"),
    "compiled": ({}, compiled, "keys without wrappers' names"),
    "byte-order marks": ({}, with_mark, ""),
    "no base named": ({}, lambda f: change(f, base_model_name_or_path=None), ""),
}


@pytest.mark.parametrize("name", READ)
def test_an_adapter_is_read_alike_by_all_commands_and_as_peft_reads_it(
    name: str, tiny_base: Base, user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, then, words = READ[name]
    saved(tiny_base, user / "plain", settings, None)
    shutil.copytree(user / "plain", user / "mine")
    if then is not None:
        then(user / "mine")
    before = tree(user / "mine")
    assert main([*evaluate_command("mine"), "--base", tiny_base.path]) == 0
    assert words in capsys.readouterr().err
    assert main(import_command(tiny_base, "bank", "mine")) == 0
    assert words in capsys.readouterr().err and tree(user / "mine") == before

    bank = Bank.open(user / "bank", tiny_base)
    with torch.no_grad(), adapters_applied(tiny_base.model, bank.load(), bank.spec.scaling):
        got = tiny_base.model(made.IDS).logits
    wanted = made.logits_of_peft(tiny_base, user / "plain")  # PEFT reads no marks and no other keys
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


REFUSED: dict[str, tuple[dict[str, Any], Change | None, str]] = {
    "head": ({"target_modules": ["q_proj", "lm_head"]}, None, "adapts lm_head, the head"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, None, "an adapted embedding"),
    "bias": ({"bias": "lora_only"}, None, "sets bias = 'lora_only'"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, None, "sets modules_to_save"),
    "tokens": ({"trainable_token_indices": [1]}, None, "sets trainable_token_indices = [1]"),
    "dora": ({"use_dora": True}, None, "sets use_dora"),
    "invocation": (
        {},
        lambda f: change(f, alora_invocation_tokens=[5, 6]),
        "sets alora_invocation_tokens = [5, 6]",
    ),
    "int8": ({}, made.as_whole_numbers, "save it as float32, float16 or bfloat16"),
    "pickle": ({}, made.only_a_pickle, "load it with PEFT and save it again"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_adapter_is_refused_alike_by_all_commands(
    name: str, tiny_base: Base, user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, then, words = REFUSED[name]
    saved(tiny_base, user / "mine", settings, then)
    before = tree(user)
    said = []
    for command in (
        [*evaluate_command("mine"), "--base", tiny_base.path],
        import_command(tiny_base, "bank", "mine"),
    ):
        capsys.readouterr()
        assert main(command) == 2
        said.append(one_sentence(capsys))
        assert words in said[-1] and "mine" in said[-1]
    assert len(set(said)) == 1 and tree(user) == before


LAYOUTS: dict[str, tuple[Sequence[str], dict[str, int]]] = {
    "checkpoints": (
        ("ARC-e/checkpoint-50", "ARC-e/checkpoint-100", "BoolQ/checkpoint-50"),
        {"ARC-e": 2, "BoolQ": 1},
    ),
    "one within the other": (("ARC-e", "ARC-e/checkpoint-50"), {"ARC-e": 2}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_folders_of_a_training_are_adapters_of_one_task(
    name: str, tiny_base: Base, user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places, wanted = LAYOUTS[name]
    for number, place in enumerate(places):
        saved(tiny_base, user / "runs" / place, {}, None)
        _nudge(user / "runs" / place, number)
    assert main(import_command(tiny_base, "bank", "runs")) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == wanted


def _nudge(folder: Path, number: int) -> None:
    """Move one value, so that no two states are the same."""
    state = load_file(folder / made.WEIGHTS)
    next(iter(state.values()))[0, 0] += number
    save_file(state, folder / made.WEIGHTS)


def test_an_adapter_that_names_no_base_and_one_in_a_folder_with_equals_signs(
    tiny_base: Base, user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = "runs/lr=1e-4,seed=0/adapter"
    saved(tiny_base, user / place, {}, None)
    for named in (place, f"./{place}/", f"mine={place}", str(user / place)):
        assert main(evaluate_command(named)) == 0
    capsys.readouterr()
    change(user / place, base_model_name_or_path=None)
    assert main(evaluate_command(place)) == 2
    assert "does not name its base: name it with --base" in one_sentence(capsys)
