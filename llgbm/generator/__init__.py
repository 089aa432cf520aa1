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
    if config.name not in GENERATORS:
        raise UserError(f"unknown generator {config.name!r}; there are: {', '.join(GENERATORS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed("generator", seed))
        return GENERATORS[config.name](spec, condition_width, standardiser, config)


__all__ = [
    "GENERATORS",
    "GeneratorConfig",
    "HyperConvGenerator",
    "LoraGenerator",
    "ModuleCodeGenerator",
    "make_generator",
]
