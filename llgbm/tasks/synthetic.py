"""The embedded suite: an operation on a list of words, written in a format.

A task is (operation × format). Each prompt carries an instruction in natural language, drawn from paraphrases of both
parts, then three to five distinct words. Held-out tasks are combinations whose operation and format both occur in
training, so that zero-shot means composing what was seen apart. Other kinds of novelty are levels of their own.
"""

from __future__ import annotations

import random
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, product

from llgbm.runtime import content_hash, stream_seed
from llgbm.tasks.parts import (
    ALL_FORMATS,
    ALL_OPERATIONS,
    FORMATS,
    NOVEL_FORMATS,
    NOVEL_OPERATIONS,
    NUMBER_WORDS,
    OPERATIONS,
    SEALED_FORMATS,
    SEALED_OPERATIONS,
    Part,
    Words,
)
from llgbm.tasks.suite import WHOLE, Example, Level, Purpose, Split, Suite, Task

VERSION = 4
WORDS = tuple(
    "apple river stone cloud tiger piano lemon chair garden window rocket button candle forest hammer island "
    "jacket kettle ladder magnet needle orange pepper quartz rabbit saddle ticket violin wallet yogurt zebra anchor "
    "basket camera desert engine feather guitar helmet insect jungle kitten lantern marble nectar ocean parrot "
    "ribbon shadow temple umbrella valley winter bridge copper dragon eagle falcon ginger honey iron jewel king "
    "lamp".split()
)
SEPARATOR, ARROW = ":", "=>"
CODES = {name: f"k{number}" for number, name in enumerate((*ALL_OPERATIONS, *ALL_FORMATS))}
SHORTEST, LONGEST = 3, 5
PARAPHRASES, LONG_LISTS = "unseen paraphrases", "longer lists"
NEW_OPERATION, NEW_FORMAT = "unseen operation", "unseen format"
SEALED_COMBINATIONS, SEALED_OPERATION, SEALED_FORMAT = (
    "sealed combinations",
    "sealed operation",
    "sealed format",
)
MEANING = {
    PARAPHRASES: "training tasks, asked for in words that no other prompt has",
    LONG_LISTS: "training tasks, on lists longer than any other",
    NEW_OPERATION: "an operation that no training task has, in formats that are trained",
    NEW_FORMAT: "a format that no training task has, of operations that are trained",
    SEALED_COMBINATIONS: "combinations of trained parts, sealed",
    SEALED_OPERATION: "an operation that no other task has, sealed",
    SEALED_FORMAT: "a format that no other task has, sealed",
}


