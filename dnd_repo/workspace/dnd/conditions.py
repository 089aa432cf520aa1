"""Conditions: token-level features of N prompts from a frozen encoder.

Letters: B adapters in a batch, N prompts, L tokens of a prompt, C width of the features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from dnd.errors import DndError

Part = Literal["prompts", "prompts+answers", "answers"]


def condition_texts(examples: Sequence[Mapping[str, str]], part: Part = "prompts") -> list[str]:
    """Texts to condition on, from examples in DnD's format (`prompt`, and `response` where answers are wanted).

    Raises DndError for an unknown part, for no examples, and for one that lacks what is asked for.
    """
    if part not in ("prompts", "prompts+answers", "answers"):
        raise DndError(
            f"unknown part {part!r} of an example; there are: prompts, prompts+answers, answers"
        )
    needed = {"prompts": ("prompt",), "answers": ("response",)}.get(part, ("prompt", "response"))
    texts = ["\n".join(example.get(key, "") for key in needed) for example in examples]
    if not texts or not all(example.get(key) for example in examples for key in needed):
        raise DndError(f"no example, or one without {' and '.join(needed)}: conditions need texts")
    return texts


def encode_texts(tokenizer: Any, texts: Sequence[str], length: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, [N, L] each, cut and padded to `length` tokens."""
    if not texts:
        raise DndError("no text to encode: a condition needs at least one prompt")
    encoded = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


class TokenFeatures(nn.Module):
    """Token ids [B, N, L] to features [B, N, L, C] of a BERT-like model, a T5-like model's encoder, or a decoder LM.

    `layer` chooses the block whose output is taken (0 the first, -1 the last, before any final norm); without it the
    last hidden state is. Texts longer than `window` are read in windows of that many tokens each.
    """

    def __init__(self, encoder: nn.Module, layer: int | None = None, window: int = 512) -> None:
        super().__init__()
        config: Any = encoder.config
        self.encoder: nn.Module = encoder.get_encoder() if config.is_encoder_decoder else encoder  # type: ignore[operator]
        n_layers = int(config.num_hidden_layers)
        if layer is not None and not -n_layers <= layer < n_layers:
            raise DndError(
                f"layer {layer} asked for, the encoder has {n_layers}: choose one from 0 to {n_layers - 1}"
            )
        self.block = None if layer is None else layer % n_layers
        self.window = window

    def forward(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Raises DndError for ids that are not [B, N, L] and for a length that windows do not divide."""
        ids_BNL = tokens["input_ids"]
        if ids_BNL.ndim != 3 or tokens["attention_mask"].shape != ids_BNL.shape:
            raise DndError(
                f"token ids have shape {tuple(ids_BNL.shape)}; ids and mask of shape [B, N, L] are needed"
            )
        width = min(self.window, ids_BNL.shape[2])
        if ids_BNL.shape[2] % width:
            raise DndError(
                f"texts of {ids_BNL.shape[2]} tokens are no whole number of windows of {width}"
            )
        hidden = self._hidden(
            ids_BNL.reshape(-1, width), tokens["attention_mask"].reshape(-1, width)
        )
        return hidden.reshape(*ids_BNL.shape, -1)

    def _hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        if self.block is None:
            return self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            kept.append(output[0] if isinstance(output, tuple) else output)

        handle = _blocks(self.encoder)[self.block].register_forward_hook(keep)
        try:
            self.encoder(input_ids=ids, attention_mask=mask)
        finally:
            handle.remove()
        return kept[0]


def _blocks(encoder: nn.Module) -> nn.ModuleList:
    """Transformer blocks: the longest list of modules."""
    lists = [module for module in encoder.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise DndError(
            f"{type(encoder).__name__} has no list of blocks to take a layer from: leave the layer out"
        )
    return max(lists, key=len)
