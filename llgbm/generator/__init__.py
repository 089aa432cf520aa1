"""Generators: networks that map prompts to adapters, their conditions and their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch

from llgbm.generator.heads import ModuleHeadsGenerator
from llgbm.generator.hyperconv import HyperConvGenerator, HyperConvTokensGenerator
from llgbm.generator.latent import LatentConfig, LatentGenerator
from llgbm.generator.mixture import MixtureConfig, MixtureGenerator
from llgbm.generator.networks import (
    GeneratorConfig,
    LoraGenerator,
    ModuleCodeGenerator,
    Standardiser,
    TrainingRows,
)
from llgbm.generator.retrieval import RetrievalConfig, RetrievalGenerator
from llgbm.lora.adapters import LoraSpec
from llgbm.runtime import UserError, stream_seed
from llgbm.system import plugins
from llgbm.system.plugins import load_plugin, offered, source_hash

Maker = Callable[[LoraSpec, int, Standardiser, GeneratorConfig], LoraGenerator]
GENERATORS: dict[str, Maker] = {
    "default": ModuleCodeGenerator,
    "heads": ModuleHeadsGenerator,
    "hyperconv": HyperConvGenerator,
    "latent": LatentGenerator,
    "mixture": MixtureGenerator,
    "retrieval": RetrievalGenerator,
}
# Those that read states of tokens, and nothing else.
OF_TOKENS: dict[str, Maker] = {"hyperconv_tokens": HyperConvTokensGenerator}
SWITCH = {"true": True, "false": False}


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
        return maker(spec, condition_width, standardiser, settled(config))


def find_generator(name: str) -> Maker:
    """Return what makes a generator: of this package, or of another by an entry point. Raises UserError for no such."""
    found = (GENERATORS | OF_TOKENS).get(name) or load_plugin(plugins.GENERATORS, name)
    if found is None:
        known = ", ".join([*GENERATORS, *OF_TOKENS, *sorted(offered(plugins.GENERATORS))])
        raise UserError(f"unknown generator {name!r}; there are: {known}")
    return found


def needs_tokens(name: str) -> bool:
    """Return whether a generator reads nothing but states of tokens."""
    return bool(getattr(find_generator(name), "needs_tokens", False))


def generator_config(name: str = "default", **options: Any) -> GeneratorConfig:
    """Create the configuration of a generator from its options; a text is read as the kind of number that is needed.

    Raises UserError for an unknown generator, an option that it does not have, or a value that is none.
    """
    # A generator with widths of its own names the dataclass of them.
    kind = getattr(find_generator(name), "config_class", GeneratorConfig)
    defaults = {field.name: field.default for field in fields(kind) if field.name != "name"}
    if unknown := sorted(options.keys() - defaults.keys()):
        raise UserError(
            f"the generator {name} has no option {unknown[0]!r}; it has: {', '.join(defaults)}"
        )
    return kind(name=name, **{key: _read(key, options[key], defaults[key]) for key in options})


def _read(key: str, value: Any, default: Any) -> Any:
    if not isinstance(value, str):
        return value
    if isinstance(default, bool):
        if value not in SWITCH:
            raise UserError(f"{key} is {value!r}; it must be true or false")
        return SWITCH[value]
    try:
        return type(default)(value)
    except ValueError as error:
        raise UserError(f"{key} is {value!r}, no number of its kind") from error


def read_generator(text: str) -> GeneratorConfig:
    """Read `name` or `name,option=value,...`. Raises UserError as `generator_config`, or for what cannot be read."""
    name, *given = text.split(",")
    options: dict[str, str] = {}
    for part in given:
        key, equals, value = part.partition("=")
        if not (key and equals and value) or key in options or key == "name":
            raise UserError(
                f"{text!r} cannot be read: a generator with options is written name,option=value"
            )
        options[key] = value
    return generator_config(name, **options)


def settled(config: GeneratorConfig) -> GeneratorConfig:
    """Return the same configuration in the class that its generator has, so that equal ones have one id."""
    found: Mapping[str, Any] = vars(config)
    return generator_config(**found)


def generator_code(name: str) -> str:
    """Return what a trial's id holds of a generator's code: a hash of its file for one of another package, else ""."""
    return "" if name in GENERATORS | OF_TOKENS else source_hash(find_generator(name))


__all__ = [
    "GENERATORS",
    "OF_TOKENS",
    "GeneratorConfig",
    "HyperConvGenerator",
    "HyperConvTokensGenerator",
    "LatentConfig",
    "LatentGenerator",
    "LoraGenerator",
    "MixtureConfig",
    "MixtureGenerator",
    "ModuleCodeGenerator",
    "ModuleHeadsGenerator",
    "RetrievalConfig",
    "RetrievalGenerator",
    "TrainingRows",
    "find_generator",
    "generator_code",
    "generator_config",
    "make_generator",
    "needs_tokens",
    "read_generator",
    "settled",
]
