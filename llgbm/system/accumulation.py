"""Gradient accumulation: pieces of a batch, weighted so that their sum is the gradient of the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = TypeVar("Batch")


def make_accelerator(precision: str, n_pieces: int, on_cpu: bool) -> Accelerator:
    """Make the Accelerator of a training, whatever the environment says and other trainings of this process set."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin

    # Accelerate's state is global: it refuses a second precision, and keeps to the first device.
    AcceleratorState._reset_state(reset_partial_state=True)
    # A number of pieces that is given without the plugin gives way to an environment variable.
    pieces = GradientAccumulationPlugin(
        num_steps=n_pieces, adjust_scheduler=False, sync_with_dataloader=False
    )
    return Accelerator(cpu=on_cpu, mixed_precision=precision, gradient_accumulation_plugin=pieces)


def weighted_pieces(
    batches: Iterable[Batch], n_pieces: int, count: Callable[[Batch], Mapping[str, int]]
) -> Iterator[tuple[Batch, dict[str, float] | None]]:
    """Yield batches that are pieces of a larger one, each with the factors of its terms by name; None for whole ones.

    A term is a mean over as many values of a piece as `count` tells; the mean over `n_pieces` pieces of the weighted
    term is the mean over the values of all of them. Raises ValueError for a term without any value.
    """
    if n_pieces == 1:
        yield from ((batch, None) for batch in batches)
        return
    stream = iter(batches)
    while pieces := list(islice(stream, n_pieces)):
        counts = [count(piece) for piece in pieces]
        totals = {name: sum(own[name] for own in counts) for name in counts[0]}
        if empty := [name for name, total in totals.items() if total == 0]:
            raise ValueError(f"no piece holds a value of {empty[0]}: there is nothing to average")
        for piece, own in zip(pieces, counts, strict=True):
            yield piece, {name: n * len(pieces) / totals[name] for name, n in own.items()}
