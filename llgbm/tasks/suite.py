"""What a suite of tasks is."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llgbm.runtime import UserError
from llgbm.tasks.extraction import Kind

# What examples are for: to train on, to condition a generator at evaluation (prompts only), to score on.
Purpose = Literal["train", "prompts", "evaluation"]
WHOLE = (0, 1)
NO_BASE_OF_ITS_OWN = "no base is built for the suite {!r}: name a base model (--base) or a size with published weights"


@dataclass(frozen=True)
class Example:
    """Prompt and the answer that the task wants.

    Without a `system` text the two follow each other with nothing between. With one, an empty one too, they are turns
    of a chat, put into the chat template of whatever model reads them. `before` are (prompt, answer) pairs that were
    said earlier.
    """

    prompt: str
    answer: str
    system: str | None = None
    before: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Task:
    """Task by name; `family` groups tasks in plots."""

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


@dataclass(frozen=True)
class Level:
    """Kind of novelty beyond that of the held-out part: tasks, and what is new about them in words.

    Nothing but `open_sealed` reads a sealed one: no training, no selection, no default report.
    """

    name: str
    tasks: tuple[str, ...]
    meaning: str
    is_sealed: bool = False


class Suite(ABC):
    """Family of tasks over one kind of text.

    Examples for `train` never share an input with those of other purposes, whatever the seeds. A suite is a value:
    equal suites give equal examples, and `fingerprint` tells unequal ones apart.
    """

    name: str

    @property
    @abstractmethod
    def tasks(self) -> tuple[Task, ...]:
        """All tasks, in a fixed order."""

    @property
    @abstractmethod
    def split(self) -> Split:
        """Split by task."""

    @abstractmethod
    def examples(
        self, task: str, purpose: Purpose, count: int, stream: str, share: tuple[int, int] = WHOLE
    ) -> list[Example]:
        """`count` examples of a task; the same stream name gives the same examples.

        `share` (k, n) asks for the k-th of n parts of the training examples, which do not overlap. Raises UserError
        for an unknown task, or more examples than there are to condition or score on.
        """

    def with_seed(self, seed: int) -> Suite:
        """Return the suite whose split is drawn with another seed; the same one where nothing is drawn."""
        return self

    def toy(self) -> Suite:
        """Return a smaller suite of the same kind, for `--smoke`; the same one by default."""
        return self

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels of novelty that are reported apart; none by default."""
        return ()

    def level_examples(self, level: str, task: str, purpose: Purpose, count: int) -> list[Example]:
        """`count` examples of a task at a level, to condition (`prompts`) or score (`evaluation`) on."""
        return self.examples(task, purpose, count, f"level {level}")

    @abstractmethod
    def available(self, purpose: Purpose) -> int:
        """Return the least number of different examples that every task has for a purpose."""

    def description(self, task: str, level: str = "") -> str:
        """Return what a task is in words, at a level of novelty where one is named; "" where nothing says so."""
        return ""

    def answer_kind(self, task: str) -> Kind:
        """Return how answers of a task are read; `text` counts by exact match of the whole response."""
        return "text"

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything that examples and split depend on."""

    @property
    @abstractmethod
    def probe_prompts(self) -> tuple[str, ...]:
        """Few in-domain prompts, the suite's own domain probe."""

    @property
    def probe_examples(self) -> tuple[Example, ...]:
        """Same prompts as examples without an answer, with the system text that goes with each."""
        return tuple(Example(prompt, "") for prompt in self.probe_prompts)

    @property
    @abstractmethod
    def nonsense_prompts(self) -> tuple[str, ...]:
        """Prompts in the suite's vocabulary that name no task."""

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every word that a tokenizer built for this suite needs. Raises UserError: only some suites build a base."""
        raise UserError(NO_BASE_OF_ITS_OWN.format(self.name))

    def pretraining_example(
        self, rng: random.Random, bare: bool, needs: Mapping[str, float] | None = None
    ) -> Example:
        """Example that a base built for this suite learns from; tasks are drawn by `needs`, by default all alike.

        Raises UserError as `vocabulary`.
        """
        raise UserError(NO_BASE_OF_ITS_OWN.format(self.name))

    def told_examples(self, count: int) -> dict[str, list[Example]]:
        """Examples of every task whose prompts tell a base built for this suite what to do, as no other prompt does.

        Without any, such a base is trained for one round and not measured.
        """
        return {}

    def task(self, name: str) -> Task:
        """Find a task. Raises UserError with the nearest names for an unknown one."""
        import difflib

        found = {t.name: t for t in self.tasks}
        if name not in found:
            near = difflib.get_close_matches(name, found, n=3, cutoff=0.3) or list(found)[:3]
            raise UserError(f"unknown task {name!r}; near it are: {', '.join(near)}")
        return found[name]
