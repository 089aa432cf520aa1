"""The decoder from prompt features to LoRA tokens, alone and with a condition extractor and a loss.

Letters: B adapters in a batch, N prompts, L their length, C feature width, T tokens, H and W their height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnd.errors import DndError
from dnd.files import read_state
from dnd.module.hyperconv import Features, HyperConvBlock

CONDITION_MODULE = "condition_module."


class HyperConvDecoder(nn.Module):
    """Prompt features [B, N, L, C] to tokens [B, T, H, W]; `features` lists (N, L, C) from the input on."""

    def __init__(
        self, features: Sequence[Sequence[int]], condition_dim: Sequence[int], kernel_size: int
    ) -> None:
        super().__init__()
        shapes = [_as_features(f) for f in features]
        if len(shapes) < 2 or tuple(condition_dim) != shapes[0]:
            raise DndError(
                f"the decoder got {len(shapes)} feature shapes and the condition {tuple(condition_dim)}: "
                "it needs at least two shapes, the first of them the condition's"
            )
        if kernel_size < 1:
            raise DndError(f"the kernel size is {kernel_size}; it must be at least 1")
        self.condition_dim = shapes[0]
        self.token_dim = shapes[-1]
        self.decoder = HyperConvBlock(shapes, kernel_size)

    def forward(self, condition_BNLC: Tensor) -> Tensor:
        """Raises DndError for a condition of another shape than the decoder was made for."""
        if condition_BNLC.ndim != 4 or tuple(condition_BNLC.shape[1:]) != self.condition_dim:
            raise DndError(
                f"the condition has shape {tuple(condition_BNLC.shape)}, the decoder needs [B, *{self.condition_dim}]: "
                "another number of prompts, another text length or another encoder"
            )
        return self.decoder(condition_BNLC)


def _as_features(shape: Sequence[int]) -> Features:
    if len(shape) != 3 or min(shape) < 1:
        raise DndError(f"{tuple(shape)} is no feature shape: three sizes of at least 1 are needed")
    n, length, width = shape
    return n, length, width


def weighted_token_mse(
    tokens_BTHW: Tensor, target_BTHW: Tensor, weight_T: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Mean over the values that are no padding of weight × squared error; nothing is changed in place.

    Padding is what is NaN in the target, and where a `mask` [B, T, H, W] is given what is False in it. `weight_T` is
    any shape of T values. Raises DndError for other shapes, for a target of nothing but padding, and for a loss that is
    not finite.
    """
    if tokens_BTHW.shape != target_BTHW.shape or weight_T.numel() != tokens_BTHW.shape[1]:
        raise DndError(
            f"tokens {tuple(tokens_BTHW.shape)}, target {tuple(target_BTHW.shape)} and {weight_T.numel()} importance "
            "weights: the first two must agree, with one weight a token"
        )
    kept = ~target_BTHW.isnan() if mask is None else mask & ~target_BTHW.isnan()
    error = torch.where(kept, tokens_BTHW - target_BTHW.nan_to_num(), 0).square()
    loss = (error * weight_T.view(1, -1, 1, 1)).sum() / kept.sum()
    if not loss.isfinite():
        cause = (
            "the prediction holds NaN or infinite values"
            if kept.any()
            else "the target is nothing but padding"
        )
        raise DndError(f"the token loss is {loss.item()}: {cause}")
    return loss


class HyperConvDecoderModel(nn.Module):
    """Frozen condition extractor, the decoder, and the importance-weighted loss.

    `config` holds the arguments of `HyperConvDecoder`. `criterion_weight` has one value a token. The extractor maps
    what `forward` gets as condition to features [B, N, L, C]; without one the condition is the features themselves.
    """

    criterion_weight: Tensor

    def __init__(
        self,
        config: Mapping[str, Any],
        criterion_weight: Tensor,
        condition_module: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = HyperConvDecoder(**config)
        if criterion_weight.numel() != self.model.token_dim[0]:
            raise DndError(
                f"{criterion_weight.numel()} importance weights for {self.model.token_dim[0]} tokens: one a token is "
                "needed; are they of another model size?"
            )
        self.register_buffer(
            "criterion_weight", criterion_weight.detach().clone().float().view(1, -1, 1, 1)
        )
        self.condition_module = (condition_module or nn.Identity()).requires_grad_(False)

    def extract_condition(self, condition: Any) -> Tensor:
        """Features [B, N, L, C] without gradient."""
        with torch.no_grad():
            return self.condition_module(condition)

    def generate(self, condition: Any) -> Tensor:
        """Tokens [B, T, H, W], differentiable; wrap in `torch.no_grad()` where that is not wanted."""
        return self.model(self.extract_condition(condition))

    def forward(self, condition: Any, target_BTHW: Tensor, mask: Tensor | None = None) -> Tensor:
        """Loss against teacher tokens. Raises DndError as `weighted_token_mse` does."""
        return weighted_token_mse(
            self.generate(condition), target_BTHW, self.criterion_weight, mask
        )


HyperConvDecoderModel_FullCond = HyperConvDecoderModel


class HyperConvDecoderModel_SuperLarge(HyperConvDecoderModel):
    """Variant for long prompts: the text axis is shortened from `max_length` to `modified_length` by a linear, SiLU
    and another linear before the decoder."""

    def __init__(
        self,
        config: Mapping[str, Any],
        criterion_weight: Tensor,
        max_length: int,
        modified_length: int,
        condition_module: nn.Module | None = None,
    ) -> None:
        super().__init__(config, criterion_weight, condition_module)
        if modified_length != self.model.condition_dim[1]:
            raise DndError(
                f"prompts are shortened to {modified_length}, but the decoder reads a length of "
                f"{self.model.condition_dim[1]}: make the two equal"
            )
        self.down_proj = nn.Linear(max_length, modified_length)
        self.gate_proj = nn.Linear(modified_length, modified_length)

    def generate(self, condition: Any) -> Tensor:
        features_BNLC = self.extract_condition(condition)
        if features_BNLC.shape[2] != self.down_proj.in_features:
            raise DndError(
                f"the prompts have a length of {features_BNLC.shape[2]}, {self.down_proj.in_features} is needed: "
                "pad or cut them to it"
            )
        short_BNCL = self.gate_proj(
            nn.functional.silu(self.down_proj(features_BNLC.transpose(2, 3)))
        )
        return self.model(short_BNCL.transpose(2, 3))


def trained_state(model: HyperConvDecoderModel) -> dict[str, Tensor]:
    """Return the content of a checkpoint: everything but the frozen extractor, on the CPU."""
    return {
        k: v.detach().cpu()
        for k, v in model.state_dict().items()
        if not k.startswith(CONDITION_MODULE)
    }


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a `.pth` or safetensors checkpoint strictly; only the frozen extractor may be absent from it.

    Raises DndError for a file that is torn or holds code, and for names or shapes that differ; the model is then as it
    was.
    """
    state, own = read_state(path), model.state_dict()
    extra = state.keys() - own.keys()
    missing = {k for k in own.keys() - state.keys() if not k.startswith(CONDITION_MODULE)}
    if extra or missing:
        raise DndError(
            f"{path} does not fit the model: {len(missing)} names are missing and {len(extra)} are not known, such as "
            f"{min(missing or extra)}: is it of another architecture?"
        )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise DndError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, the model needs {tuple(own[name].shape)}: "
                "give the model the features and kernel size that it was trained with"
            )
    model.load_state_dict({**own, **state}, strict=True)
