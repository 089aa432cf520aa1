"""Bases quantised with bitsandbytes, in 4 or 8 bits: which are read, how large they are, what cannot be done with them.

An adapter's product is added to the output of a quantised layer, so nothing reads its packed weight. 4 bits: a row's
numbers depend on that row alone. 8 bits: inputs of more than `llm_int8_threshold` are found in all rows of a pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llgbm.runtime import UserError

if TYPE_CHECKING:
    from torch import nn

METHOD = "bitsandbytes"
BLOCK_BYTES = 4 / 64  # of a 4-bit weight: one scale in float32 for 64 values


def check_quantised(stored: Any) -> str | None:
    """Return why a `quantization_config` cannot be read here; None for one of bitsandbytes that can.

    The package is asked for last, so that a checkpoint of another method is not blamed on it.
    """
    known = stored if isinstance(stored, Mapping) else {}
    method = known.get("quant_method") or (METHOD if bits_of(known) else None)
    unquantised = "name the unquantised model that it was made from"
    if method != METHOD:
        return f"it is quantised ({method or 'by an unnamed method'}); {unquantised}"
    if bits_of(known) is None:
        return f"it is quantised ({METHOD}), and its config.json says neither 4 nor 8 bits; {unquantised}"
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        return f"it is quantised ({METHOD}), which is not installed: `pip install {METHOD}`, or {unquantised}"
    return None


def bits_of(stored: Mapping[str, Any]) -> int | None:
    """Return the bits of a weight by a `quantization_config`; None where it names none."""
    for bits in (4, 8):
        if stored.get(f"load_in_{bits}bit") or stored.get(f"_load_in_{bits}bit"):
            return bits
    return None


def model_bits(model: nn.Module) -> int | None:
    """Return the bits of a model's quantised weights by its config, loaded or without weights; None for a plain one."""
    stored = getattr(getattr(model, "config", None), "quantization_config", None)
    if stored is None:
        return None
    return bits_of(stored if isinstance(stored, Mapping) else stored.to_dict())


def bytes_a_weight(bits: int) -> float:
    """Return the bytes that a quantised weight takes, its share of the scales included."""
    return 0.5 + BLOCK_BYTES if bits == 4 else 1.0


def refuse_quantised(model: nn.Module, doing: str, instead: str) -> None:
    """Raise UserError for a quantised base where packed weights cannot take part."""
    if bits := model_bits(model):
        raise UserError(f"the base is quantised ({METHOD}, {bits} bits): {doing}; {instead}")
