"""Texts of unequal lengths side by side in rows of one width, so that a pass computes next to no padding.

Letters beyond those of `llgbm`: R rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llgbm.lora.apply import head_logits
from llgbm.models.encoding import IGNORED, EncodedPairs, place_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rows are as wide as the longest text, and at least so wide: short texts leave little room in them.
WIDTH = 64


@dataclass(frozen=True)
class PackedTexts:
    """Texts in rows: ids, targets as in `EncodedPairs`, each token's place in its text, and its text (-1: none)."""

    ids_RT: Tensor
    targets_RT: Tensor
    places_RT: Tensor
    texts_RT: Tensor

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Return the mask [R, 1, T, T] that is added to scores: a token sees those before it of its own text."""
        same_RTT = self.texts_RT[:, :, None] == self.texts_RT[:, None]
        unseen_RTT = ~same_RTT.tril()
        return torch.zeros_like(unseen_RTT, dtype=dtype).masked_fill_(unseen_RTT, -torch.inf)[
            :, None
        ]


def pack(texts: EncodedPairs, width: int = WIDTH) -> PackedTexts:
    """Put each text into the first row with room, the longest first; rows are `width` wide, or as the longest text."""
    lengths = texts.lengths_S.tolist()
    width = max(width, *lengths)
    rows: list[list[int]] = []
    room: list[int] = []
    for text in sorted(range(len(texts)), key=lengths.__getitem__, reverse=True):
        row = next((i for i, left in enumerate(room) if left >= lengths[text]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(text)
        room[row] -= lengths[text]
    ids, targets = texts.input_ids_ST.tolist(), texts.targets_ST.tolist()

    def side_by_side(of_text: Callable[[int], Iterable[int]], filler: int) -> Tensor:
        """Put what is said of each token of a text into the rows, [R, T]."""
        filled = [list(chain.from_iterable(map(of_text, own))) for own in rows]
        return place_tokens(filled, [0] * len(rows), width - min(room), filler)

    return PackedTexts(
        side_by_side(lambda text: ids[text][: lengths[text]], 0),
        side_by_side(lambda text: targets[text][: lengths[text]], IGNORED),
        side_by_side(lambda text: range(lengths[text]), 0),
        side_by_side(lambda text: [text] * lengths[text], -1),
    )


def packed_answer_loss(model: PreTrainedModel, texts: EncodedPairs) -> Tensor:
    """Return `answer_loss` of texts, which are packed first."""
    device = model.device
    packed = pack(texts)
    states_RTD = model.base_model(
        input_ids=packed.ids_RT.to(device),
        attention_mask=packed.mask(model.dtype).to(device),
        position_ids=packed.places_RT.to(device),
        use_cache=False,
    ).last_hidden_state
    marked_RT = packed.targets_RT >= 0
    logits = head_logits(model, states_RTD[marked_RT.to(device)])
    targets = packed.targets_RT[marked_RT].to(device)
    return nn.functional.cross_entropy(logits.float(), targets)
