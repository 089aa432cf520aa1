"""Forward pass of Qwen2 and Llama models under A adapters, written out: the quick way of `llgbm.lora.apply`.

It does what the model's own modules do with hooks on them, in fewer passes over memory, and only what is asked: the
last block's queries, attention output and MLP at the positions that are read. Letters: see `llgbm.lora.products`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llgbm.lora.adapters import LoraBatch
from llgbm.lora.products import (
    JoinedLinears,
    attend,
    attend_rotated,
    can_attend_rotated,
    gate,
    normalise_before,
    project,
    rotate,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llgbm.lora.apply import Applied

# Decoders whose blocks are those below; a subclass may do something else.
KNOWN = {
    "transformers.models.qwen2.modeling_qwen2.Qwen2Model",
    "transformers.models.llama.modeling_llama.LlamaModel",
}
QUERY, KEY, VALUE, OUT = (f"self_attn.{kind}_proj" for kind in "qkvo")
GATE, UP, DOWN = (f"mlp.{kind}_proj" for kind in ("gate", "up", "down"))
LINEARS = (QUERY, KEY, VALUE, OUT, GATE, UP, DOWN)


def can_run(base: PreTrainedModel, batch: LoraBatch | None) -> bool:
    """True where the pass below gives what the model itself would give with hooks for these adapters.

    It is an allow-list: other architectures and activations, sliding windows, dropout, quantised layers, hooks or
    wrappers of others, weights that are trained, and autocast are left to the model.
    """
    decoder: Any = base.base_model
    if not has_known_blocks(base) or base.training:
        return False
    if torch.is_autocast_enabled(base.device.type):
        return False
    prefix = _prefix(base)
    known = {f"{prefix}{i}.{name}" for i, name in product(range(len(decoder.layers)), LINEARS)}
    if batch is not None and not batch.a.keys() <= known:
        return False
    if torch.is_grad_enabled() and any(p.requires_grad for p in base.parameters()):
        return False
    windows = {getattr(layer.self_attn, "sliding_window", None) for layer in decoder.layers}
    linears = [layer.get_submodule(name) for layer, name in product(decoder.layers, LINEARS)]
    return (
        windows == {None}
        and all(type(linear) is nn.Linear for linear in linears)
        and not any(_is_changed(module) for module in base.modules())
    )


def has_known_blocks(base: PreTrainedModel) -> bool:
    """True for an architecture and an activation that the pass below is written for."""
    kind = type(base.base_model)
    known = f"{kind.__module__}.{kind.__qualname__}" in KNOWN
    return known and base.config.hidden_act == "silu"


def _is_changed(module: nn.Module) -> bool:
    """True for a module with a forward of its own or a hook, but for what `output_hidden_states` leaves behind."""
    hooks = (
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
    )
    return "forward" in vars(module) or any(
        getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks
    )


def _prefix(base: PreTrainedModel) -> str:
    """Part of a module's name before the block's number."""
    return f"{base.base_model_prefix}.layers."


class Pass:
    """One pass of a base over texts of one width [S, T], adapter-major."""

    def __init__(self, base: PreTrainedModel, ids_ST: Tensor, applied: Applied | None) -> None:
        self.decoder: Any = base.base_model
        self.config, self.prefix = base.config, _prefix(base)
        self.a = applied.batch.a if applied else {}
        self.b = applied.batch.b if applied else {}
        self.scaling = applied.scaling if applied else 1.0
        self.n_adapters = applied.batch.n_adapters if applied else 1
        if len(ids_ST) % self.n_adapters:
            raise ValueError(
                f"{len(ids_ST)} rows cannot be shared out among {self.n_adapters} adapters"
            )
        self.cos, self.sin = self._rotation(ids_ST.shape[1])

    def _rotation(self, n_tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, 1, E] of the model's own rotary embedding, the left half of the sines negated."""
        weight = self.decoder.embed_tokens.weight
        steps = torch.arange(n_tokens, device=weight.device)[None]
        cos, sin = self.decoder.rotary_emb(weight, steps)
        left, right = sin[0, :, None].chunk(2, dim=-1)
        return cos[0, :, None], torch.cat([-left, right], dim=-1)

    def project(
        self,
        index: int,
        names: tuple[str, ...],
        x: Tensor,
        norm_I: Tensor | None = None,
        passed: Tensor | None = None,
    ) -> Tensor:
        """Outputs [S, X, O] of Linear layers of a block, side by side, at x [S, X, I] times the weight of a norm.

        `passed` [S, X, O] is added to them.
        """
        block = self.decoder.layers[index]
        layers = tuple(block.get_submodule(name) for name in names)
        full = [f"{self.prefix}{index}.{name}" for name in names]
        adapted = tuple(i for i, name in enumerate(full) if name in self.a)
        joined = JoinedLinears(layers, norm_I, adapted)
        y_AMO = project(
            self._by_adapter(x),
            joined,
            self.scaling,
            [self.a[full[i]] for i in adapted],
            [self.b[full[i]] for i in adapted],
            None if passed is None else self._by_adapter(passed),
        )
        return y_AMO.view(*x.shape[:2], -1)

    def _by_adapter(self, x: Tensor) -> Tensor:
        return x.reshape(self.n_adapters, -1, x.shape[-1])

    def block(self, index: int, x_STD: Tensor, positions_SQ: Tensor | None = None) -> Tensor:
        """Run a block; with positions only what its states there need, [S, Q, D]."""
        layer, epsilon = self.decoder.layers[index], self.config.rms_norm_eps
        x, unit, norm = normalise_before(x_STD, layer.input_layernorm.weight, epsilon)
        mixed = self._attention(index, unit, norm, positions_SQ)
        x = x if positions_SQ is None else at_positions(x, positions_SQ)
        x = self.project(index, (OUT,), mixed, passed=x)
        x, unit, norm = normalise_before(x, layer.post_attention_layernorm.weight, epsilon)
        both = self.project(index, (GATE, UP), unit, norm)
        return self.project(index, (DOWN,), gate(both), passed=x)

    def _attention(
        self, index: int, unit_STD: Tensor, norm: Tensor | None, positions_SQ: Tensor | None
    ) -> Tensor:
        """Heads [S, Q, H * E] after attention."""
        n_q, n_kv = self.config.num_attention_heads, self.config.num_key_value_heads
        heads = (n_q, n_kv, self.cos.shape[-1])
        if positions_SQ is None and can_attend_rotated(unit_STD, heads):
            own = self.project(index, (QUERY, KEY, VALUE), unit_STD, norm)
            return attend_rotated(own, self.cos, self.sin, n_q, n_kv)
        return attend(*self._heads(index, unit_STD, norm, positions_SQ), positions_SQ)

    def _heads(
        self, index: int, unit_STD: Tensor, norm: Tensor | None, positions_SQ: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [S, Q, H, E], keys and values [S, T, K, E], queries and keys rotated."""
        n_q, n_kv = self.config.num_attention_heads, self.config.num_key_value_heads
        cos, sin = self.cos, self.sin
        width = cos.shape[-1]
        if positions_SQ is None:
            own = self.project(index, (QUERY, KEY, VALUE), unit_STD, norm)
            turning, v = own.unflatten(-1, (-1, width)).split([n_q + n_kv, n_kv], dim=2)
            q, k = rotate(turning, cos, sin).split([n_q, n_kv], dim=2)
            return q, k, v
        own = self.project(index, (KEY, VALUE), unit_STD, norm)
        k, v = own.unflatten(-1, (-1, width)).split(n_kv, dim=2)
        q = self.project(index, (QUERY,), at_positions(unit_STD, positions_SQ), norm)
        q = rotate(q.unflatten(-1, (-1, width)), cos[positions_SQ], sin[positions_SQ])
        return q, rotate(k, cos, sin), v


def at_positions(x_STD: Tensor, positions_SQ: Tensor) -> Tensor:
    """Read [S, Q, D] at positions of each text."""
    return x_STD.gather(1, positions_SQ[..., None].expand(-1, -1, x_STD.shape[-1]))


def run(
    base: PreTrainedModel,
    ids_ST: Tensor,
    positions_SQ: Tensor | None = None,
    applied: Applied | None = None,
    layers: Sequence[int] | None = None,
) -> Tensor:
    """Compute what `apply.states_at` says, for a base and adapters that `can_run` accepts."""
    one, decoder = Pass(base, ids_ST, applied), cast(Any, base.base_model)
    x, last = decoder.embed_tokens(ids_ST), len(decoder.layers) - 1
    inner: list[Tensor] = []
    for index in range(last + 1):
        if layers is not None:
            inner.append(x if positions_SQ is None else at_positions(x, positions_SQ))
        block = partial(one.block, index)
        if applied is not None and applied.checkpointing:
            block = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
        x = block(x, positions_SQ) if index == last else block(x)
    states = decoder.norm(x)
    return states if layers is None else torch.stack([[*inner, states][i] for i in layers])
