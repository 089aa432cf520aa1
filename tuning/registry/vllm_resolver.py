"""A resolver for vLLM: a LoRA that it does not know is generated from prompts of that name.

vLLM finds `register` by the entry point `vllm.general_plugins`, and asks resolvers where its own variable
VLLM_ALLOW_RUNTIME_LORA_UPDATING is true. LLGBM_VLLM_MODEL names the generator (models:/NAME@ALIAS or a folder),
LLGBM_VLLM_PROMPTS a folder with files of prompts, NAME.txt, NAME.json or NAME.jsonl; LLGBM_VLLM_ADAPTERS is where
adapters are written (.llgbm/vllm).
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from llgbm.runtime import UserError, content_hash, is_folder, say, split_revision
from llgbm.system.output import check_name

if TYPE_CHECKING:
    from llgbm.generator.bundle import GeneratorBundle

NAME = "llgbm"
SUFFIXES = (".txt", ".json", ".jsonl")
MODEL, PROMPTS, ADAPTERS = "LLGBM_VLLM_MODEL", "LLGBM_VLLM_PROMPTS", "LLGBM_VLLM_ADAPTERS"
WEIGHTS = "adapter_model.safetensors"


def register() -> None:
    """Register the resolver with vLLM; nothing where LLGBM_VLLM_MODEL is not set.

    Raises UserError where the folder of prompts is not there.
    """
    model = os.environ.get(MODEL)
    if not model:
        return
    prompts = Path(os.environ.get(PROMPTS, "prompts")).expanduser()
    if not prompts.is_dir():
        raise UserError(f"{PROMPTS} is {str(prompts)!r}: name a folder with files of prompts")
    folder = Path(os.environ.get(ADAPTERS, ".llgbm/vllm")).expanduser()
    adapters = GeneratedAdapters(model, prompts.resolve(), folder.resolve())

    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    class GeneratorResolver(LoRAResolver):
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            found = await asyncio.to_thread(adapters.find, base_model_name, lora_name)
            if found is None:
                return None
            place, number = found
            return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(place))

    LoRAResolverRegistry.register_resolver(NAME, GeneratorResolver())


@dataclass
class GeneratedAdapters:
    """Adapters by name, each generated from the file of prompts of that name, once."""

    model: str
    prompts: Path
    folder: Path

    def __post_init__(self) -> None:
        self._lock = Lock()

    @cached_property
    def bundle(self) -> GeneratorBundle:
        """Generator, fetched when it is asked for the first time."""
        from tuning.registry.fetch import load_bundle

        return load_bundle(self.model, None)

    def find(self, base: str, name: str) -> tuple[Path, int] | None:
        """Return folder and number of an adapter; None for a name without prompts, or a base that is another.

        The number changes with the weights: vLLM keeps what it loaded under it.
        """
        try:
            source = self._source(name)
            if source is None:
                return None
            with self._lock:
                if not self._is_for(base):
                    say(f"{name}: the generator was trained for another base than {base}")
                    return None
                place = self._written(source, name)
        except UserError as error:
            say(f"{name} cannot be generated: {error}")
            return None
        from llgbm.system.lineage import weights_hash

        weights = weights_hash((place / WEIGHTS).read_bytes())
        return place, int(content_hash(NAME, name, weights)[:15], 16) + 1

    def _source(self, name: str) -> Path | None:
        """Return the file of prompts of a name. Raises UserError for a name that leads elsewhere, or two files."""
        check_name(name, "the adapter")
        found = [self.prompts / (name + suffix) for suffix in SUFFIXES]
        found = [path for path in found if path.is_file()]
        if len(found) > 1:
            raise UserError(f"{self.prompts} has {len(found)} files of prompts of that name")
        return found[0] if found else None

    def _is_for(self, base: str) -> bool:
        """Say if a base, as vLLM calls it, is the generator's own: by its hub id, its folder, or its files."""
        from llgbm.models.load import folder_is_named
        from llgbm.system.lineage import portable_base

        facts = self.bundle.facts
        own = split_revision(portable_base(facts["base_path"]))[0]
        if base == own:
            return True
        return is_folder(base) and folder_is_named(Path(base), facts["base_hash"])

    def _written(self, source: Path, name: str) -> Path:
        """Return the folder of the adapter; it is written unless it is there, of these prompts and this generator."""
        from llgbm.tasks.prompts import read_prompts

        place, wanted = self.folder / name, self.bundle.lineage(read_prompts(source))
        if not self._is_there(place, wanted):
            self.bundle.save_adapter(read_prompts(source), place)
        return place

    def _is_there(self, place: Path, wanted: dict[str, Any]) -> bool:
        from llgbm.system.lineage import read_lineage

        if not (place / WEIGHTS).is_file():
            return False
        known = read_lineage((place / WEIGHTS).read_bytes()) or {}
        return all(known.get(part) == wanted[part] for part in ("prompts", "generator"))
