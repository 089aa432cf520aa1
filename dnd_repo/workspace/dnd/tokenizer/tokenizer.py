"""One tokenizer for LoRA adapters of any shape: matrices cut into chunks, standardised, with their scale written along.

Letters: T tokens, H and W height and width of a token, R rank, I width of a matrix (B transposed). Leading axes `...`
of the matrices (a stack of adapters) are kept.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dnd.errors import DndError

_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.\w+)?\.weight$")
SCALE = 2  # rows and columns of a token that hold mean and deviation


class Piece(NamedTuple):
    """One matrix of an adapter and where it stands: its key, its side, rank and width, and its range of tokens."""

    key: str
    side: str
    rank: int
    width: int
    start: int
    n_tokens: int


class LoraTokenizer2D:
    """Adapters to tokens [..., T, H, W] and back; the layout follows from the adapter's shapes and the token size.

    A token is a chunk [R, W - 2] of a matrix, less its mean m and over its unbiased deviation s, in the upper left; NaN
    where the chunk is smaller; and 8 m and ln(0.9 s + 0.1) + 1.6 in turn along the last two rows and the last two
    columns. A chunk without spread is stored as zeros with s = 0. In bfloat16 the values are standardised with m and s
    as rounded, so that rounding these two is no error on the way back.
    """

    usual_token_size: tuple[int, int] | None = None

    def __init__(
        self, token_size: Sequence[int] | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        size = token_size if token_size is not None else self.usual_token_size
        if size is None or len(size) != 2 or min(size) <= SCALE:
            raise DndError(
                f"the token size is {size}; it must be (height, width), each above {SCALE}"
            )
        if dtype not in (torch.float32, torch.bfloat16):
            raise DndError(
                f"tokens cannot be stored as {dtype}: use torch.float32 or torch.bfloat16"
            )
        self.height, self.width, self.dtype = int(size[0]), int(size[1]), dtype

    @property
    def token_size(self) -> tuple[int, int]:
        return self.height, self.width

    def n_tokens(self, state: Mapping[str, Tensor]) -> int:
        """Count the tokens of an adapter of these shapes. Raises DndError as `tokenize` does."""
        pieces = self.plan(state)
        return pieces[-1].start + pieces[-1].n_tokens

    def plan(self, state: Mapping[str, Tensor]) -> list[Piece]:
        """Return the place of each matrix: modules in the order of their first key, A before B."""
        pieces: list[Piece] = []
        start = 0
        for key, side in ordered_keys(state):
            shape = state[key].shape[-2:]
            rank, width = (shape[0], shape[1]) if side == "A" else (shape[1], shape[0])
            count = self._count(key, rank, width)
            pieces.append(Piece(key, side, rank, width, start, count))
            start += count
        _refuse_mixed_rank(pieces)
        return pieces

    def _count(self, key: str, rank: int, width: int) -> int:
        rows, columns = self.height - SCALE, self.width - SCALE
        if rank > rows:
            raise DndError(
                f"{key} has rank {rank}, a token of height {self.height} holds {rows}: use {rank + SCALE}"
            )
        if width > columns and width % columns:
            raise DndError(
                f"{key} has width {width}, which chunks of {columns} (token width {self.width} - {SCALE}) do not "
                "divide: choose a token width whose chunk divides every matrix that is wider"
            )
        return max(1, width // columns)

    def tokenize(self, state: Mapping[str, Tensor]) -> Tensor:
        """Tokens [..., T, H, W] of an adapter, or of a stack of adapters with leading axes.

        Raises DndError for keys that are no pairs of lora_A and lora_B, mixed rank, sizes that do not divide, and
        values that are not finite.
        """
        pieces = self.plan(state)
        lead = state[pieces[0].key].shape[:-2]
        rows, columns = self.height - SCALE, self.width - SCALE
        body = state[pieces[0].key].new_zeros(
            (*lead, self._total(pieces), rows, columns), dtype=torch.float32
        )
        for piece in pieces:
            place = body[
                ...,
                piece.start : piece.start + piece.n_tokens,
                : piece.rank,
                : min(piece.width, columns),
            ]
            place.copy_(_cut(state[piece.key], piece))
        if not body.sum().isfinite():
            raise DndError(
                f"the adapter holds NaN or infinite values in {_first_odd(state)}: train it again"
            )
        return self._standardise(body, pieces).to(self.dtype)

    def _total(self, pieces: Sequence[Piece]) -> int:
        return pieces[-1].start + pieces[-1].n_tokens

    def _standardise(self, body: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """Chunks [..., T, H - 2, W - 2], zero where there is padding, to whole tokens."""
        padding = self._padding(pieces).to(body.device)
        size = (~padding).sum((-2, -1)).double()
        mean = body.sum((-2, -1), dtype=torch.float64) / size
        centred = (body - mean[..., None, None].float()).masked_fill_(padding, 0.0)
        deviation = (
            centred.square().sum((-2, -1), dtype=torch.float64) / (size - 1).clamp_min(1)
        ).sqrt()
        scales = torch.stack([8 * mean, (0.9 * deviation + 0.1).log() + 1.6], -1).to(self.dtype)
        if self.dtype != torch.float32:
            mean, deviation = _as_read(scales, mean, deviation)
            centred = (body - mean[..., None, None].float()).masked_fill_(padding, 0.0)
        divisor = torch.where(deviation > 0, deviation, 1.0).float()
        tokens = body.new_empty((*body.shape[:-2], self.height, self.width))
        torch.div(centred, divisor[..., None, None], out=tokens[..., :-SCALE, :-SCALE])
        tokens[..., :-SCALE, :-SCALE].masked_fill_(padding, math.nan)
        self._write_scales(tokens, scales.float())
        return tokens

    def _write_scales(self, tokens: Tensor, scales: Tensor) -> None:
        """`scales` [..., T, 2] in turn along the last two rows, then along the last two columns."""
        turns = torch.arange(self.width, device=tokens.device) % SCALE
        tokens[..., -SCALE:, :] = scales[..., turns][..., None, :]
        tokens[..., :, -SCALE:] = scales[..., None, :]

    def _padding(self, pieces: Sequence[Piece]) -> Tensor:
        """Return the mask of padding in the body of tokens, [T, H - 2, W - 2]."""
        rows, columns = torch.arange(self.height - SCALE), torch.arange(self.width - SCALE)
        counts = torch.tensor([p.n_tokens for p in pieces])
        ranks = torch.tensor([p.rank for p in pieces]).repeat_interleave(counts)
        widths = torch.tensor([p.width for p in pieces]).repeat_interleave(counts)
        return (rows >= ranks[:, None])[:, :, None] | (columns >= widths[:, None])[:, None, :]

    def detokenize(self, like: Mapping[str, Tensor], tokens: Tensor) -> OrderedDict[str, Tensor]:
        """Adapter that tokens [..., T, H, W] stand for, float32, with the keys and shapes of `like`.

        Differentiable; padding is skipped whatever it holds. Mean and deviation are the average of what stands along
        the rows and of what stands along the columns. Raises DndError for tokens of another number or size.
        """
        pieces = self.plan(like)
        needed = (self._total(pieces), self.height, self.width)
        if tuple(tokens.shape[-3:]) != needed:
            raise DndError(
                f"the tokens have shape {tuple(tokens.shape)}, this adapter needs [..., *{needed}]"
            )
        tokens = tokens.float()
        mean, deviation = self._read_scales(tokens)
        values = tokens[..., :-SCALE, :-SCALE].masked_fill(
            self._padding(pieces).to(tokens.device), 0.0
        )
        body = values * deviation[..., None, None] + mean[..., None, None]
        return OrderedDict((p.key, _join(body, p)) for p in sorted(pieces, key=_position_in(like)))

    def _read_scales(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of every token, [..., T] each."""
        columns = tokens[..., :, -SCALE:].double().nanmean(-2)
        # At an odd width the columns, written last, break the turns of the rows at their end: it is left out there.
        whole = self.width - (SCALE + 1) * (self.width % SCALE)
        rows = (
            tokens[..., -SCALE:, :whole].double().unflatten(-1, (-1, SCALE)).nanmean((-3, -2))
            if whole
            else columns
        )
        mean, deviation = _from_scales((rows + columns) / 2)
        return mean.float(), deviation.float()


