"""The allow-list of plain LoRA: fields of PEFT's `LoraConfig` with the values under which an adapter is
W + alpha / rank * B A on Linear layers, or can be converted to that exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from llgbm.runtime import UserError

# Initialisations that leave the base as it is, and those whose initial part can be computed again from the base.
PLAIN_INIT: tuple[Any, ...] = (True, False, None, "gaussian", "orthogonal", "eva")
CONVERTED_INIT = ("pissa", "olora")
EMPTY: tuple[Any, ...] = (None, False, [], {}, "")
# Fields that make an adapter one that is converted.
CONVERTED_FIELDS = ("use_rslora", "rank_pattern", "alpha_pattern")


def _anything(_value: Any) -> bool:
    return True


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(value is v or (v == value and type(v) is type(value)) for v in values)


# Fields whose values decide nothing at inference, or are used here.
PLAIN: dict[str, Callable[[Any], bool]] = {
    "peft_type": _one_of("LORA"),
    "task_type": _one_of("CAUSAL_LM", None),
    "bias": _one_of("none", None),
    "init_lora_weights": _one_of(*PLAIN_INIT, *CONVERTED_INIT),
    **dict.fromkeys(
        (
            *("auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
            *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora"),
            *("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"),
            *("layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size"),
            # PEFT goes by the layer, whatever is written here.
            *("runtime_config", "eva_config", "fan_in_fan_out"),
        ),
        _anything,
    ),
}


def check_plain(folder: Path, config: Mapping[str, Any], convert: bool = True) -> None:
    """Check an adapter's config against the allow-list; without `convert`, for being plain as it is.

    Raises UserError naming the fields that are not allowed.
    """
    odd = {name: value for name, value in config.items() if not is_plain(name, value)}
    if not convert:
        odd |= {n: config[n] for n in CONVERTED_FIELDS if not is_empty(config.get(n))}
        if config.get("init_lora_weights") in CONVERTED_INIT:
            odd["init_lora_weights"] = config["init_lora_weights"]
    if odd:
        told = ", ".join(f"{name} = {value!r}"[:80] for name, value in odd.items())
        raise UserError(
            f"the adapter in {folder} sets {told}, which plain LoRA does not have: it would be read wrongly here; "
            "make it without, or merge it into its base with PEFT"
        )


def is_empty(value: Any) -> bool:
    """Say if a field's value is one that leaves it out; 0 is none, as it may name a layer."""
    return _one_of(*EMPTY)(value)


def is_plain(name: str, value: Any) -> bool:
    """Say if a field may have a value: one that is listed, an empty one, or PEFT's default."""
    if name in PLAIN:
        return PLAIN[name](value)
    return is_empty(value) or (name in _defaults() and value == _defaults()[name])


@lru_cache(1)
def _defaults() -> dict[str, Any]:
    from peft import LoraConfig

    return {f.name: f.default for f in fields(LoraConfig)}


def check_types(config: Mapping[str, Any]) -> None:
    """Raise ValueError for fields of types that PEFT would not write."""
    if not 0 < float(config["lora_alpha"]) < math.inf:
        raise ValueError(f"its lora_alpha is {config['lora_alpha']}")
    base = config.get("base_model_name_or_path")
    if not (base is None or isinstance(base, str)):
        raise ValueError("its base_model_name_or_path is no text")
    targets = config.get("target_modules")
    if not targets and not config.get("target_parameters"):
        raise ValueError("it names no target module")
    if not isinstance(targets, (str, list, type(None))):
        raise ValueError("its target_modules are no names")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise ValueError(f"its {name} is no table")
