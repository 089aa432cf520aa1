"""Hyper-convolutions (Liang et al. 2025, Drag-and-Drop LLMs): 2-D convolutions over each two axes of
[B, N, L, C].

Letters: B batch, N prompts or tokens, L length or token height, C width; L', C' and N' those of the output.

An axis that serves as channels may lie last in memory (torch's channels_last), so the convolutions over C read and
write [B, N, L, C] as it lies; only those over L have to copy. `benchmarks/bench_decoder.py` measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Features = tuple[int, int, int]
FEW_CHANNELS = 32  # below 48 channels last won or drew, at 96 it lost (one CPU core)


class HyperConv3d(nn.Module):
    """[B, N, L, C] to [B, N, L', C']: two routes of two convolutions each, their sum and a bias, divided by 3."""

    def __init__(self, in_features: Features, out_features: Features, kernel_size: int) -> None:
        super().__init__()
        (_, in_height, in_width), (_, out_height, out_width) = in_features, out_features
        self.norm = nn.LayerNorm([in_height, in_width])
        self.conv1w = _conv(in_width, out_width, kernel_size)
        self.conv1h = _conv(in_height, out_height, kernel_size)
        self.conv2h = _conv(in_height, out_height, kernel_size)
        self.conv2w = _conv(in_width, out_width, kernel_size)
        bound = 1.0 / (out_height * out_width)
        self.bias = nn.Parameter(torch.empty(out_height, out_width).uniform_(-bound, bound))

    def forward(self, x_BNLC: Tensor) -> Tensor:
        x_BNLC = self.norm(x_BNLC)
        width_first = over_height(over_width(x_BNLC, self.conv1w), self.conv1h)
        height_first = over_width(over_height(x_BNLC, self.conv2h), self.conv2w)
        return (width_first + torch.tanh(height_first) + self.bias) / 3


class HyperConvLayer(nn.Module):
    """[B, N, L, C] to [B, N', L', C']: a hyper-convolution, then a convolution with the first axis as channels."""

    def __init__(self, in_features: Features, out_features: Features, kernel_size: int) -> None:
        super().__init__()
        self.linear1 = HyperConv3d(in_features, out_features, kernel_size)
        self.linear2 = nn.Conv2d(in_features[0], out_features[0], kernel_size, padding="same")

    def forward(self, x_BNLC: Tensor) -> Tensor:
        return self.linear2(self.linear1(x_BNLC))


class HyperConvBlock(nn.Module):
    """Layers one after the other, each with a residual where its output has the shape of its input."""

    def __init__(self, features: Sequence[Features], kernel_size: int) -> None:
        super().__init__()
        self.module_list = nn.ModuleList(
            HyperConvLayer(i, o, kernel_size) for i, o in pairwise(features)
        )

    def forward(self, x_BNLC: Tensor) -> Tensor:
        for layer in self.module_list:
            y = layer(x_BNLC)
            x_BNLC = x_BNLC + y if y.shape == x_BNLC.shape else y
        return x_BNLC


def _conv(n_in: int, n_out: int, kernel_size: int) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, kernel_size, padding="same", bias=False)


def over_width(x_BNLC: Tensor, conv: nn.Conv2d) -> Tensor:
    """Convolve over (L, N) with C as channels: [B, N, L, C] to [B, N, L, C'].

    The kernel is stored for the plane (L, N); turning it to (N, L) leaves x as it lies, channels last.
    """
    kernel = conv.weight.transpose(-1, -2)
    return F.conv2d(x_BNLC.permute(0, 3, 1, 2), kernel, padding="same").permute(0, 2, 3, 1)


def over_height(x_BNLC: Tensor, conv: nn.Conv2d) -> Tensor:
    """Convolve over (N, C) with L as channels: [B, N, L, C] to [B, N, L', C].

    Few channels are laid last: the copy costs less than what the convolution and its gradient gain.
    """
    x_BLNC = x_BNLC.transpose(1, 2)
    if x_BLNC.shape[1] <= FEW_CHANNELS:
        x_BLNC = x_BLNC.contiguous(memory_format=torch.channels_last)
    return conv(x_BLNC).transpose(1, 2)
