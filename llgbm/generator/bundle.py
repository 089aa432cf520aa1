"""Self-contained folder of a trained generator: prompts in, a PEFT adapter out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llgbm.generator import generator_config, make_generator
from llgbm.generator.asked import Asked, mean_adapter
from llgbm.generator.conditioning import Conditioning
from llgbm.generator.conditions import BaseModelEncoder, MiniLMEncoder, TextEncoder
from llgbm.generator.networks import GeneratorConfig, LoraGenerator, Standardiser
from llgbm.lora.adapters import (
    LoraSpec,
    adapter_config,
    pack_weights,
    write_adapter_files,
)
from llgbm.lora.shapes import LinearShape
from llgbm.models.load import Base, load_base
from llgbm.runtime import UserError, content_hash, split_revision
from llgbm.system.cache import describe_file
from llgbm.system.documents import check_format, read_json
from llgbm.system.lineage import (
    begin_lineage,
    license_of,
    portable_base,
    portable_name,
)
from llgbm.system.output import CARD, Output, carded_output, sample_outputs
from llgbm.system.plugins import ENCODERS, load_plugin

# Format of `generator.json`. Version 1 did not say which it was. 3 is of conditions that are no vectors of prompts: a
# program that knows 2 would read them as such.
FORMAT_VERSION = 3
FORMAT_OF_VECTORS = 2
ORIGIN_FILE = "origin.json"
# Facts that say what the generator reads, where that is no vector of each prompt, as fields of `Conditioning`.
OF_CONDITIONS = {"condition": "kind", "prompt_tokens": "tokens"}
# What a lineage tells of a generator, where its bundle knows it.
GENERATOR_FACTS = ("registered", "study", "study_id", "trial_id", "config", "size")


@dataclass(frozen=True)
class GeneratorBundle:
    """Generator with its provenance: base, bank and encoder by name and hash."""

    generator: LoraGenerator
    facts: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> GeneratorBundle:
        """Read a bundle. Raises UserError where the folder holds none."""
        generator, facts = load_generator(Path(folder))
        origin = read_origin(Path(folder))
        return cls(generator, {**facts, **origin, "generator_hash": _hash(Path(folder), facts)})

    @staticmethod
    def save(
        folder: Path, generator: LoraGenerator, config: GeneratorConfig, facts: dict[str, Any]
    ) -> None:
        """Write a bundle; `facts` must name size, base_path, base_hash, bank_hash and encoder (KeyError otherwise)."""
        needed = {
            name: facts[name] for name in ("size", "base_path", "base_hash", "bank_hash", "encoder")
        }
        save_generator(folder, generator, config, {**facts, **needed})

    @cached_property
    def encoder(self) -> TextEncoder:
        """Encoder that the generator was trained with. Raises UserError where the one found here is another."""
        name = self.facts["encoder"]
        if name.startswith("base:"):
            return BaseModelEncoder(self._base())
        own = load_plugin(ENCODERS, name)
        if own is not None:
            encoder: TextEncoder = own(self._base())
        else:
            encoder = MiniLMEncoder(None if name == "minilm" else name.removeprefix("minilm:"))
        # Bundles of version 0.1.0 know the encoder by its name only.
        if self.facts.get("encoder_hash", encoder.hash) != encoder.hash:
            raise UserError(
                f"the encoder {name} is not the one that this generator was trained with (other files): bring that one"
            )
        return encoder

    def _base(self) -> Base:
        base = load_base(self.facts["base_path"])
        self.check_base(base)
        return base

    @property
    def conditioning(self) -> Conditioning:
        """Return what the generator reads of a task."""
        return conditioning_of(self.facts)

    def check_base(self, base: Base) -> None:
        """Raise UserError unless the generator was trained for this base."""
        if not base.is_named(self.facts["base_hash"]):
            raise UserError(
                f"the generator was trained for the base {self.facts['base_path']}, not for {base.path} (other files): "
                "name that base"
            )

    def generate(
        self, prompts: Sequence[str] = (), subsets: int = 0, description: str = ""
    ) -> dict[str, Tensor]:
        """Generate one adapter as a PEFT state dict from prompts of one task, or from its description, or both.

        With `subsets` it is the mean of those for so many halves of the prompts. Raises UserError as `Asked.of`.
        """
        asked = Asked.of(self.conditioning, prompts, subsets, description)
        batch = self.generator.generate(asked.condition(self.encoder, self.conditioning))
        if asked.subsets:
            batch = mean_adapter(batch, self.generator.spec)
        return batch.to_state_dicts()[0]

    def sample(
        self, prompts: Sequence[str], seed: int, numbers: Sequence[int], description: str = ""
    ) -> list[dict[str, Tensor]]:
        """Draw adapters as PEFT state dicts, one for each number; a number and a seed always give the same adapter.

        Raises UserError as `Asked.of`, for a negative seed or number, and for a generator that draws nothing.
        """
        if seed < 0 or not numbers or min(numbers) < 0:
            raise UserError("to draw adapters takes a seed of at least 0, and at least one sample")
        asked = Asked.of(self.conditioning, prompts, 0, description)
        (condition_NC,) = asked.condition(self.encoder, self.conditioning)
        return self.generator.sample(condition_NC, seed, numbers).to_state_dicts()

    def adapter_config(self) -> dict[str, Any]:
        """Content of `adapter_config.json` for its adapters."""
        return adapter_config(self.generator.spec, portable_base(self.facts["base_path"]))

    def lineage(
        self, prompts: Sequence[str] = (), subsets: int = 0, description: str = ""
    ) -> dict[str, Any]:
        """Return where the adapter for these texts comes from. Raises UserError as `generate`."""
        facts, asked = self.facts, Asked.of(self.conditioning, prompts, subsets, description)
        base = portable_base(facts["base_path"])
        name, commit = split_revision(base)
        known = {key: facts[key] for key in GENERATOR_FACTS if facts.get(key)}
        found = {
            "generator": {"hash": facts.get("generator_hash"), **known},
            "base": {
                "name": portable_name(name),
                "commit": commit,
                "hash": facts["base_hash"],
                "license": facts.get("base_license") or license_of(facts["base_path"]),
            },
            "bank": {"hash": facts["bank_hash"]},
            "encoder": {
                "name": portable_name(facts["encoder"]),
                "hash": facts.get("encoder_hash"),
            },
            "prompts": asked.facts,
            "heldout": facts.get("heldout"),
        }
        return begin_lineage(asked.made_by) | found

    def pack_adapter(
        self, prompts: Sequence[str] = (), subsets: int = 0, description: str = ""
    ) -> bytes:
        """Generate one adapter as the content of its weights file, lineage and all. Raises UserError as `generate`."""
        asked = (prompts, subsets, description)
        return pack_weights(self.generate(*asked), self.adapter_config(), self.lineage(*asked))[0]

    def pack_sample(
        self, prompts: Sequence[str], seed: int, number: int, description: str = ""
    ) -> bytes:
        """Draw one adapter as the content of its weights file. Raises UserError as `sample`."""
        (state,) = self.sample(prompts, seed, [number], description)
        lineage = of_sample(self.lineage(prompts, 0, description), seed, number)
        return pack_weights(state, self.adapter_config(), lineage)[0]

    def save_adapter(
        self,
        prompts: Sequence[str],
        folder: str | Path,
        dtype: str = "float32",
        subsets: int = 0,
        description: str = "",
    ) -> None:
        """Write the adapter for these texts as a PEFT folder with its card, whole or not at all.

        `dtype` names a floating type of torch. Raises UserError as `generate`, and before anything else for a folder as
        `llgbm.lora.save_adapter`.
        """
        output, asked = carded_output(folder), (prompts, subsets, description)
        self._write(output, self.generate(*asked), self.lineage(*asked), dtype)

    def save_samples(
        self,
        prompts: Sequence[str],
        folder: str | Path,
        samples: int,
        seed: int = 0,
        dtype: str = "float32",
        description: str = "",
    ) -> list[Path]:
        """Draw adapters for these texts and write each as a PEFT folder `sample_<number>`; return the folders.

        Raises UserError as `sample`, and before anything else as `sample_outputs`.
        """
        outputs = sample_outputs(folder, samples)
        states = self.sample(prompts, seed, range(samples), description)
        lineage = self.lineage(prompts, 0, description)
        for number, (output, state) in enumerate(zip(outputs, states, strict=True)):
            self._write(output, state, of_sample(lineage, seed, number), dtype)
        return [output.path for output in outputs]

    def _write(
        self, output: Output, state: Mapping[str, Tensor], lineage: dict[str, Any], dtype: str
    ) -> None:
        kind = getattr(torch, dtype)
        state = {key: value.to(kind) for key, value in state.items()}
        with_card = CARD in output.patterns
        with output.writing() as stage:
            write_adapter_files(stage, state, self.adapter_config(), lineage, with_card)


def of_sample(lineage: Mapping[str, Any], seed: int, number: int) -> dict[str, Any]:
    """Return a lineage that says which of several samples an adapter is."""
    return {**lineage, "made_by": f"{lineage['made_by']}, sample {number} of seed {seed}"}


def conditioning_of(facts: Mapping[str, Any]) -> Conditioning:
    """Return what a generator reads of a task; a bundle that does not say so reads vectors of prompts."""
    known = {own: facts[name] for name, own in OF_CONDITIONS.items() if name in facts}
    return Conditioning(**known)


def read_origin(folder: Path) -> dict[str, Any]:
    """Return what the registry wrote beside a bundle: its version and its study; nothing where there is no such file.

    Raises UserError for a torn file.
    """
    path = folder / ORIGIN_FILE
    found = read_json(path, "fetch the generator again") if path.is_file() else {}
    return {key: value for key, value in found.items() if key in GENERATOR_FACTS}


def _hash(folder: Path, facts: Mapping[str, Any]) -> str:
    """Hash a generator by its weights, its config and the shapes of its adapters."""
    weights = describe_file(folder / "generator.safetensors")[1]
    return content_hash("generator", weights, facts["generator"], facts["spec"])


def save_generator(
    folder: Path, generator: LoraGenerator, config: GeneratorConfig, facts: Mapping[str, Any]
) -> None:
    """Write `generator.safetensors` and `generator.json` (config, spec and the facts given) into a folder."""
    weights = {k: v.detach().cpu().contiguous() for k, v in generator.state_dict().items()}
    save_file(weights, folder / "generator.safetensors")
    described = {
        **facts,
        "version": FORMAT_VERSION if OF_CONDITIONS.keys() & facts.keys() else FORMAT_OF_VECTORS,
        "generator": asdict(config),
        "spec": asdict(generator.spec),
        "condition_width": generator.condition_width,
    }
    (folder / "generator.json").write_text(json.dumps(described, indent=1, sort_keys=True))


def load_generator(folder: Path) -> tuple[LoraGenerator, dict[str, Any]]:
    """Read what `save_generator` wrote. Raises UserError where the folder holds none, a torn or a newer one."""
    try:
        generator, facts = _read_generator(folder)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no generator: name a folder with generator.json and its weights"
        ) from error
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise UserError(f"the generator in {folder} is torn: make or fetch it again") from error
    if not all(torch.isfinite(value).all() for value in generator.state_dict().values()):
        raise UserError(f"the generator in {folder} holds NaN or infinite weights: train it again")
    return generator.eval(), facts


def _read_generator(folder: Path) -> tuple[LoraGenerator, dict[str, Any]]:
    facts = json.loads((folder / "generator.json").read_text())
    check_format(facts.get("version", 1), FORMAT_VERSION, f"the generator in {folder}")
    weights = load_file(folder / "generator.safetensors")
    shapes = tuple(LinearShape(**m) for m in facts["spec"]["modules"])
    conditioning_of(facts)
    spec = LoraSpec(shapes, facts["spec"]["rank"], facts["spec"]["alpha"])
    statistics = Standardiser(weights["mean_V"], weights["scale_V"])
    generator = make_generator(
        generator_config(**facts["generator"]), spec, facts["condition_width"], statistics, 0
    )
    generator.load_state_dict(weights, strict=True)
    return generator, facts
