"""The layers of the decoder."""

from dnd.module.hyperconv import HyperConv3d, HyperConvBlock, HyperConvLayer

__all__ = ["HyperConv3d", "HyperConvBlock", "HyperConvLayer"]
