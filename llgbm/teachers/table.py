"""Flat adapters of a bank in one file, read row by row where a tensor of all of them would not fit into memory.

Rows have the bits that `Bank.load` gives. The file lies in the cache, under the bank's hash; all trials on a machine
share its pages. Axis letters: see `llgbm`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from llgbm.lora.adapters import LoraBatch, load_adapter
from llgbm.runtime import UserError, content_hash, free_memory, pick_device, say
from llgbm.system.cache import build_entry
from llgbm.teachers.bank import Bank

VERSION = 1
FILE = "values.npy"
STREAMS = ("auto", "on", "off")
# Bytes of the columns of all rows that are read at once, for means and deviations.
BLOCK_BYTES = 2**26
# Tables [A, V] that a trial holds of a bank in memory: weights, and the same as tokens.
IN_MEMORY = 2


@dataclass(frozen=True)
class BankTable:
    """Table [A, V] in a file, float32. Indexing by rows reads these alone, and a pickle holds the file's name only.

    The file is read, not mapped: mapped pages count as memory of the trial.
    """

    path: Path

    @property
    def shape(self) -> tuple[int, int]:
        with self.path.open("rb") as stream:
            return _read_shape(stream)

    @property
    def nbytes(self) -> int:
        """Return the bytes that it takes of memory: none."""
        return 0

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Sequence[int] | slice) -> Tensor:
        n_rows, width = self.shape
        wanted = range(n_rows)[rows] if isinstance(rows, slice) else rows
        return self._read(wanted, 0, width)

    def _read(self, rows: Sequence[int], first: int, last: int) -> Tensor:
        """Read the columns from `first` to before `last` of some rows. Raises UserError for a torn file."""
        found = np.empty((len(rows), last - first), np.float32)
        with self.path.open("rb") as stream:
            n_rows, width = _read_shape(stream)
            begins = stream.tell()
            for place, row in enumerate(rows):
                stream.seek(begins + found.itemsize * (range(n_rows)[row] * width + first))
                own = np.fromfile(stream, np.float32, last - first)
                if len(own) < last - first:
                    raise UserError(f"{self.path} is torn: remove its folder, it is built again")
                found[place] = own
        return torch.from_numpy(found)

    def columns(self, rows: Sequence[int]) -> Iterator[Tensor]:
        """Yield the values of some rows, block of columns after block, each [rows, columns]."""
        width, n_values = max(1024, BLOCK_BYTES // (4 * len(rows)) // 1024 * 1024), self.shape[1]
        for start in range(0, n_values, width):
            yield self._read(rows, start, min(start + width, n_values))

    def lazy(self) -> Tensor:
        """Return the table as a tensor whose pages are read when they are used, for one pass over all rows."""
        return torch.from_numpy(np.load(self.path, mmap_mode="c", allow_pickle=False))

    def to(self, device: str | torch.device) -> BankTable:
        """Return itself: rows go to a device when they are read."""
        return self


@dataclass(frozen=True)
class PairTable(BankTable):
    """Table with rows behind those of its file: the means of pairs of these, made when they are read."""

    pairs: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return self.shape[0] + len(self.pairs)

    def __getitem__(self, rows: Sequence[int] | slice) -> Tensor:
        wanted = range(len(self))[rows] if isinstance(rows, slice) else rows
        n_rows = self.shape[0]
        pairs = [(row, row) if row < n_rows else self.pairs[row - n_rows] for row in wanted]
        left, right = (
            super(PairTable, self).__getitem__([p[side] for p in pairs]) for side in (0, 1)
        )
        return torch.lerp(left, right, 0.5)


def _read_shape(stream: BinaryIO) -> tuple[int, int]:
    """Read the header of a table; return its rows and columns."""
    np.lib.format.read_magic(stream)
    (rows, columns), _, _ = np.lib.format.read_array_header_1_0(stream)
    return rows, columns


def open_values(
    cache: Path, bank: Bank, stream: str = "auto"
) -> tuple[Tensor | BankTable, LoraBatch]:
    """Return the adapters of a bank, flat [A, V] and as a batch: in memory, or read from the disk."""
    if is_streamed(len(bank.adapters) * bank.spec.n_values, stream):
        say(f"bank {bank.hash}: read from the disk row by row")
        table = build_table(cache, bank)
        return table, LoraBatch.unflatten(bank.spec, table.lazy())
    batch = bank.load()
    return batch.flatten(bank.spec), batch


def is_streamed(n_values: int, stream: str = "auto") -> bool:
    """Say if a bank of so many values is read from the disk: as asked, or where it would take half of what is free.

    Raises UserError for an unknown choice.
    """
    if stream not in STREAMS:
        raise UserError(
            f"unknown choice {stream!r} for --stream-bank; there are: {', '.join(STREAMS)}"
        )
    if stream != "auto":
        return stream == "on"
    free = min(free_memory("cpu"), free_memory(pick_device()))
    return 4 * IN_MEMORY * n_values > free / 2


def build_table(cache: Path, bank: Bank) -> BankTable:
    """Write the table of a bank adapter by adapter, or find it in the cache. Raises UserError as `Bank.load`."""

    def write(folder: Path) -> None:
        shape = (len(bank.adapters), bank.spec.n_values)
        table = np.lib.format.open_memmap(folder / FILE, mode="w+", dtype=np.float32, shape=shape)
        for row, adapter_id in enumerate(bank.adapters):
            state = load_adapter(bank.adapter_folder(adapter_id), bank.spec)
            table[row] = LoraBatch.from_state_dicts([state]).flatten(bank.spec)[0].numpy()
        table.flush()

    key = content_hash("table", VERSION, bank.hash, bank.spec, list(bank.adapters))
    return BankTable(build_entry(cache, "tables", key, write) / FILE)
