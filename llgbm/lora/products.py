"""Differentiable pieces of a decoder block under A adapters, written to read and keep few tensors.

Letters beyond those of `llgbm`: M rows of one adapter, I inputs, O outputs, G ranks of several layers side by side, S
texts, Q positions read, H heads, K heads of keys and values, E width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Texts up to this long attend by two products, which is quicker on a CPU and holds all scores [T, T].
SHORT_TEXT = 64


@cache
def _kernels() -> Any:
    """`llgbm.lora.kernels`, imported where there is a GPU."""
    from llgbm.lora import kernels

    return kernels


@cache
def _attention() -> Any:
    """`llgbm.lora.attention`, imported where there is a GPU."""
    from llgbm.lora import attention

    return attention


def on_gpu(x: Tensor) -> bool:
    """True where passes over memory are what costs, and `llgbm.lora.kernels` saves them."""
    return x.is_cuda and _kernels().are_usable()


@dataclass(frozen=True)
class JoinedLinears:
    """Frozen Linear layers that read one input, as a single product; `norm_I` is the weight of the norm before them.

    Their weights are put together anew in each pass, forward and backward: a copy is cheap beside the products, needs
    no memory meanwhile and is never out of date. `adapted` are the indices of the layers that have an adapter.
    """

    layers: tuple[nn.Linear, ...]
    norm_I: Tensor | None
    adapted: tuple[int, ...]

    def weight_OI(self) -> Tensor:
        weights = [layer.weight for layer in self.layers]
        joined = weights[0] if len(weights) == 1 else torch.cat(weights)
        return joined if self.norm_I is None else joined * self.norm_I

    def bias_O(self) -> Tensor | None:
        if all(layer.bias is None for layer in self.layers):
            return None
        return torch.cat(
            [
                layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
                for layer in self.layers
            ]
        )

    def columns(self) -> list[slice]:
        """Outputs of each adapted layer."""
        ends = torch.tensor([layer.out_features for layer in self.layers]).cumsum(0).tolist()
        return [slice(ends[i] - self.layers[i].out_features, ends[i]) for i in self.adapted]

    def stack(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """All A [A, G, I] one below the other, and all B [A, G, O] transposed, on a diagonal of blocks."""
        dtype = self.layers[0].weight.dtype
        a_AGI = a[0] if len(a) == 1 else torch.cat(list(a), dim=1)
        if self.norm_I is not None:
            a_AGI = a_AGI * self.norm_I
        if len(self.layers) == 1:
            b_AGO = b[0].transpose(1, 2).to(dtype)
            return a_AGI.to(dtype), b_AGO if b_AGO.is_cuda else b_AGO.contiguous()
        n_out = sum(layer.out_features for layer in self.layers)
        b_AGO = a_AGI.new_zeros(*a_AGI.shape[:2], n_out, dtype=dtype)
        rank = b[0].shape[2]
        for index, (own, columns) in enumerate(zip(b, self.columns(), strict=True)):
            b_AGO[:, index * rank : (index + 1) * rank, columns] = own.transpose(1, 2)
        return a_AGI.to(dtype), b_AGO

    def split(self, a_AGI: Tensor, b_AGO: Tensor) -> list[Tensor]:
        """Gradients of each A, then of each B, from those of `stack`."""
        if self.norm_I is not None:
            a_AGI = a_AGI * self.norm_I
        n = len(self.adapted)
        rows = b_AGO.chunk(n, dim=1)
        own = [row[..., c].transpose(1, 2) for row, c in zip(rows, self.columns(), strict=True)]
        return [*a_AGI.chunk(n, dim=1), *own]


class _Project(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_AMI: Tensor,
        passed_AMO: Tensor | None,
        joined: JoinedLinears,
        scaling: float,
        *adapters: Tensor,
    ) -> Tensor:
        ctx.joined, ctx.scaling, ctx.n_adapted = joined, scaling, len(adapters) // 2
        weight_OI, bias_O = joined.weight_OI(), joined.bias_O()
        if not adapters:
            y_AMO = F.linear(x_AMI, weight_OI, bias_O)
            return y_AMO if passed_AMO is None else y_AMO.add_(passed_AMO)
        a_AGI, b_AGO = joined.stack(adapters[: ctx.n_adapted], adapters[ctx.n_adapted :])
        # Skinny products are quicker on a CPU with the long side last.
        low_AGM = torch.bmm(a_AGI, x_AMI.transpose(1, 2))
        ctx.save_for_backward(x_AMI, low_AGM, a_AGI, b_AGO)
        if on_gpu(x_AMI):
            beside = bias_O if passed_AMO is None else passed_AMO
            y_AMO = _add_product(_expand(low_AGM, b_AGO, scaling, beside), x_AMI, weight_OI.T)
            return y_AMO if bias_O is None or passed_AMO is None else y_AMO.add_(bias_O)
        y_AMO = F.linear(x_AMI, weight_OI, bias_O)
        y_AMO.baddbmm_(low_AGM.transpose(1, 2), b_AGO, alpha=scaling)
        return y_AMO if passed_AMO is None else y_AMO.add_(passed_AMO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_AMO: Tensor) -> tuple[Tensor | None, ...]:
        joined, x_grad = ctx.joined, None
        passed_grad = g_AMO if ctx.needs_input_grad[1] else None
        g_AMO = g_AMO.contiguous()
        if not ctx.n_adapted:
            return torch.matmul(g_AMO, joined.weight_OI()), passed_grad, None, None
        x_AMI, low_AGM, a_AGI, b_AGO = ctx.saved_tensors
        low_grad = torch.bmm(b_AGO, g_AMO.transpose(1, 2)).mul_(ctx.scaling)
        if ctx.needs_input_grad[0] and on_gpu(g_AMO):
            x_grad = _add_product(_expand(low_grad, a_AGI), g_AMO, joined.weight_OI())
        elif ctx.needs_input_grad[0]:
            x_grad = torch.matmul(g_AMO, joined.weight_OI())
            x_grad.baddbmm_(low_grad.transpose(1, 2), a_AGI)
        found = joined.split(
            torch.bmm(low_grad, x_AMI), torch.bmm(low_AGM, g_AMO).mul_(ctx.scaling)
        )
        return x_grad, passed_grad, None, None, *found


def _expand(
    low_AGM: Tensor, wide_AGO: Tensor, factor: float = 1.0, beside: Tensor | None = None
) -> Tensor:
    """factor lowᵀ wide + beside, [A, M, O]; `beside` broadcasts to it."""
    if beside is not None:
        return torch.baddbmm(beside, low_AGM.transpose(1, 2), wide_AGO, alpha=factor)
    out = wide_AGO.new_empty(low_AGM.shape[0], low_AGM.shape[2], wide_AGO.shape[2])
    return out.baddbmm_(low_AGM.transpose(1, 2), wide_AGO, beta=0, alpha=factor)


def _add_product(y_AMO: Tensor, x_AMI: Tensor, weight_IO: Tensor) -> Tensor:
    """Add x W to y in place: the product reads y where it writes, which saves a pass over the wider side."""
    y_AMO.view(-1, y_AMO.shape[-1]).addmm_(x_AMI.reshape(-1, x_AMI.shape[-1]), weight_IO)
    return y_AMO


def project(
    x_AMI: Tensor,
    joined: JoinedLinears,
    scaling: float,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    passed_AMO: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + bias + scaling x Aᵀ Bᵀ of layers side by side, [A, M, O]; W and bias get no gradient.

    `passed_AMO` is what passes the layers by and is added to them.
    """
    return _Project.apply(x_AMI, passed_AMO, joined, scaling, *a, *b)


