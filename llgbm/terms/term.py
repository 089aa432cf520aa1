"""Define a loss term: its name, what it reads, what it supervises by, and its value in a training step.

The loss of a training is the sum of weight x term over the terms that have a weight above 0.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from llgbm.models.cost import BaseShape
from llgbm.runtime import UserError, content_hash

if TYPE_CHECKING:
    from llgbm.terms.step import Step, TermData

# Parts of a step. Those after `adapters` need passes through the base.
READS = ("tokens", "adapters", "states", "logits", "layers", "examples")
THROUGH_BASE = frozenset({"states", "logits", "layers"})
# Supervision. `size` compares with no teacher.
MATCHES = ("weights", "behaviour", "labels", "size")
OURS = "llgbm.terms"


@dataclass(frozen=True)
class PassSize:
    """Size of a step's passes through the base: probes, their tokens and marked positions."""

    adapters: int
    probes: int
    tokens: int
    marked: int


@dataclass(frozen=True)
class Term(ABC):
    """Summand of the training loss. Subclasses are frozen dataclasses whose fields are the term's options.

    The value is reported as `loss/<name>`. Options have defaults and are numbers, texts or tuples of whole numbers.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reads: ClassVar[frozenset[str]]
    matches: ClassVar[str]
    # Raise it when the same options would give other numbers: trial ids depend on it.
    version: ClassVar[int] = 1

    @abstractmethod
    def value(self, step: Step) -> Tensor:
        """Compute the term, a scalar. Raises ValueError where an input is missing, empty or not finite."""

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Count what the term is a mean over in a batch: the marked positions, or else the adapters."""
        if self.reads & THROUGH_BASE:
            return int(batch["valid"].sum())
        return len(batch["tokens"])

    def modules(self, data: TermData) -> tuple[str, ...]:
        """Name the modules of the base whose outputs are read in the step's one pass; see `Step.inner`."""
        return ()

    def prepare(self, data: TermData) -> Any:
        """Return what is computed once a training and found again as `step.prepared[name]`."""
        return None

    def own_texts(self, n_adapters: int) -> int:
        """Count the texts of a step that the term runs through the base in a pass of its own."""
        return 0

    def flops(self, shape: BaseShape, size: PassSize) -> float:
        """Count the FLOPs of a step beside the passes that terms share: the probes, and the head at their marks."""
        return 0.0

    @property
    def identity(self) -> str:
        """Return what a trial's id holds of the code: a hash for a term of another package, "" for a first version."""
        if not type(self).__module__.startswith(OURS):
            return content_hash(self, self.version)
        return "" if self.version == 1 else f"version {self.version}"


def check_term_class(found: Any, place: str) -> type[Term]:
    """Return the class of a term. Raises UserError for anything else, and for a class that lacks a declaration."""
    if not (isinstance(found, type) and issubclass(found, Term)):
        raise UserError(f"{place} is no subclass of llgbm.terms.term.Term: a loss term must be one")
    missing = [
        key for key in ("name", "title", "reads", "matches") if getattr(found, key, None) is None
    ]
    if missing:
        raise UserError(f"the term {place} declares no `{missing[0]}`: give it one")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", found.name):
        raise UserError(
            f"the term {place} is called {found.name!r}: use small letters, digits and underscores"
        )
    if not set(found.reads) <= set(READS) or found.matches not in MATCHES:
        raise UserError(
            f"the term {place} reads {sorted(found.reads)} and matches {found.matches!r}; there are: "
            f"{', '.join(READS)} to read, {', '.join(MATCHES)} to match"
        )
    return found
