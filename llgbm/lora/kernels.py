"""Pointwise parts of a decoder block as Triton kernels: on a GPU they cost what their reads and writes cost.

Each reads its inputs once, computes in float32 and rounds once. `llgbm.lora.products` calls them for tensors on a GPU
where `are_usable`; elsewhere it computes the same formulas by torch.

Letters: N rows, D width of a row, F half the width of `both`, H heads, E width of a head.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from llgbm.runtime import say

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without it
    triton = None

# Elements of a row that one program of the gate takes.
PART = 1024


@cache
def are_usable() -> bool:
    """Return whether kernels can be built for this machine's GPU; where not, say so once."""
    try:
        if triton is None:
            raise ImportError("Triton is not installed")
        gate(torch.ones(1, 2, device="cuda"))
    except Exception as error:
        say_slower("no kernels can be built for the GPU here", error)
        return False
    return True


def say_slower(found: str, error: Exception) -> None:
    """Say what was found of this GPU, and why, in one line."""
    cause = str(error).strip().partition("\n")[0] or type(error).__name__
    say(f"{found}, so passes take longer: {cause}")


if triton is not None:

    @triton.jit
    def _gate_kernel(both, out, width, PART: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * PART + tl.arange(0, PART)
        inside = at < width
        left = tl.load(both + row * 2 * width + at, inside, 0.0).to(tl.float32)
        right = tl.load(both + row * 2 * width + width + at, inside, 0.0).to(tl.float32)
        tl.store(out + row * width + at, left * tl.sigmoid(left) * right, inside)

    @triton.jit
    def _gate_backward_kernel(both, g, out, width, PART: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * PART + tl.arange(0, PART)
        inside = at < width
        left = tl.load(both + row * 2 * width + at, inside, 0.0).to(tl.float32)
        right = tl.load(both + row * 2 * width + width + at, inside, 0.0).to(tl.float32)
        upstream = tl.load(g + row * width + at, inside, 0.0).to(tl.float32)
        sigmoid = tl.sigmoid(left)
        active = left * sigmoid
        slope = sigmoid + active * (1.0 - sigmoid)
        tl.store(out + row * 2 * width + at, upstream * right * slope, inside)
        tl.store(out + row * 2 * width + width + at, upstream * active, inside)

    @triton.jit
    def _normalise_kernel(x, weight, out, scales, width, epsilon, WIDE: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, WIDE)
        inside = at < width
        own = tl.load(x + row * width + at, inside, 0.0).to(tl.float32)
        factor = tl.load(weight + at, inside, 0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(own * own, 0) / width + epsilon)
        tl.store(out + row * width + at, own * scale * factor, inside)
        tl.store(scales + row, scale)

    @triton.jit
    def _normalise_backward_kernel(g, x, weight, scales, more, out, width, WIDE: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, WIDE)
        inside = at < width
        scale = tl.load(scales + row)
        factor = tl.load(weight + at, inside, 0.0).to(tl.float32)
        upstream = tl.load(g + row * width + at, inside, 0.0).to(tl.float32) * factor
        unit = tl.load(x + row * width + at, inside, 0.0).to(tl.float32) * scale
        along = tl.sum(upstream * unit, 0) / width
        beside = tl.load(more + row * width + at, inside, 0.0).to(tl.float32)
        tl.store(out + row * width + at, (upstream - unit * along) * scale + beside, inside)

    @triton.jit
    def _rotate_kernel(
        x,
        cos,
        sin,
        out,
        stride,
        n_angles,
        width,
        E: tl.constexpr,
        SIGN: tl.constexpr,
        WIDE: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, WIDE)
        inside = at < width
        place = at % E
        other = tl.where(place < E // 2, at + E // 2, at - E // 2)
        angle = (row % n_angles) * E + place
        own = tl.load(x + row * stride + at, inside, 0.0).to(tl.float32)
        swapped = tl.load(x + row * stride + other, inside, 0.0).to(tl.float32)
        c = tl.load(cos + angle, inside, 0.0).to(tl.float32)
        s = tl.load(sin + angle, inside, 0.0).to(tl.float32)
        tl.store(out + row * width + at, own * c + SIGN * swapped * s, inside)


def gate(both: Tensor) -> Tensor:
    """silu(left half) * right half over the last axis of [..., 2 F]."""
    both = both.contiguous()
    width = both.shape[-1] // 2
    out = both.new_empty(*both.shape[:-1], width)
    _gate_kernel[_parts(out)](both, out, width, PART)
    return out


def gate_backward(both: Tensor, g: Tensor) -> Tensor:
    """Gradient of `gate` to [..., 2 F]; that of silu is s + x s (1 - s), s = sigmoid(x)."""
    both, g = both.contiguous(), g.contiguous()
    out = torch.empty_like(both)
    _gate_backward_kernel[_parts(g)](both, g, out, g.shape[-1], PART)
    return out


def _parts(rows: Tensor) -> tuple[int, int]:
    return rows.numel() // rows.shape[-1], triton.cdiv(rows.shape[-1], PART)


def normalise(x: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """RMSNorm with its weight over the last axis of [..., D], and the factor of each row [N] in float32."""
    x = x.contiguous()
    width = x.shape[-1]
    out, n_rows = torch.empty_like(x), x.numel() // width
    scales = x.new_empty(n_rows, dtype=torch.float32)
    wide = triton.next_power_of_2(width)
    _normalise_kernel[(n_rows,)](x, weight_D, out, scales, width, epsilon, wide)
    return out, scales


def normalise_backward(
    g: Tensor, x: Tensor, weight_D: Tensor, scales_N: Tensor, more: Tensor
) -> Tensor:
    """Gradient of `normalise` to x, with u = scale x: scale (w g - u mean(w g u)); `more` of x is added to it."""
    g, x, more = g.contiguous(), x.contiguous(), more.contiguous()
    width = x.shape[-1]
    out, wide = torch.empty_like(x), triton.next_power_of_2(width)
    _normalise_backward_kernel[(len(scales_N),)](g, x, weight_D, scales_N, more, out, width, wide)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """x cos + (halves swapped) sin of heads [S, T, H, E]; `cos` and `sin` are [T, 1, E] or [S, T, 1, E].

    `sin` has its left half negated; `back` turns the other way.
    """
    E, width = x.shape[-1], x.shape[-2] * x.shape[-1]
    flat = x.reshape(-1, width)  # a view of some columns where x is one
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    out = x.new_empty(x.shape)
    cos, sin = cos.contiguous(), sin.contiguous()
    sign, wide = -1.0 if back else 1.0, triton.next_power_of_2(width)
    n_angles = cos.numel() // E
    grid = (len(flat),)
    _rotate_kernel[grid](flat, cos, sin, out, flat.stride(0), n_angles, width, E, sign, wide)
    return out
