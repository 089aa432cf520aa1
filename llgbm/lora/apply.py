"""The base model under A adapters in one pass: the primitive that teachers, deltas, losses and evaluation share.

Rows of a batch are adapter-major: the first S/A rows belong to adapter 0, and so on. Nothing of ΔW = B A is formed; a
module costs two `bmm`. There are two ways, equal up to the order of sums: `states_at` runs the models that it knows by
`llgbm.lora.blocks`; all others, and `generate`, run with hooks on their modules (`adapters_applied`). The base is left
as it was: hooks live only inside the `with` block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llgbm.lora import blocks
from llgbm.lora.adapters import LoraBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]
_BLOCK = re.compile(r".*?\.\d+(?=\.)")
# What one pass without gradient may hold: tokens through the layers, and logits (tokens times vocabulary).
PASS_TOKENS, PASS_LOGITS = 2**16, 2**26
# Tokens that a CPU reads quickest at once: the states of more leave its cache.
CPU_TOKENS = 2**13


@dataclass(frozen=True)
class Applied:
    """Adapters for a pass. With `checkpointing` it keeps the inputs of blocks and runs each block once more."""

    batch: LoraBatch
    scaling: float
    checkpointing: bool = False


def states_at(
    base: PreTrainedModel,
    ids_ST: Tensor,
    positions_SQ: Tensor | None = None,
    applied: Applied | None = None,
    layers: Sequence[int] | None = None,
) -> Tensor:
    """Last-layer states [S, Q, D] of right-padded texts at positions, or [S, T, D] at all; without an LM head.

    With `layers` the states [N, S, Q, D] after so many blocks each; after the last one they are normalised, as in the
    library's `hidden_states`. Raises ValueError as `adapters_applied`.
    """
    if blocks.can_run(base, applied.batch if applied else None):
        return blocks.run(base, ids_ST, positions_SQ, applied, layers)
    with _under(base, applied):
        if layers is None:
            hidden = final_hidden(base, ids_ST)[None]
        else:
            output = base.base_model(input_ids=ids_ST, use_cache=False, output_hidden_states=True)
            hidden = torch.stack([output.hidden_states[layer] for layer in layers])
    if positions_SQ is not None:
        hidden = torch.stack([blocks.at_positions(own, positions_SQ) for own in hidden])
    return hidden[0] if layers is None else hidden


def states_at_marks(
    base: PreTrainedModel, ids_ST: Tensor, marks_ST: Tensor, applied: Applied | None = None
) -> Tensor:
    """Last-layer states [N, D] of right-padded texts at the N marked places, row by row."""
    if not blocks.can_run(base, applied.batch if applied else None):
        with _under(base, applied):
            return final_hidden(base, ids_ST)[marks_ST]
    counts_S = marks_ST.sum(1)
    order_ST = marks_ST.int().argsort(dim=1, descending=True, stable=True)
    valid_SQ = torch.arange(int(counts_S.max()), device=ids_ST.device) < counts_S[:, None]
    return blocks.run(base, ids_ST, order_ST[:, : valid_SQ.shape[1]], applied)[valid_SQ]


def _under(base: PreTrainedModel, applied: Applied | None) -> AbstractContextManager[None]:
    if applied is None:
        return nullcontext()
    return adapters_applied(base, applied.batch, applied.scaling, applied.checkpointing)


@contextmanager
def adapters_applied(
    base: PreTrainedModel, batch: LoraBatch, scaling: float, checkpointing: bool = False
) -> Iterator[None]:
    """Add `scaling * B A x` of each row's adapter to the Linear layers of `base` while the block runs.

    With `checkpointing` a backward pass finds only the inputs of the base's blocks in memory and runs each block once
    more; the gradients are the same. Raises ValueError if the base lacks a module that the batch adapts.
    """
    layers = dict(base.named_modules())
    missing = [name for name in batch.a if name not in layers]
    if missing:
        raise ValueError(
            f"the base has no module {missing[0]} ({len(missing)} missing): the adapters are of another base"
        )
    hooks = {name: _lora_hook(a_ARI, batch.b[name], scaling) for name, a_ARI in batch.a.items()}
    with ExitStack() as stack:
        for block, own in (_by_block(hooks) if checkpointing else {"": hooks}).items():
            on_modules = {layers[name]: hook for name, hook in own.items()}
            stack.enter_context(
                _block_checkpointed(layers[block], on_modules) if block else _hooked(on_modules)
            )
        yield


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Hook]) -> Iterator[None]:
    """Have the hooks called after their modules while the block runs."""
    with ExitStack() as stack:
        for module, hook in hooks.items():
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def _by_block(hooks: Mapping[str, Hook]) -> dict[str, dict[str, Hook]]:
    """Hooks of each block of the base: `model.layers.3` holds `model.layers.3.mlp.up_proj`; "" the rest."""
    blocks: dict[str, dict[str, Hook]] = {}
    for name, hook in hooks.items():
        numbered = _BLOCK.match(name)
        blocks.setdefault(numbered.group() if numbered else "", {})[name] = hook
    return blocks


@contextmanager
def blocks_checkpointed(base: nn.Module) -> Iterator[None]:
    """Let every block of a model keep its inputs only, for a training of the model's own (or PEFT's) parameters."""
    blocks = {
        found.group(): None
        for name, _ in base.named_modules()
        if (found := _BLOCK.match(f"{name}."))
    }
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_block_checkpointed(base.get_submodule(block), {}))
        yield


@contextmanager
def _block_checkpointed(block: nn.Module, hooks: Mapping[nn.Module, Hook]) -> Iterator[None]:
    """Let `block` keep its inputs only. It is run again after the `with` block, so it puts its hooks on by itself."""
    plain = block.forward

    def under_adapters(*args: Any, **kwargs: Any) -> Any:
        with _hooked(hooks):
            return plain(*args, **kwargs)

    block.forward = partial(
        checkpoint, under_adapters, use_reentrant=False, preserve_rng_state=False
    )
    try:
        yield
    finally:
        del block.forward


def _lora_hook(a_ARI: Tensor, b_AOR: Tensor, scaling: float) -> Hook:
    n_adapters = a_ARI.shape[0]

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        if x.shape[0] % n_adapters:
            raise ValueError(f"{x.shape[0]} rows cannot be shared out among {n_adapters} adapters")
        x_AMI = x.reshape(n_adapters, -1, x.shape[-1])
        low_AMR = torch.bmm(x_AMI, a_ARI.to(x).transpose(1, 2))
        flat = output.reshape(n_adapters, -1, output.shape[-1])
        # With the wide side contiguous, the backward products are two to three times faster on a CPU.
        b_ARO = b_AOR.to(x).transpose(1, 2).contiguous()
        return torch.baddbmm(flat, low_AMR, b_ARO, alpha=scaling).view_as(output)

    return hook


def final_hidden(
    base: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Last-layer hidden states [S, T, D] of the base as it stands, without its LM head and without a cache.

    Right-padded input needs no mask: in a causal model no position sees what comes after it.
    """
    return base.base_model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False
    ).last_hidden_state


def head_logits(base: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return the LM head's logits of hidden states [..., D], with the scales and the soft cap of the model's own head.

    Cohere multiplies by `logit_scale`, Falcon-H1 by `lm_head_multiplier`, Granite divides by `logits_scaling`, Gemma-2
    caps at `final_logit_softcapping`. `load_base` refuses models whose head does anything else.
    """
    logits = base.get_output_embeddings()(hidden)
    config = base.config.get_text_config()
    for name in ("logit_scale", "lm_head_multiplier"):
        if factor := getattr(config, name, None):
            logits = logits * factor
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def quickest_tokens(device: torch.device) -> int:
    """Return how many tokens without gradient a pass on a device should hold, for speed rather than for memory."""
    return CPU_TOKENS if device.type == "cpu" else PASS_TOKENS


def chunks(
    n_rows: int, tokens_a_row: int, at_most: int = 48, tokens: int = PASS_TOKENS
) -> list[slice]:
    """Slices of rows that are run in one pass: as many as keep it within `tokens`, and at least one."""
    size = max(1, min(at_most, tokens // max(1, tokens_a_row)))
    return [slice(start, start + size) for start in range(0, n_rows, size)]
