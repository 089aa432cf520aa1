"""What every module may ask of the process it runs in: device, seeds, threads, logging, progress, errors for people."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import logging
import os
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

T = TypeVar("T")
logger = logging.getLogger("llgbm")


class UserError(ValueError):
    """A mistake that its user can mend: the message is one sentence, the exit status is 2, no traceback is shown."""


def content_hash(*parts: Any, length: int = 16) -> str:
    """Hash values that JSON can hold (dataclasses and paths included) to `length` hexadecimal digits.

    A field that takes no part in comparisons (`compare=False`, such as where a file lies) takes none in the hash.
    """
    text = json.dumps(parts, sort_keys=True, default=_plain, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__, **_compared(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} cannot be hashed by content")


def _compared(value: Any) -> Any:
    """A value with its dataclasses, at any depth, turned into dictionaries of the fields that are compared."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _compared(getattr(value, f.name)) for f in fields(value) if f.compare}
    if isinstance(value, (list, tuple)):
        return [_compared(item) for item in value]
    return (
        {key: _compared(item) for key, item in value.items()}
        if isinstance(value, Mapping)
        else value
    )


def stream_seed(*parts: Any) -> int:
    """Derive a 63-bit seed from its parts, so that every random stream has a name and none depends on another."""
    return int(content_hash(*parts, length=16), 16) >> 1


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
    """Hand memory back after a long pass: what torch caches on a device, and what the C library holds of the host's."""
    import torch

    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@cache
def spare_collector() -> None:
    """Once a process, when its libraries are loaded: keep them out of Python's collections of garbage.

    With Ray, MLflow and transformers a collection takes 0.3 s, and there is one after every long pass.
    """
    gc.collect()
    gc.freeze()


def free_memory(device: str) -> float:
    """Bytes that can still be had: of the GPU's memory, or of this machine's."""
    import psutil
    import torch

    return (
        torch.cuda.mem_get_info(device)[0]
        if device.startswith("cuda")
        else psutil.virtual_memory().available
    )


def quiet_libraries() -> None:
    """Keep the bars of libraries off a stderr that is no terminal."""
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
    """A progress bar to be moved by hand; silent where there is no terminal."""
    return tqdm(desc=label, total=total, disable=None, leave=False, file=sys.stderr)


def exit_status(command: Callable[[], int], debug: bool, on_interrupt: str = "interrupted") -> int:
    """Run a program: its own status, 2 and one sentence for a UserError (raised with `debug`), 130 for an interrupt."""
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
    """One line for the person at the terminal. Standard output stays free for results."""
    print(text, file=sys.stderr, flush=True)
