"""Tensors from disk: safetensors, or `.pth` files read without running anything that they contain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dnd.errors import DndError


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a `.safetensors`, `.pth` or `.pt` file onto the CPU.

    Raises DndError for a missing, torn or foreign file, and for one with anything but tensors in it.
    """
    path = Path(path)
    found = _read_safetensors(path) if path.suffix == ".safetensors" else read_plain_pickle(path)
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise DndError(
            f"{path} holds no state dict of tensors: name a checkpoint that maps parameter names to tensors"
        )
    return found


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise DndError(f"{path} does not exist: name a checkpoint file") from error
    except (SafetensorError, OSError) as error:
        raise DndError(
            f"{path} is torn or no safetensors file ({error}): make or fetch it again"
        ) from error


def read_plain_pickle(path: Path) -> Any:
    """Read what `torch.save` wrote, tensors and plain containers only. Raises DndError for anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DndError(f"{path} does not exist: name a checkpoint file") from error
    except (
        Exception
    ) as error:  # torch and the archive reader raise a dozen kinds for a foreign file
        raise DndError(
            f"{path} is torn, or holds objects or code besides tensors; nothing in it was run: "
            "save only the state dict, or convert it to safetensors"
        ) from error
