"""Layers of a model that an adapter may have: linear ones of its text decoder, which its head is no part of."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """Say if a layer is GPT-2's Conv1D, a linear layer that keeps its weight as [in, out]."""
    kind = type(module)
    # By name: importing transformers takes seconds.
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def text_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a model's text decoder by name, without its head and its towers for images."""
    decoder = _ask(model, "get_decoder") or model
    inside = set(getattr(decoder, "language_model", decoder).modules()) - {head_of(model)}
    named = [(name, module) for name, module in model.named_modules() if module in inside]
    return {n: m for n, m in named if isinstance(m, nn.Linear) or is_conv1d(m)}


def head_of(model: nn.Module) -> Any:
    """Return the layer that turns states into logits; None for a model without one."""
    return _ask(model, "get_output_embeddings")


def _ask(model: nn.Module, name: str) -> Any:
    return getattr(model, name, lambda: None)()
