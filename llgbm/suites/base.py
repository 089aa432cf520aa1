"""What a suite of tasks is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from llgbm.runtime import UserError

Purpose = Literal["train", "evaluation"]


@dataclass(frozen=True)
class Example:
    """A prompt and the answer that the task wants; the two follow each other without anything between."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A task by name; `family` groups tasks in plots."""

    name: str
    family: str


@dataclass(frozen=True)
class Split:
    """Task names: trained on, used to choose (early stopping, champion), used to report."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        names = [*self.train, *self.val, *self.test]
        if len(set(names)) != len(names):
            raise ValueError("a task stands in two parts of the split: held out must mean held out")

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.train + self.val + self.test


class Suite(ABC):
    """A family of tasks over one kind of text.

    Examples for `train` and for `evaluation` never share an input, whatever the seeds.
    """

    name: str

    @property
    @abstractmethod
    def tasks(self) -> tuple[Task, ...]:
        """All tasks, in a fixed order."""

    @property
    @abstractmethod
    def split(self) -> Split:
        """The split by task."""

    @abstractmethod
    def examples(self, task: str, purpose: Purpose, count: int, stream: str) -> list[Example]:
        """`count` examples of a task; the same stream name gives the same examples. Raises UserError: unknown task."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of everything that examples and split depend on."""

    @property
    @abstractmethod
    def probe_prompts(self) -> tuple[str, ...]:
        """A few in-domain prompts, the suite's own domain probe."""

    @property
    @abstractmethod
    def nonsense_prompts(self) -> tuple[str, ...]:
        """Prompts in the suite's vocabulary that name no task."""

    def task(self, name: str) -> Task:
        """Find a task. Raises UserError with the nearest names for an unknown one."""
        import difflib

        found = {t.name: t for t in self.tasks}
        if name not in found:
            near = difflib.get_close_matches(name, found, n=3, cutoff=0.3) or list(found)[:3]
            raise UserError(f"unknown task {name!r}; near it are: {', '.join(near)}")
        return found[name]