class _Normalise(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, epsilon: float) -> Tensor:
        at_least = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=at_least)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        unit = (x * scale).to(x.dtype)
        ctx.save_for_backward(unit, scale)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        unit, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(g, unit).unsqueeze(-1).div_(-unit.shape[-1])
        return torch.addcmul(g, unit, along).mul_(scale.to(g.dtype)), None


def normalise(x: Tensor, epsilon: float) -> Tensor:
    """x over its root mean square, in float32 at least: RMSNorm without its weight."""
    return _Normalise.apply(x, epsilon)


class _NormaliseInOne(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        out, scales_N = _kernels().normalise(x, weight_D, epsilon)
        ctx.save_for_backward(x, weight_D, scales_N)
        return x, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_x: Tensor, g: Tensor) -> tuple[Tensor, None, None]:
        return _kernels().normalise_backward(g, *ctx.saved_tensors, of_x), None, None


def normalise_before(
    x: Tensor, weight_D: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Normalise what Linear layers read; return x for what passes them by, the norm, and its weight where it is left.

    A weight that is left is for `JoinedLinears`. On a GPU the gradients of both are added in one kernel.
    """
    if on_gpu(x):
        return *_NormaliseInOne.apply(x, weight_D, epsilon), None
    return x, normalise(x, epsilon), weight_D


class _Gate(Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        if on_gpu(both):
            ctx.save_for_backward(both)
            return _kernels().gate(both)
        gate, up = both.chunk(2, dim=-1)
        active = F.silu(gate)
        ctx.save_for_backward(both, active)
        return active * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        if on_gpu(g):
            return _kernels().gate_backward(*ctx.saved_tensors, g)
        both, active = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        found = torch.empty_like(both)
        gate_grad, up_grad = found.chunk(2, dim=-1)
        torch.mul(g, active, out=up_grad)
        torch.ops.aten.silu_backward.grad_input(g * up, gate, grad_input=gate_grad)
        return found


def gate(both: Tensor) -> Tensor:
    """silu(left half) * right half over the last axis."""
    return _Gate.apply(both)


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(g, cos, sin, back=True), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    if on_gpu(x):
        return _kernels().rotate(x, cos, sin, back)
    if back:
        sin = -sin
    # Rows as long as all heads, and halves of heads swapped in one copy: short rows take a CPU twice as long.
    n_heads, width = x.shape[-2:]
    cos, sin = (t.expand(*t.shape[:-2], n_heads, width).flatten(-2) for t in (cos, sin))
    other = torch.arange(2 * n_heads, device=x.device) ^ 1
    swapped = x.reshape(-1, 2 * n_heads, width // 2).index_select(1, other)
    turned = (x.flatten(-2) * cos).addcmul_(swapped.view(*x.shape[:-2], -1), sin)
    return turned.unflatten(-1, (n_heads, width))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of [S, T, H, E]; `sin` has its left half negated. Both broadcast to x."""
    return _Rotate.apply(x, cos, sin)


def attend(
    q_SQHE: Tensor, k_STKE: Tensor, v_STKE: Tensor, positions_SQ: Tensor | None = None
) -> Tensor:
    """Causal attention of queries at `positions_SQ` (default: everywhere), [S, Q, H * E]. H is a multiple of K."""
    n_tokens = k_STKE.shape[1]
    steps = torch.arange(n_tokens, device=k_STKE.device)
    at = steps[None] if positions_SQ is None else positions_SQ
    seen_SQT = steps <= at[..., None]
    if n_tokens > SHORT_TEXT or q_SQHE.is_cuda:
        mask = None if positions_SQ is None else seen_SQT[:, None]
        q, k, v = (t.transpose(1, 2) for t in (q_SQHE, k_STKE, v_STKE))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(2)
    return _attend_short(q_SQHE, k_STKE, v_STKE, seen_SQT)


def _attend_short(q_SQHE: Tensor, k_STKE: Tensor, v_STKE: Tensor, seen_SQT: Tensor) -> Tensor:
    n_texts, n_read, n_heads, width = q_SQHE.shape
    n_kv = k_STKE.shape[2]
    shared = n_heads // n_kv
    q = q_SQHE.unflatten(2, (n_kv, shared)).permute(0, 2, 3, 1, 4)
    q = q.reshape(n_texts * n_kv, shared * n_read, width)
    k, v = (t.transpose(1, 2).flatten(0, 1) for t in (k_STKE, v_STKE))
    unseen = torch.zeros(seen_SQT.shape, dtype=q.dtype, device=q.device)
    unseen = unseen.masked_fill_(~seen_SQT, -torch.inf).repeat(1, shared, 1)
    if len(unseen) > 1:
        unseen = unseen.repeat_interleave(n_kv, 0)
    scores = torch.baddbmm(unseen, q, k.transpose(1, 2), alpha=width**-0.5)
    out = torch.bmm(scores.softmax(-1), v).view(n_texts, n_kv, shared, n_read, width)
    return out.permute(0, 3, 1, 2, 4).reshape(n_texts, n_read, n_heads * width)


def can_attend_rotated(x_STD: Tensor, heads: tuple[int, int, int]) -> bool:
    """Return whether `attend_rotated` takes texts like x; heads of queries, of keys and values, and their width."""
    return (
        on_gpu(x_STD)
        and x_STD.shape[1] <= _attention().LONGEST
        and _attention().can_attend(*heads, x_STD.dtype, str(x_STD.device))
    )


class _AttendRotated(Function):
    @staticmethod
    def forward(
        ctx: Any, own_STO: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv: int
    ) -> Tensor:
        ctx.save_for_backward(own_STO, cos, sin)
        ctx.heads = n_heads, n_kv
        return _attention().attend(own_STO, cos, sin, n_heads, n_kv)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        found = _attention().attend_backward(*ctx.saved_tensors, *ctx.heads, g)
        return found, None, None, None, None


def attend_rotated(own_STO: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv: int) -> Tensor:
    """Causal attention [S, T, H * E] of queries, keys and values side by side; it rotates the first two itself."""
    return _AttendRotated.apply(own_STO, cos, sin, n_heads, n_kv)
