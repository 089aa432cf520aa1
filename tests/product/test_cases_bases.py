"""Bases of others from the command line: every command that takes one says the same sentence of it.

Of the inputs that once failed, these are tried elsewhere:
  Gemma-2, Cohere, Granite and sixteen more families      tests/llgbm/test_bases.py
  several end tokens; start tokens                        tests/llgbm/test_bases.py
  another base of the same shapes for a generator         tests/llgbm/test_provenance.py
  models that read images                                 tests/llgbm/test_vision.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SYSTEM, rows, write_rows
from output_checks import tree
from spoiled_bases import CONFIGS, CONTENTS, FILES
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from llgbm.__main__ import main
from llgbm.models.load import Base
from llgbm.models.pretrain import make_tokenizer
from tuning.run_ablation import main as ablation_main

TOPICS = ("river", "stone", "cloud")
DATA = ["--data", "data", "--tasks"]
ONE_STEP = ["--steps", "1", "--checkpoints", "1", "--every", "1", "--max-tokens", "2"]
TEACHERS = ["teachers", *DATA, "river", *ONE_STEP, "--out", "bank"]
COMMANDS: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
    "evaluate": (main, ["evaluate", *DATA, "river", "--examples", "1"]),
    "teachers": (main, TEACHERS),
    "bank import": (main, ["bank", "import", "data", "--out", "bank"]),
    "dry run": (ablation_main, [*DATA, "river", "stone", "--held-out", "cloud", "--dry-run"]),
    "estimate": (ablation_main, [*DATA, "river", "stone", "--held-out", "cloud", "--estimate"]),
}
# An estimate reads a config and a tokenizer only, a plan no more than the heads of weight files.
PLANS = ("dry run", "estimate")
LATE = ("weights missing", "a weight that is no number")
SPOILED = {**CONFIGS, **FILES, **CONTENTS}
for name in ("another width", "too many tokens"):
    del SPOILED[name]  # the tiny base fits these; tests/llgbm/test_bases.py has one that does not


@pytest.fixture
def folder(user: Path, tiny_base: Base) -> Path:
    """The user's folder with datasets and a good base."""
    (user / "data").mkdir()
    for topic in TOPICS:
        write_rows(user / "data", topic, rows(topic, 32))
    shutil.copytree(tiny_base.path, user / "base")
    return user


def refusals(
    folder: Path, commands: Iterator[str], capsys: pytest.CaptureFixture[str]
) -> Iterator[str]:
    """Run commands on the base; yield what each says, and hold that nothing was written."""
    before = tree(folder)
    for name in commands:
        run, arguments = COMMANDS[name]
        assert run([*arguments, "--base", "base"]) == 2, name
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(said) == 1 and said[0].count("no base model") < 2, (name, said)
        assert tree(folder) == before
        yield said[0].replace(str(folder / "base"), "base")


@pytest.mark.parametrize("name", SPOILED)
def test_a_base_that_cannot_be_is_refused_alike_by_all_commands(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, words = SPOILED[name]
    spoil(folder / "base")
    asked = [c for c in COMMANDS if name not in LATE or c not in PLANS]
    said = set(refusals(folder, iter(asked), capsys))
    assert len(said) == 1 and words in said.pop()


SYSTEM_TURN = "{% for m in messages %}{% if m['role'] == 'system' %}"
THE_TURNS = "[{{ m['role'] }}] {{ m['content'] }}\n"
TEMPLATES = {
    "refuses": SYSTEM_TURN + "{{ raise_exception('no') }}{% endif %}" + THE_TURNS + "{% endfor %}",
    "drops": SYSTEM_TURN + "{% else %}" + THE_TURNS + "{% endif %}{% endfor %}",
    "takes": "{% for m in messages %}" + THE_TURNS + "{% endfor %}",
    "takes nothing": "{{ raise_exception('never') }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_system_text_is_read_whatever_a_template_has(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = TEMPLATES[name]
    tokenizer.save_pretrained(folder / "base")
    if name == "takes nothing":
        (said,) = refusals(folder, iter(["teachers"]), capsys)
        assert "takes no such turns (never)" in said
        return
    assert main([*TEACHERS, "--base", "base"]) == 0
    (told,) = json.loads((folder / "bank" / "trajectories.json").read_text()).values()
    turn = "[system] {}\n[user] " if name == "takes" else "[user] {}\n\n"
    assert all(prompt.startswith(turn.format(SYSTEM)) for prompt, _ in told)


TABLES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 24},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 24, "max_position_embeddings": 24},
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_text_longer_than_a_table_of_positions_is_refused(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, **TABLES[kind]}
    tokenizer = make_tokenizer(["river"])
    config = CONFIG_MAPPING[kind](vocab_size=len(tokenizer), pad_token_id=0, **own)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "other")
    tokenizer.save_pretrained(folder / "other")
    (folder / "data" / "river.json").write_text(
        json.dumps([{"prompt": f"river {i}", "response": "river"} for i in range(32)])
    )
    evaluate = ["evaluate", *DATA, "river", "--examples", "1", "--base", "other", "--max-tokens"]
    assert main([*evaluate, "2", "--shots", "0"]) == 0
    for more in (["2", "--shots", "8"], ["40", "--shots", "0"]):
        capsys.readouterr()
        assert main([*evaluate, *more]) == 2
        said = capsys.readouterr().err
        assert "longer than the 24 positions that the base other has" in said
