"""A trained generator as a folder that stands alone: prompts in, a PEFT adapter out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from llgbm.conditions import BaseModelEncoder, MiniLMEncoder, TextEncoder
from llgbm.generator import GeneratorConfig, LoraGenerator, load_generator, save_generator
from llgbm.lora import adapter_config, adapter_output, write_adapter_files
from llgbm.models import load_base
from llgbm.runtime import UserError


@dataclass(frozen=True)
class GeneratorBundle:
    """A generator with what it was made from: base, bank and encoder by name and hash."""

    generator: LoraGenerator
    facts: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> GeneratorBundle:
        """Read a bundle. Raises UserError where the folder holds none."""
        return cls(*load_generator(Path(folder)))

    @staticmethod
    def save(folder: Path, generator: LoraGenerator, config: GeneratorConfig, facts: dict[str, Any]) -> None:
        """Write a bundle; `facts` must name size, base_path, base_hash, bank_hash and encoder (KeyError otherwise)."""
        needed = {name: facts[name] for name in ("size", "base_path", "base_hash", "bank_hash", "encoder")}
        save_generator(folder, generator, config, {**facts, **needed})

    @cached_property
    def encoder(self) -> TextEncoder:
        """The encoder that the generator was trained with."""
        name = self.facts["encoder"]
        if name.startswith("base:"):
            return BaseModelEncoder(load_base(self.facts["base_path"]))
        return MiniLMEncoder(None if name == "minilm" else name.removeprefix("minilm:"))

    def generate(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """One adapter's PEFT state dict from the unlabelled prompts of one task. Raises UserError for no prompt."""
        texts = [p.strip() for p in prompts if p.strip()]
        if not texts:
            raise UserError("there is no prompt: give at least one unlabelled prompt of the task, one a line")
        return self.generator.generate(self.encoder.encode(texts)[None]).to_state_dicts()[0]

    def adapter_config(self) -> dict[str, Any]:
        """The `adapter_config.json` of its adapters."""
        return adapter_config(self.generator.spec, self.facts["base_path"])

    def save_adapter(self, prompts: Sequence[str], folder: str | Path) -> None:
        """Write the adapter for these prompts as a PEFT folder, whole or not at all.

        Raises UserError as `generate`, and before anything else for a folder as `llgbm.lora.save_adapter`.
        """
        output = adapter_output(folder)
        state = self.generate(prompts)
        with output.writing() as stage:
            write_adapter_files(stage, state, self.adapter_config())
