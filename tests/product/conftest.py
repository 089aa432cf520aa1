"""Commands that write where a user says, with what they read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dnd.output import RECORD
from output_checks import (
    PROMPTS,
)
from test_serving import answer, saying

from llgbm.generator import GeneratorConfig, make_generator
from llgbm.generator.bundle import GeneratorBundle
from llgbm.generator.conditions import BaseModelEncoder
from llgbm.generator.networks import Standardiser
from llgbm.lora.adapters import LoraBatch, LoraSpec, adapter_config, save_adapter
from llgbm.models.load import Base


@pytest.fixture(scope="module")
def bundle(
    tiny_base: Base,
    tiny_spec: LoraSpec,
    tiny_adapters: LoraBatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """An untrained generator of adapters for the tiny base."""
    folder = tmp_path_factory.mktemp("bundle")
    config = GeneratorConfig(hidden=16)
    facts = {
        "size": "tiny",
        "base_path": tiny_base.path,
        "base_hash": tiny_base.hash,
        "bank_hash": "b",
    }
    width = BaseModelEncoder(tiny_base).width
    generator = make_generator(
        config, tiny_spec, width, Standardiser.fit(tiny_adapters.flatten(tiny_spec)), seed=0
    )
    GeneratorBundle.save(folder, generator, config, {**facts, "encoder": f"base:{tiny_base.hash}"})
    return folder


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    with saying(answer()) as url:
        yield url


@pytest.fixture(scope="module")
def source(
    tiny_base: Base,
    tiny_spec: LoraSpec,
    tiny_adapters: LoraBatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Adapters of two tasks with prompts, as someone else left them."""
    root = tmp_path_factory.mktemp("source")
    for place, state in zip(("one", "two"), tiny_adapters.to_state_dicts(), strict=False):
        save_adapter(root / place, state, adapter_config(tiny_spec, tiny_base.path))
        (root / place / RECORD).unlink()
        (root / place / "prompts.json").write_text(json.dumps(PROMPTS))
    return root


@pytest.fixture(scope="module")
def commands(
    bundle: Path, served: str, source: Path, tiny_base: Base, tmp_path_factory: Any
) -> dict[str, list[str]]:
    """Each command but for its `--out`."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("reverse it : guitar piano =>\n")
    bank = [
        "bank",
        "import",
        str(source),
        "--base",
        tiny_base.path,
        "--trajectories",
        "1",
        "--max-tokens",
        "2",
    ]
    return {
        "generate": ["generate", "--model", str(bundle), "--prompts", str(prompts)],
        "fetch": ["fetch", "--url", served, "--prompts", str(prompts)],
        "bank": bank,
        "teachers": [
            "teachers",
            "--base",
            tiny_base.path,
            "--data",
            "nowhere/at-all",
            "--tasks",
            "river",
        ],
    }


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, which is the current one."""
    folder = tmp_path / "user"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
