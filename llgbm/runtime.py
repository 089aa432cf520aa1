"""Helpers for the running process: content hashes, device, seeds, memory, logging, progress, user errors."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import random
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from llgbm.identity import content_hash as content_hash
from llgbm.identity import stream_seed as stream_seed

T = TypeVar("T")
logger = logging.getLogger("llgbm")


class UserError(ValueError):
    """User mistake: reported as one sentence with exit status 2 and no traceback."""


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def pick_device(name: str = "auto") -> str:
    """Name the device: the given one, or CUDA where torch sees it, else the CPU."""
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def release_device_memory() -> None:
    """Return unused memory after a long pass: torch's device cache and the heap of the C library."""
    import torch

    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@cache
def freeze_gc() -> None:
    """Exempt everything loaded so far from garbage collection, once per process.

    With Ray, MLflow and transformers loaded a collection takes 0.3 s, and every long pass ends with one.
    """
    gc.collect()
    gc.freeze()


def free_memory(device: str) -> float:
    """Return the free bytes of the GPU's memory, or of this machine's."""
    import psutil
    import torch

    return (
        torch.cuda.mem_get_info(device)[0]
        if device.startswith("cuda")
        else psutil.virtual_memory().available
    )


def quiet_libraries() -> None:
    """Turn progress bars of libraries off where stderr is no terminal."""
    if sys.stderr.isatty():
        return
    # Read by transformers, too, when they are imported; commands that need none do not pay for them here.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()


def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
    """Show a progress bar on a terminal; stay silent elsewhere."""
    return tqdm(items, desc=label, total=total, disable=None, leave=False, file=sys.stderr)


def progress_bar(label: str, total: int) -> tqdm:
    """Return a progress bar to be moved by hand; silent where there is no terminal."""
    return tqdm(desc=label, total=total, disable=None, leave=False, file=sys.stderr)


def split_revision(name: str) -> tuple[str, str | None]:
    """Split `name@revision`; a folder has no revision."""
    if Path(name).expanduser().is_dir():
        return name, None
    name, _, revision = name.partition("@")
    return name, revision or None


def exit_status(command: Callable[[], int], debug: bool, on_interrupt: str = "interrupted") -> int:
    """Run a program; return its status, 2 after a UserError (raised with `debug`), 130 after an interrupt."""
    try:
        return command()
    except UserError as error:
        if debug:
            raise
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say(on_interrupt)
        return 130


def say(text: str) -> None:
    """Print a line to stderr; stdout is for results."""
    print(text, file=sys.stderr, flush=True)
