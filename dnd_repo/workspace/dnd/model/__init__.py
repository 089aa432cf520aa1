"""The generator's networks."""

from dnd.model.decoderonly import (
    HyperConvDecoder,
    HyperConvDecoderModel,
    HyperConvDecoderModel_FullCond,
    HyperConvDecoderModel_SuperLarge,
    load_checkpoint,
    weighted_token_mse,
)

__all__ = [
    "HyperConvDecoder",
    "HyperConvDecoderModel",
    "HyperConvDecoderModel_FullCond",
    "HyperConvDecoderModel_SuperLarge",
    "load_checkpoint",
    "weighted_token_mse",
]