def ordered_keys(state: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """(key, side) of every matrix: modules in the order of their first key, A before B. Raises DndError for others."""
    modules: dict[str, dict[str, str]] = {}
    for key, tensor in state.items():
        match = _KEY.match(key)
        if match is None or tensor.ndim < 2:
            raise DndError(
                f"{key!r} is no matrix of a LoRA: expected '….lora_A.weight' and '….lora_B.weight'"
            )
        modules.setdefault(match["module"], {})[match["side"]] = key
    alone = [module for module, sides in modules.items() if len(sides) != 2]
    if alone or not modules:
        raise DndError(
            f"{alone[0] if alone else 'the adapter'} lacks lora_A or lora_B: each module needs one of both"
        )
    if len(modules) * 2 != len(state):
        raise DndError("a module stands twice in the adapter: name one adapter's weights alone")
    return [(sides[side], side) for sides in modules.values() for side in "AB"]


def default_token_size(state: Mapping[str, Tensor], least: int = 16) -> tuple[int, int]:
    """Token size for adapters of these shapes: the rank, and the widest chunk that divides every matrix (or, where
    that is below `least`, the widest matrix), each plus 2."""
    sized = [
        state[key].shape[-2:] if side == "A" else state[key].shape[-2:][::-1]
        for key, side in ordered_keys(state)
    ]
    widths = [width for _, width in sized]
    common = math.gcd(*widths)
    return max(rank for rank, _ in sized) + SCALE, (
        common if common >= least else max(widths)
    ) + SCALE


def _refuse_mixed_rank(pieces: Sequence[Piece]) -> None:
    ranks = sorted({p.rank for p in pieces})
    if len(ranks) > 1:
        odd = next(p.key for p in pieces if p.rank != pieces[0].rank)
        raise DndError(
            f"the adapter mixes the ranks {ranks}, such as in {odd}: all modules must have one rank"
        )


def _first_odd(state: Mapping[str, Tensor]) -> str:
    return next(
        (key for key, tensor in state.items() if not tensor.isfinite().all()),
        "the sum of its values",
    )


def _from_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation [...] from how they are written, [..., 2]."""
    mean, deviation = scales.unbind(-1)
    return mean / 8, ((deviation - 1.6).exp() - 0.1) / 0.9


def _as_read(scales: Tensor, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation as they come back from rounded storage, so that values standardised with them come back right.

    A deviation too small for the storage keeps its own value: the rounded one would blow the values up.
    """
    mean_read, deviation_read = _from_scales(scales.double())
    near = (deviation_read - deviation).abs() < 0.5 * deviation
    return mean_read, torch.where(near, deviation_read, deviation)


def _cut(matrix: Tensor, piece: Piece) -> Tensor:
    """Matrix as its chunks [..., count, R, width of a chunk]; a view."""
    wide = matrix if piece.side == "A" else matrix.transpose(-1, -2)
    return wide.unflatten(-1, (piece.n_tokens, -1)).transpose(-2, -3)


def _join(body: Tensor, piece: Piece) -> Tensor:
    """Way back from `_cut`, from the body of all tokens."""
    own = body[..., piece.start : piece.start + piece.n_tokens, : piece.rank, : piece.width]
    wide = own.transpose(-2, -3).flatten(-2)
    return wide if piece.side == "A" else wide.transpose(-1, -2).contiguous()


def _position_in(like: Mapping[str, Tensor]) -> Callable[[Piece], int]:
    order = {key: index for index, key in enumerate(like)}
    return lambda piece: order[piece.key]
