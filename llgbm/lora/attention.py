"""Attention of short texts as one Triton kernel for half precision, rotation and all: no score leaves the chip.

`llgbm.lora.products` calls it for tensors on a GPU where `can_attend` says so. It computes in float32, multiplies in
the dtype of its inputs, and gives the same bits each time. Weights are computed anew on the way back.

Letters: see `llgbm.lora.products`; O is all heads side by side.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from llgbm.lora.kernels import say_slower

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without it
    triton = None

HALF = (torch.float16, torch.bfloat16)
# Products on the chip take sides of at least 16; the scores of longer texts and wider heads have no room there.
LEAST, LONGEST, WIDEST = 16, 64, 128
# Below all scores, and finite: rows beyond the end of a text have nothing but such scores.
UNSEEN = -1e30


if triton is not None:

    @triton.jit
    def _turned(left, right, cos, cos_right, sin, sin_right):
        return left * cos + right * sin, right * cos_right + left * sin_right

    @triton.jit
    def _angles(cos, sin, at, inside, half):
        """Cosines and sines of both halves of a head."""
        c = tl.load(cos + at, inside, 0.0).to(tl.float32)
        c_right = tl.load(cos + at + half, inside, 0.0).to(tl.float32)
        s = tl.load(sin + at, inside, 0.0).to(tl.float32)
        s_right = tl.load(sin + at + half, inside, 0.0).to(tl.float32)
        return c, c_right, s, s_right

    @triton.jit
    def _head(own, at, inside, half, cos, cos_right, sin, sin_right):
        """Both halves of a head, rotated, in the dtype of `own`."""
        left = tl.load(own + at, inside, 0.0).to(tl.float32)
        right = tl.load(own + at + half, inside, 0.0).to(tl.float32)
        left, right = _turned(left, right, cos, cos_right, sin, sin_right)
        return left.to(own.dtype.element_ty), right.to(own.dtype.element_ty)

    @triton.jit
    def _weights(q, q_right, k, k_right, seen, factor, UNSEEN: tl.constexpr):
        scores = tl.dot(q_right, tl.trans(k_right), tl.dot(q, tl.trans(k)))
        scores = tl.where(seen, scores * factor, UNSEEN)
        weights = tl.exp(scores - tl.max(scores, 1)[:, None])
        return weights / tl.sum(weights, 1)[:, None]

    @triton.jit
    def _attend_kernel(
        own,
        cos,
        sin,
        out,
        n_tokens,
        factor,
        H: tl.constexpr,
        K: tl.constexpr,
        E: tl.constexpr,
        T: tl.constexpr,
        UNSEEN: tl.constexpr,
    ):
        half: tl.constexpr = E // 2
        shared: tl.constexpr = H // K
        text, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
        t = tl.arange(0, T)[:, None]
        narrow, wide = tl.arange(0, half)[None, :], tl.arange(0, E)[None, :]
        inside = t < n_tokens
        c, c_right, s, s_right = _angles(cos, sin, t * E + narrow, inside, half)
        row = (text * n_tokens + t) * ((H + 2 * K) * E)
        k, k_right = _head(
            own, row + (H + group) * E + narrow, inside, half, c, c_right, s, s_right
        )
        v = tl.load(own + row + (H + K + group) * E + wide, inside, 0.0)
        seen = t >= tl.arange(0, T)[None, :]
        for i in range(shared):
            head = group * shared + i
            q, q_right = _head(own, row + head * E + narrow, inside, half, c, c_right, s, s_right)
            weights = _weights(q, q_right, k, k_right, seen, factor, UNSEEN)
            found = tl.dot(weights.to(v.dtype), v)
            at = (text * n_tokens + t) * (H * E) + head * E + wide
            tl.store(out + at, found.to(v.dtype), inside)

    @triton.jit
    def _attend_backward_kernel(
        own,
        cos,
        sin,
        g,
        grad,
        n_tokens,
        factor,
        H: tl.constexpr,
        K: tl.constexpr,
        E: tl.constexpr,
        T: tl.constexpr,
        UNSEEN: tl.constexpr,
    ):
        half: tl.constexpr = E // 2
        shared: tl.constexpr = H // K
        text, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
        t = tl.arange(0, T)[:, None]
        narrow, wide = tl.arange(0, half)[None, :], tl.arange(0, E)[None, :]
        inside = t < n_tokens
        c, c_right, s, s_right = _angles(cos, sin, t * E + narrow, inside, half)
        row = (text * n_tokens + t) * ((H + 2 * K) * E)
        at_k, at_v = row + (H + group) * E + narrow, row + (H + K + group) * E + wide
        k, k_right = _head(own, at_k, inside, half, c, c_right, s, s_right)
        v = tl.load(own + at_v, inside, 0.0)
        seen = t >= tl.arange(0, T)[None, :]
        of_k = tl.zeros((T, half), tl.float32)
        of_k_right = tl.zeros((T, half), tl.float32)
        of_v = tl.zeros((T, E), tl.float32)
        for i in range(shared):
            head = group * shared + i
            at_q = row + head * E + narrow
            q, q_right = _head(own, at_q, inside, half, c, c_right, s, s_right)
            weights = _weights(q, q_right, k, k_right, seen, factor, UNSEEN)
            at = (text * n_tokens + t) * (H * E) + head * E + wide
            upstream = tl.load(g + at, inside, 0.0)
            of_weights = tl.dot(upstream, tl.trans(v))
            along = tl.sum(weights * of_weights, 1)[:, None]
            of_scores = (weights * (of_weights - along) * factor).to(v.dtype)
            of_v = tl.dot(tl.trans(weights.to(v.dtype)), upstream, of_v)
            of_k = tl.dot(tl.trans(of_scores), q, of_k)
            of_k_right = tl.dot(tl.trans(of_scores), q_right, of_k_right)
            left, right = _turned(
                tl.dot(of_scores, k), tl.dot(of_scores, k_right), c, c_right, s_right, s
            )
            tl.store(grad + at_q, left.to(v.dtype), inside)
            tl.store(grad + at_q + half, right.to(v.dtype), inside)
        left, right = _turned(of_k, of_k_right, c, c_right, s_right, s)
        tl.store(grad + at_k, left.to(v.dtype), inside)
        tl.store(grad + at_k + half, right.to(v.dtype), inside)
        tl.store(grad + at_v, of_v.to(v.dtype), inside)


@cache
def can_attend(n_heads: int, n_kv: int, width: int, dtype: torch.dtype, device: str) -> bool:
    """Return whether `attend` takes heads of these numbers and width; where they do not fit this GPU, say so once."""
    whole = width & (width - 1) == 0 and 2 * LEAST <= width <= WIDEST
    if triton is None or dtype not in HALF or not whole:
        return False
    try:
        own = torch.zeros(1, LONGEST, (n_heads + 2 * n_kv) * width, dtype=dtype, device=device)
        angles = own.new_zeros(LONGEST, 1, width)
        out = attend(own, angles, angles, n_heads, n_kv)
        attend_backward(own, angles, angles, n_heads, n_kv, out)
    except Exception as error:
        say_slower("attention takes several kernels on the GPU here", error)
        return False
    return True


def _plan(own: Tensor, n_heads: int, n_kv: int) -> tuple[Any, ...]:
    width = own.shape[-1] // (n_heads + 2 * n_kv)
    n_tokens = own.shape[1]
    side = max(LEAST, triton.next_power_of_2(n_tokens))
    return n_tokens, width**-0.5, n_heads, n_kv, width, side, UNSEEN


def attend(own_STO: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv: int) -> Tensor:
    """Causal attention [S, T, H E] of queries, keys and values side by side, the first two rotated in it.

    `cos` and `sin` are [T, 1, E], the left half of `sin` negated; T is at most `LONGEST`.
    """
    own = own_STO.contiguous()
    plan = _plan(own, n_heads, n_kv)
    out = own.new_empty(*own.shape[:2], n_heads * plan[4])
    _attend_kernel[(len(own), n_kv)](
        own, cos.contiguous(), sin.contiguous(), out, *plan, num_warps=4, num_stages=2
    )
    return out


def attend_backward(
    own_STO: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv: int, g: Tensor
) -> Tensor:
    """Gradient of `attend` to [S, T, O]; weights are computed anew."""
    own = own_STO.contiguous()
    plan = _plan(own, n_heads, n_kv)
    grad = torch.empty_like(own)
    n_warps = 8 if plan[4] > LONGEST else 4
    _attend_backward_kernel[(len(own), n_kv)](
        own,
        cos.contiguous(),
        sin.contiguous(),
        g.contiguous(),
        grad,
        *plan,
        num_warps=n_warps,
        num_stages=2,
    )
    return grad
