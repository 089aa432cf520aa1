"""Flat adapters of a bank in one file, read row by row where a tensor of all of them would not fit into memory.

Rows have the bits that `Bank.load` gives. The file lies in the cache, under the bank's hash; all trials on a machine
share its pages. Axis letters: see `llgbm`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    """Table [A, V] in a file, float32. Indexing by rows reads these alone; nothing stays mapped, pickles are short."""

    path: Path

    def _mapped(self, mode: str = "r") -> np.ndarray:
        return np.load(self.path, mmap_mode=mode, allow_pickle=False)  # type: ignore[arg-type]

    @property
    def shape(self) -> tuple[int, int]:
        rows, values = self._mapped().shape
        return rows, values

    @property
    def nbytes(self) -> int:
        """Return the bytes that it takes of memory: none."""
        return 0

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Sequence[int] | slice) -> Tensor:
        return torch.from_numpy(np.array(self._mapped()[rows]))

    def columns(self, rows: Sequence[int]) -> Iterator[Tensor]:
        """Yield the values of some rows, block of columns after block, each [rows, columns]."""
        mapped = self._mapped()
        width = max(1024, BLOCK_BYTES // (4 * len(rows)) // 1024 * 1024)
        for start in range(0, mapped.shape[1], width):
            block = mapped[:, start : start + width]
            yield torch.from_numpy(np.stack([block[row] for row in rows]))

    def lazy(self) -> Tensor:
        """Return the table as a tensor whose pages are read when they are used, for a pass over all rows."""
        return torch.from_numpy(self._mapped("c"))

    def to(self, device: str | torch.device) -> BankTable:
        """Return itself: rows go to a device when they are read."""
        return self


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
