"""Layers of a model that an adapter may have: Linear layers of its text decoder, which its head is no part of."""

from __future__ import annotations

from typing import Any

from torch import nn

# Parts of models that read images or sounds beside text.
OTHER_TOWERS = {"vision_tower", "vision_model", "visual", "audio_tower", "multi_modal_projector"}


def text_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the Linear layers of a model's text decoder by name, without its head and its towers for images."""
    decoder = _ask(model, "get_decoder") or model
    inside = set(getattr(decoder, "language_model", decoder).modules()) - {head_of(model)}
    named = [(n, m) for n, m in model.named_modules() if m in inside and isinstance(m, nn.Linear)]
    return {name: module for name, module in named if not OTHER_TOWERS & set(name.split("."))}


def head_of(model: nn.Module) -> Any:
    """Return the layer that turns states into logits; None for a model without one."""
    return _ask(model, "get_output_embeddings")


def _ask(model: nn.Module, name: str) -> Any:
    return getattr(model, name, lambda: None)()