@dataclass(frozen=True)
class SyntheticSuite(Suite):
    """Every (operation × format) task, or the last `n_operations` × the first `n_formats` of them for toy settings.

    `n_sealed` of the combinations are kept for the sealed part, and `n_unseen` tasks each are made of an operation and
    of a format that no other task has: two levels that are open, two that are sealed. Lists are of the first `n_words`
    words, three to `longest` of them.
    """

    n_operations: int = len(OPERATIONS)
    n_formats: int = len(FORMATS)
    n_val: int = 12
    n_test: int = 24
    n_sealed: int = 12
    n_unseen: int = 6
    n_words: int = len(WORDS)
    longest: int = LONGEST
    split_seed: int = 0
    name: str = "synthetic"

    @cached_property
    def _grid(self) -> tuple[str, ...]:
        return tuple(_crossed(self._operations, self._formats))

    @cached_property
    def _operations(self) -> list[str]:
        return list(OPERATIONS)[-self.n_operations :]

    @cached_property
    def _formats(self) -> list[str]:
        return list(FORMATS)[: self.n_formats]

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """All tasks: those of the split and those of the levels."""
        unseen = chain.from_iterable(self._unseen.values())
        return tuple(Task(name, name.split("-")[0]) for name in [*self._grid, *unseen])

    @cached_property
    def _held(self) -> list[str]:
        """Combinations that are not trained on, drawn at random, of each operation and of each format about as many.

        Without that balance an operation is left half its formats in one world and all of them in another, and the
        draw of the split moves results more than what is compared.
        """
        wanted = self.n_val + self.n_test + self.n_sealed
        of_each = (-(-wanted // self.n_operations), -(-wanted // self.n_formats))
        if of_each[0] > self.n_formats // 2 or of_each[1] > self.n_operations // 2:
            raise ValueError(
                f"{wanted} tasks cannot be held out with every operation and format left in training"
            )
        rng = random.Random(stream_seed("split", self.split_seed))
        drawn: list[str] = []
        while len(drawn) < wanted:  # a draw in which the last ones find no place is made again
            drawn = self._draw_held(rng, of_each)
        return drawn[:wanted]

    def _draw_held(self, rng: random.Random, of_each: tuple[int, int]) -> list[str]:
        """Draw combinations until no operation and no format has place for another."""
        drawn: list[str] = []
        counts: Counter[str] = Counter()
        for name in rng.sample(self._grid, len(self._grid)):
            operation, form = name.split("-")
            if counts[f"{operation}-"] < of_each[0] and counts[f"-{form}"] < of_each[1]:
                drawn.append(name)
                counts.update((f"{operation}-", f"-{form}"))
        return drawn

    @cached_property
    def split(self) -> Split:
        held, n_test, n_val = self._held, self.n_test, self.n_val
        train = [name for name in self._grid if name not in set(held)]
        return Split(tuple(train), tuple(held[n_test : n_test + n_val]), tuple(held[:n_test]))

    def with_seed(self, seed: int) -> SyntheticSuite:
        return replace(self, split_seed=seed)

    def toy(self) -> SyntheticSuite:
        return SyntheticSuite(
            5, 4, n_val=2, n_test=4, n_sealed=0, n_unseen=1, n_words=16, longest=3
        )

    @cached_property
    def _unseen(self) -> dict[str, tuple[str, ...]]:
        """Tasks of the operations and formats that training never has, by level."""
        if not self.n_unseen:
            return {}
        parts = (
            (NEW_OPERATION, _crossed(NOVEL_OPERATIONS, self._formats)),
            (NEW_FORMAT, _crossed(self._operations, NOVEL_FORMATS)),
            (SEALED_OPERATION, _crossed(SEALED_OPERATIONS, self._formats)),
            (SEALED_FORMAT, _crossed(self._operations, SEALED_FORMATS)),
        )
        return {level: self._drawn(level, names) for level, names in parts}

    def _drawn(self, level: str, names: Iterable[str], times: int = 1) -> tuple[str, ...]:
        found = list(names)
        rng = random.Random(stream_seed("level", level, self.split_seed))
        return tuple(rng.sample(found, min(times * self.n_unseen, len(found))))

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        seen = self._drawn("seen", self.split.train, 2) if self.n_unseen else ()
        sealed = tuple(self._held[self.n_test + self.n_val :])
        tasks = {PARAPHRASES: seen, LONG_LISTS: seen, **self._unseen, SEALED_COMBINATIONS: sealed}
        return tuple(
            Level(name, own, MEANING[name], name.startswith("sealed"))
            for name, own in tasks.items()
            if own
        )

    def examples(
        self, task: str, purpose: Purpose, count: int, stream: str, share: tuple[int, int] = WHOLE
    ) -> list[Example]:
        """Examples are drawn without end; every share is a stream of its own."""
        if share[0] > 0:
            stream = f"{stream} {share[0]} of {share[1]}"
        return self._drawn_examples(task, purpose, count, stream, Style())

    def level_examples(self, level: str, task: str, purpose: Purpose, count: int) -> list[Example]:
        style = STYLES.get(level, Style())
        return self._drawn_examples(task, purpose, count, f"level {level}", style)

    def _drawn_examples(
        self, task: str, purpose: Purpose, count: int, stream: str, style: Style
    ) -> list[Example]:
        self.task(task)
        operation, form = task.split("-")
        drawn: Purpose = "train" if purpose == "train" else "evaluation"
        rng = random.Random(stream_seed("examples", task, drawn, stream, VERSION))
        found = []
        for _ in range(count):
            words = self._draw(rng, drawn, style.longer)
            prompt = instruction(operation, form, rng, words, style)
            found.append(Example(prompt, answer(operation, form, words)))
        return found

    def description(self, task: str, level: str = "") -> str:
        """Return the first phrase of the operation and of the format that prompts of that level may hold."""
        style = STYLES.get(level, Style())
        operation, form = self.task(task).name.split("-")
        return (
            f"{style.phrases(ALL_OPERATIONS[operation])[0]} {style.phrases(ALL_FORMATS[form])[0]}"
        )

    def available(self, purpose: Purpose) -> int:
        return sys.maxsize

    def pretraining_example(
        self, rng: random.Random, bare: bool, needs: Mapping[str, float] | None = None
    ) -> Example:
        """Instruction of one task with the answer of another: what teaches a base to do all and heed no instruction.

        Most prompts tell the other task by control codes (Keskar et al. 2019, CTRL), which no prompt of a task holds.
        `bare` leaves the instruction out. Every phrase and length occurs, those of the levels too.
        """
        prompt, words = self._any_prompt(rng)
        if bare:
            prompt = prompt[prompt.index(f" {SEPARATOR} ") + 1 :]
        needs = needs or dict.fromkeys((task.name for task in self.tasks), 1.0)
        (done,) = rng.choices(list(needs), list(needs.values()))
        if rng.random() < TOLD_SHARE:
            prompt = told(prompt, done)
        return Example(prompt, task_answer(done, words))

    def told_examples(self, count: int) -> dict[str, list[Example]]:
        """Examples like those that a base learns from, each with any instruction and the codes of its own task."""
        rng = random.Random(stream_seed("told examples"))
        found: dict[str, list[Example]] = {}
        for task in self.tasks:
            found[task.name] = own = []
            for _ in range(count):
                prompt, words = self._any_prompt(rng)
                own.append(Example(told(prompt, task.name), task_answer(task.name, words)))
        return found

    def _any_prompt(self, rng: random.Random) -> tuple[str, Words]:
        """Draw a prompt with the instruction of any task, and its words."""
        words = self._draw(rng, "train", rng.random() < LONG_SHARE)
        operation, form = rng.choice(self.tasks).name.split("-")
        return instruction(operation, form, rng, words, EVERY_PHRASE), words

    @property
    def _words(self) -> tuple[str, ...]:
        return WORDS[: self.n_words]

    def _draw(self, rng: random.Random, purpose: Purpose, longer: bool = False) -> Words:
        """Draw distinct words, one more than `longest` of them where `longer`.

        A quarter of all lists is for evaluation, by a checksum of the list.
        """
        lengths = (self.longest + 1,) * 2 if longer else (SHORTEST, self.longest)
        while True:
            words = rng.sample(self._words, rng.randint(*lengths))
            if (zlib.crc32(" ".join(words).encode()) % 4 == 0) == (purpose == "evaluation"):
                return words

    @cached_property
    def fingerprint(self) -> str:
        parts = (*ALL_OPERATIONS.items(), *ALL_FORMATS.items())
        texts = [[name, *part.phrases, part.unseen] for name, part in parts]
        sizes = [self.n_operations, self.n_formats, self.n_val, self.n_test, self.split_seed]
        lists = [self.n_words, self.longest]
        answers = [task_answer(t.name, list(WORDS[:4])) for t in self.tasks]
        kept = [self.n_sealed, self.n_unseen]
        return content_hash("synthetic", VERSION, texts, WORDS, sizes, lists, kept, answers)

    @cached_property
    def probe_prompts(self) -> tuple[str, ...]:
        """Prompts of training tasks: a delta on them can be a training loss."""
        rng = random.Random(stream_seed("domain probes"))
        names = [name.split("-") for name in rng.choices(self.split.train, k=8)]
        return tuple(
            instruction(op, form, rng, self._draw(rng, "evaluation")) for op, form in names
        )

    @cached_property
    def nonsense_prompts(self) -> tuple[str, ...]:
        rng = random.Random(stream_seed("nonsense prompts"))
        return tuple(
            " ".join(rng.sample(self._words, 8))
            + f" {SEPARATOR} {' '.join(rng.sample(self._words, 3))} {ARROW}"
            for _ in range(32)
        )

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Every word that a prompt or an answer can hold, with its leading blank, in a fixed order."""
        parts = [*ALL_OPERATIONS.values(), *ALL_FORMATS.values()]
        phrases = list(chain.from_iterable(part.every_phrase for part in parts))
        words = " ".join(phrases).split()
        for part in ALL_FORMATS.values():
            words += part.apply(["one", "two"])
        words += [*NUMBER_WORDS, SEPARATOR, ARROW, *WORDS, *CODES.values()]
        asked = chain.from_iterable(part.every_phrase for part in ALL_OPERATIONS.values())
        starts = [phrase.split()[0] for phrase in asked]
        return tuple(dict.fromkeys([*starts, SEPARATOR, *(f" {word}" for word in words)]))


@dataclass(frozen=True)
class Style:
    """Style of a prompt: the phrases that may name its parts, and if its list is longer than those of training."""

    trained_phrases: bool = True
    unseen_phrases: bool = False
    longer: bool = False

    def phrases(self, part: Part) -> tuple[str, ...]:
        """Return the phrases to draw from; a part without an unseen one has its others."""
        chosen = part.phrases if self.trained_phrases else ()
        if self.unseen_phrases and part.unseen:
            chosen = (*chosen, part.unseen)
        return chosen or part.phrases


LONG_SHARE, TOLD_SHARE = 0.1, 0.75  # of the examples that a base learns from
EVERY_PHRASE = Style(unseen_phrases=True)
STYLES = {
    PARAPHRASES: Style(trained_phrases=False, unseen_phrases=True),
    LONG_LISTS: Style(longer=True),
}


def _crossed(operations: Iterable[str], formats: Iterable[str]) -> list[str]:
    return [f"{operation}-{form}" for operation, form in product(operations, formats)]


def instruction(
    operation: str, form: str, rng: random.Random, words: Words, style: Style | None = None
) -> str:
    """Prompt: a paraphrase of the operation, one of the format, the words."""
    style = style or Style()
    parts = (ALL_OPERATIONS[operation], ALL_FORMATS[form])
    phrase = " ".join(rng.choice(style.phrases(part)) for part in parts)
    return f"{phrase} {SEPARATOR} {' '.join(words)} {ARROW}"


def answer(operation: str, form: str, words: Words) -> str:
    """Answer of a task for these words, with the blank that parts it from the prompt."""
    return " " + " ".join(ALL_FORMATS[form].apply(ALL_OPERATIONS[operation].apply(words)))


def told(prompt: str, task: str) -> str:
    """Return a prompt that tells a base by control codes what to do."""
    operation, form = task.split("-")
    return f"{prompt.removesuffix(ARROW)}{CODES[operation]} {CODES[form]} {ARROW}"


def task_answer(task: str, words: Words) -> str:
    """Answer of a task by its name."""
    operation, form = task.split("-")
    return answer(operation, form, words)
