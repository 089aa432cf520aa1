"""Find what other installed packages offer under an entry point: loss terms, generators, encoders, suites.

Loads no torch.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from llgbm.runtime import UserError

TERMS, GENERATORS, ENCODERS = "llgbm.terms", "llgbm.generators", "llgbm.encoders"
SUITES = "llgbm.suites"


@cache
def offered(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of a group by name."""
    return {point.name: point for point in entry_points(group=group)}


def load_plugin(group: str, name: str) -> Any:
    """Import what is offered under a name, None for nothing. Raises UserError where it cannot be imported."""
    point = offered(group).get(name)
    if point is None:
        return None
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{name!r} is offered as {point.value}, which cannot be imported: {error}"
        ) from error


def source_hash(value: Any) -> str:
    """Hash the file that a class or function of another package is defined in."""
    source = inspect.getsource(sys.modules[value.__module__])
    return hashlib.sha256(source.encode()).hexdigest()[:16]
