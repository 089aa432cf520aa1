"""Generators: networks that map prompts to adapters, their conditions and their files."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llgbm.generator.hyperconv import HyperConvGenerator
from llgbm.generator.networks import (
    GeneratorConfig,
    LoraGenerator,
    ModuleCodeGenerator,
    Standardiser,
)
from llgbm.lora.adapters import LoraSpec
from llgbm.runtime import UserError, stream_seed
from llgbm.system import plugins
from llgbm.system.plugins import load_plugin, offered, source_hash

Maker = Callable[[LoraSpec, int, Standardiser, GeneratorConfig], LoraGenerator]
GENERATORS: dict[str, Maker] = {"default": ModuleCodeGenerator, "hyperconv": HyperConvGenerator}


def make_generator(
    config: GeneratorConfig,
    spec: LoraSpec,
    condition_width: int,
    standardiser: Standardiser,
    seed: int,
) -> LoraGenerator:
    """Create a generator by name; the same seed gives the same weights. Raises UserError for an unknown name."""
    maker = find_generator(config.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed("generator", seed))
        return maker(spec, condition_width, standardiser, config)


def find_generator(name: str) -> Maker:
    """Return what makes a generator: of this package, or of another by an entry point. Raises UserError for no such."""
    found = GENERATORS.get(name) or load_plugin(plugins.GENERATORS, name)
    if found is None:
        known = ", ".join([*GENERATORS, *sorted(offered(plugins.GENERATORS))])
        raise UserError(f"unknown generator {name!r}; there are: {known}")
    return found


def generator_code(name: str) -> str:
    """Return what a trial's id holds of a generator's code: a hash of its file for one of another package, else ""."""
    return "" if name in GENERATORS else source_hash(find_generator(name))


__all__ = [
    "GENERATORS",
    "GeneratorConfig",
    "HyperConvGenerator",
    "LoraGenerator",
    "ModuleCodeGenerator",
    "find_generator",
    "generator_code",
    "make_generator",
]
