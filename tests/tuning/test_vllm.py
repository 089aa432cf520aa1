"""The resolver for vLLM, and the folders that it hands over, held against vLLM's documented rules."""

from __future__ import annotations

import abc
import asyncio
import json
import re
import shutil
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from helpers import ROOT, write_minilm_bundle
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llgbm.runtime import UserError
from tuning.registry import vllm_resolver

BASE = ROOT / "tests" / "data" / "formats" / "base"


class LoRAResolver(abc.ABC):
    """Base class as vLLM documents it."""

    @abc.abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any: ...


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, LoRAResolver]:
    """Resolvers by name, in a stand-in of vLLM's registry: the package itself has no wheel for this machine."""
    found: dict[str, LoRAResolver] = {}
    registry = SimpleNamespace(register_resolver=found.__setitem__)
    modules: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": SimpleNamespace},
        "vllm.lora.resolver": {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": registry},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.fixture
def resolver(
    registered: dict[str, LoRAResolver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> LoRAResolver:
    write_minilm_bundle(tmp_path / "bundle")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "last-word.txt").write_text("give the last word: red green blue\n")
    monkeypatch.setenv(vllm_resolver.MODEL, str(tmp_path / "bundle"))
    monkeypatch.setenv(vllm_resolver.PROMPTS, str(tmp_path / "prompts"))
    monkeypatch.setenv(vllm_resolver.ADAPTERS, str(tmp_path / "adapters"))
    vllm_resolver.register()
    return registered["llgbm"]


def ask(resolver: LoRAResolver, name: str, base: str = str(BASE)) -> Any:
    return asyncio.run(resolver.resolve_lora(base, name))


def check_by_vllms_rules(folder: Path, base: Path, max_rank: int = 16) -> None:
    """Check what vLLM documents for a folder with an adapter: plain LoRA on modules of the base, A and B in pairs."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and 1 <= config["r"] <= max_rank
    assert config["bias"] == "none" and not config["modules_to_save"] and not config["use_dora"]
    assert isinstance(config["lora_alpha"], int) and isinstance(config["target_modules"], list)
    with safe_open(base / "model.safetensors", "pt") as file:
        layers = {key.removesuffix(".weight") for key in file.keys()}
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        keys = sorted(file.keys())
        shapes = {key: file.get_slice(key).get_shape() for key in keys}
    found: dict[str, set[str]] = {}
    for key in keys:
        parts = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        assert parts is not None and parts[1] in layers, key
        assert parts[1].rsplit(".", 1)[-1] in config["target_modules"]
        assert shapes[key][0 if parts[2] == "A" else 1] == config["r"]
        found.setdefault(parts[1], set()).add(parts[2])
    assert set(map(len, found.values())) == {2}


def test_a_name_with_prompts_becomes_an_adapter(resolver: LoRAResolver, tmp_path: Path) -> None:
    first = ask(resolver, "last-word")
    assert first.lora_name == "last-word" and first.lora_int_id > 0
    check_by_vllms_rules(Path(first.lora_path), BASE)
    made = (tmp_path / "adapters" / "last-word" / "README.md").stat().st_mtime_ns
    assert ask(resolver, "last-word") == first
    assert (tmp_path / "adapters" / "last-word" / "README.md").stat().st_mtime_ns == made
    (tmp_path / "prompts" / "last-word.txt").write_text("something else entirely\n")
    second = ask(resolver, "last-word")
    assert second.lora_path == first.lora_path and second.lora_int_id != first.lora_int_id
    # vLLM tells adapters apart by their numbers: the same prompts under another name are another adapter.
    shutil.copy(tmp_path / "prompts" / "last-word.txt", tmp_path / "prompts" / "again.txt")
    assert ask(resolver, "again").lora_int_id != second.lora_int_id


def test_another_generator_writes_its_own_adapter(
    resolver: LoRAResolver, registered: dict[str, LoRAResolver], tmp_path: Path
) -> None:
    first = ask(resolver, "last-word")
    weights = tmp_path / "bundle" / "generator.safetensors"
    save_file({key: 1.5 * value for key, value in load_file(weights).items()}, weights)
    vllm_resolver.register()
    second = ask(registered["llgbm"], "last-word")
    assert second.lora_path == first.lora_path and second.lora_int_id != first.lora_int_id


def test_a_base_is_known_by_its_files_and_by_its_id(
    resolver: LoRAResolver, registered: dict[str, LoRAResolver], tmp_path: Path
) -> None:
    shutil.copytree(BASE, tmp_path / "copied")
    assert ask(resolver, "last-word", str(tmp_path / "copied")) is not None
    described = tmp_path / "bundle" / "generator.json"
    facts = json.loads(described.read_text())
    described.write_text(json.dumps({**facts, "base_path": "someone/base@main"}))
    vllm_resolver.register()
    assert ask(registered["llgbm"], "last-word", "someone/base") is not None


@pytest.mark.parametrize("name", ["unknown", "../outside", "", "two"])
def test_other_names_are_left_to_other_resolvers(
    name: str, resolver: LoRAResolver, tmp_path: Path
) -> None:
    (tmp_path / "outside.txt").write_text("a\n")
    for suffix in (".txt", ".json"):
        (tmp_path / "prompts" / f"two{suffix}").write_text('["a"]')
    assert ask(resolver, name) is None and not (tmp_path / "adapters").exists()


def test_another_base_is_left_alone(
    resolver: LoRAResolver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(resolver, "last-word", "Qwen/Qwen2.5-0.5B") is None
    assert "trained for another base" in capsys.readouterr().err
    (tmp_path / "prompts" / "last-word.txt").write_text("")
    assert ask(resolver, "last-word") is None
    assert "cannot be generated: there is no prompt" in capsys.readouterr().err


def test_without_a_model_nothing_is_registered(
    registered: dict[str, LoRAResolver], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(vllm_resolver.MODEL, raising=False)
    vllm_resolver.register()
    assert not registered
    monkeypatch.setenv(vllm_resolver.MODEL, "models:/x@champion")
    monkeypatch.setenv(vllm_resolver.PROMPTS, "nowhere/at-all")
    with pytest.raises(UserError, match="LLGBM_VLLM_PROMPTS is 'nowhere/at-all'"):
        vllm_resolver.register()


def test_the_plug_in_is_offered_under_vllms_group() -> None:
    offered = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, name = offered["vllm.general_plugins"]["llgbm_resolver"].split(":")
    assert getattr(import_module(module), name) is vllm_resolver.register
