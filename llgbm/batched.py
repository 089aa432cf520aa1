"""The base model under A adapters in one pass: the primitive that teachers, deltas, losses and evaluation share.

Rows of a batch are adapter-major: the first S/A rows belong to adapter 0, and so on. Nothing of ΔW = B A is formed; a
module costs two `bmm`. The base is left as it was: hooks live only inside the `with` block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llgbm.lora import LoraBatch

# What one pass without gradient may hold: tokens through the layers, and logits (tokens times vocabulary).
PASS_TOKENS, PASS_LOGITS = 2**16, 2**26


@contextmanager
def adapters_applied(base: PreTrainedModel, batch: LoraBatch, scaling: float) -> Iterator[None]:
    """Add `scaling * B A x` of each row's adapter to the Linear layers of `base` while the block runs.

    Raises ValueError if the base lacks a module that the batch adapts.
    """
    layers = dict(base.named_modules())
    missing = [name for name in batch.a if name not in layers]
    if missing:
        raise ValueError(
            f"the base has no module {missing[0]} ({len(missing)} missing): the adapters are of another base"
        )
    handles = []
    try:
        for name, a_ARI in batch.a.items():
            handles.append(layers[name].register_forward_hook(_lora_hook(a_ARI, batch.b[name], scaling)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _lora_hook(a_ARI: Tensor, b_AOR: Tensor, scaling: float):
    n_adapters = a_ARI.shape[0]

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        if x.shape[0] % n_adapters:
            raise ValueError(f"{x.shape[0]} rows cannot be shared out among {n_adapters} adapters")
        x_AMI = x.reshape(n_adapters, -1, x.shape[-1])
        low_AMR = torch.bmm(x_AMI, a_ARI.to(x).transpose(1, 2))
        flat = output.reshape(n_adapters, -1, output.shape[-1])
        b_ARO = b_AOR.to(x).transpose(1, 2)
        return torch.baddbmm(flat, low_AMR, b_ARO, alpha=scaling).view_as(output)

    return hook


def final_hidden(base: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Last-layer hidden states [S, T, D] of the base as it stands, without its LM head and without a cache.

    Right-padded input needs no mask: in a causal model no position sees what comes after it.
    """
    return base.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def head_logits(base: PreTrainedModel, hidden: Tensor) -> Tensor:
    """LM-head logits of hidden states [..., D]."""
    return base.get_output_embeddings()(hidden)


def chunks(n_rows: int, tokens_a_row: int, at_most: int = 48) -> list[slice]:
    """Slices of rows that are run in one pass: as many as keep it within `PASS_TOKENS`, and at least one."""
    size = max(1, min(at_most, PASS_TOKENS // max(1, tokens_a_row)))
    return [slice(start, start + size) for start in range(0, n_rows, size)]
