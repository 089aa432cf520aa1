"""The embedded suite: an operation on a list of words, written in a format.

A task is (operation × format). Each prompt carries an instruction in natural language, drawn from paraphrases of both
parts, then three to five distinct words. Held-out tasks are combinations whose operation and format both occur in
training, so that zero-shot means composing what was seen apart.
"""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from llgbm.runtime import content_hash, stream_seed
from llgbm.tasks.suite import WHOLE, Example, Purpose, Split, Suite, Task

Words = list[str]
VERSION = 1
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five")
OPERATIONS: dict[str, tuple[Callable[[Words], Words], tuple[str, ...]]] = {
    "first": (
        lambda w: w[:1],
        ("give the first word", "return the initial item", "what comes at the start"),
    ),
    "second": (
        lambda w: w[1:2],
        ("give the second word", "return item number two", "what comes after the start"),
    ),
    "third": (
        lambda w: w[2:3],
        ("give the third word", "return item number three", "what is in third place"),
    ),
    "last": (
        lambda w: w[-1:],
        ("give the last word", "return the final item", "what comes at the end"),
    ),
    "penultimate": (
        lambda w: w[-2:-1],
        (
            "give the word before the last",
            "return the penultimate item",
            "what comes just before the end",
        ),
    ),
    "ends": (
        lambda w: [w[0], w[-1]],
        ("give both ends", "return the outer items", "what stands at the start and at the end"),
    ),
    "tail": (
        lambda w: w[1:],
        ("drop the first word", "return all items but the initial one", "leave out the start"),
    ),
    "init": (
        lambda w: w[:-1],
        ("drop the last word", "return all items but the final one", "leave out the end"),
    ),
    "reverse": (
        lambda w: w[::-1],
        ("reverse the words", "return the items backwards", "turn the order around"),
    ),
    "copy": (
        lambda w: list(w),
        ("copy the words", "return the items unchanged", "repeat the list as it is"),
    ),
    "swap": (
        lambda w: [w[1], w[0], *w[2:]],
        (
            "swap the first two words",
            "exchange the leading pair of items",
            "let the two at the front change places",
        ),
    ),
    "count": (
        lambda w: [NUMBER_WORDS[len(w)]],
        ("count the words", "return how many items there are", "tell the size of the list"),
    ),
}
FORMATS: dict[str, tuple[Callable[[Words], Words], tuple[str, ...]]] = {
    "plain": (lambda w: w, ("in plain text", "with nothing added", "and write it bare")),
    "brackets": (
        lambda w: ["[", *w, "]"],
        ("in square brackets", "inside a bracket pair", "and put brackets around"),
    ),
    "parentheses": (
        lambda w: ["(", *w, ")"],
        ("in parentheses", "inside round parens", "and enclose it with parentheses"),
    ),
    "quotes": (lambda w: ['"', *w, '"'], ("in quotes", "inside quotation marks", "and quote it")),
    "commas": (
        lambda w: [*_joined(w, ","), "."],
        (
            "separated by commas and with a full stop",
            "as a comma list ending in a period",
            "and use commas then a dot",
        ),
    ),
    "dashes": (
        lambda w: ["-", *_joined(w, "-")],
        ("with a dash before each", "as a dashed list", "and mark every entry by a hyphen"),
    ),
    "twice": (lambda w: [*w, *w], ("two times", "twice in a row", "and say it again")),
    "label": (
        lambda w: ["answer", ":", *w],
        ("after the label answer", "labelled as answer", "and begin with answer"),
    ),
    "closed": (
        lambda w: [*w, "done"],
        ("then say done", "closed by the word done", "and finish with done"),
    ),
    "polite": (
        lambda w: ["sure", ",", *w],
        ("with a polite opening", "in a friendly manner", "and be courteous about it"),
    ),
    "stars": (
        lambda w: ["*", *w, "*"],
        ("between stars", "in bold asterisks", "and emphasise it with stars"),
    ),
    "shout": (lambda w: [*w, "!"], ("with an exclamation mark", "as a shout", "and make it loud")),
}
WORDS = tuple(
    "apple river stone cloud tiger piano lemon chair garden window rocket button candle forest hammer island "
    "jacket kettle ladder magnet needle orange pepper quartz rabbit saddle ticket violin wallet yogurt zebra anchor "
    "basket camera desert engine feather guitar helmet insect jungle kitten lantern marble nectar ocean parrot "
    "ribbon shadow temple umbrella valley winter bridge copper dragon eagle falcon ginger honey iron jewel king "
    "lamp".split()
)
SEPARATOR, ARROW = ":", "=>"


def _joined(words: Words, separator: str) -> Words:
    return [piece for word in words for piece in (word, separator)][:-1]


@dataclass(frozen=True)
class SyntheticSuite(Suite):
    """Every (operation × format) task, or the first `n_operations` × `n_formats` of them for toy settings."""

    n_operations: int = len(OPERATIONS)
    n_formats: int = len(FORMATS)
    n_val: int = 12
    n_test: int = 24
    split_seed: int = 0
    name: str = "synthetic"

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        operations = list(OPERATIONS)[-self.n_operations :]
        return tuple(
            Task(f"{op}-{form}", op)
            for op in operations
            for form in list(FORMATS)[: self.n_formats]
        )

    @cached_property
    def split(self) -> Split:
        """Held-out tasks are drawn at random, at most half of any operation and of any format."""
        names = [t.name for t in self.tasks]
        random.Random(stream_seed("split", self.split_seed)).shuffle(names)
        held: list[str] = []
        for name in names:
            if len(held) < self.n_val + self.n_test and self._still_covered(name, held):
                held.append(name)
        if len(held) < self.n_val + self.n_test:
            raise ValueError(
                f"only {len(held)} tasks can be held out with every operation and format left in training"
            )
        test, val = held[: self.n_test], held[self.n_test :]
        train = [t.name for t in self.tasks if t.name not in set(held)]
        return Split(tuple(train), tuple(val), tuple(test))

    def _still_covered(self, name: str, held: list[str]) -> bool:
        operation, form = name.split("-")
        same_op = sum(h.split("-")[0] == operation for h in held)
        same_form = sum(h.split("-")[1] == form for h in held)
        return same_op < self.n_formats // 2 and same_form < self.n_operations // 2

    def examples(
        self, task: str, purpose: Purpose, count: int, stream: str, share: tuple[int, int] = WHOLE
    ) -> list[Example]:
        """Examples are drawn without end; every share is a stream of its own."""
        self.task(task)
        if share[0] > 0:
            stream = f"{stream} {share[0]} of {share[1]}"
        drawn: Purpose = "train" if purpose == "train" else "evaluation"
        rng = random.Random(stream_seed("examples", task, drawn, stream, VERSION))
        return [self._example(task, draw_words(rng, drawn), rng) for _ in range(count)]

    def available(self, purpose: Purpose) -> int:
        return sys.maxsize

    @staticmethod
    def _example(task: str, words: Words, rng: random.Random) -> Example:
        operation, form = task.split("-")
        return Example(instruction(operation, form, rng, words), answer(operation, form, words))

    def pretraining_example(self, rng: random.Random, bare: bool) -> Example:
        """Instruction of one task with the answer of another: what teaches a base to do all and heed nothing.

        `bare` leaves the instruction out.
        """
        words = draw_words(rng, "train")
        named, done = rng.choice(self.tasks).name.split("-"), rng.choice(self.tasks).name.split("-")
        prompt = instruction(named[0], named[1], rng, words)
        return Example(
            prompt[prompt.index(f" {SEPARATOR} ") + 1 :] if bare else prompt,
            answer(done[0], done[1], words),
        )

    @cached_property
    def fingerprint(self) -> str:
        texts = [[n, list(p)] for table in (OPERATIONS, FORMATS) for n, (_, p) in table.items()]
        sizes = [self.n_operations, self.n_formats, self.n_val, self.n_test, self.split_seed]
        answers = [
            self._example(t.name, list(WORDS[:4]), random.Random(0)).answer for t in self.tasks
        ]
        return content_hash("synthetic", VERSION, texts, WORDS, sizes, answers)

    @cached_property
    def probe_prompts(self) -> tuple[str, ...]:
        rng = random.Random(stream_seed("domain probes"))
        names = [t.name.split("-") for t in rng.choices(self.tasks, k=8)]
        return tuple(
            instruction(op, form, rng, draw_words(rng, "evaluation")) for op, form in names
        )

    @cached_property
    def nonsense_prompts(self) -> tuple[str, ...]:
        rng = random.Random(stream_seed("nonsense prompts"))
        return tuple(
            " ".join(rng.sample(WORDS, 8))
            + f" {SEPARATOR} {' '.join(rng.sample(WORDS, 3))} {ARROW}"
            for _ in range(32)
        )

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Every word that a prompt or an answer can hold, with its leading blank, in a fixed order."""
        phrases = [
            p
            for table in (OPERATIONS, FORMATS)
            for _, paraphrases in table.values()
            for p in paraphrases
        ]
        forms = [piece for form, _ in FORMATS.values() for piece in form(["one", "two"])]
        words = (
            [w for p in phrases for w in p.split()]
            + forms
            + list(NUMBER_WORDS)
            + [SEPARATOR, ARROW]
            + list(WORDS)
        )
        starts = [
            phrase.split()[0] for _, paraphrases in OPERATIONS.values() for phrase in paraphrases
        ]
        return tuple(dict.fromkeys([*starts, SEPARATOR, *(f" {word}" for word in words)]))


def draw_words(rng: random.Random, purpose: Purpose) -> Words:
    """Three to five distinct words; a quarter of all lists is kept for evaluation, by a checksum of the list."""
    while True:
        words = rng.sample(WORDS, rng.randint(3, 5))
        if (zlib.crc32(" ".join(words).encode()) % 4 == 0) == (purpose == "evaluation"):
            return words


def instruction(operation: str, form: str, rng: random.Random, words: Words) -> str:
    """Prompt: a paraphrase of the operation, one of the format, the words."""
    phrase = f"{rng.choice(OPERATIONS[operation][1])} {rng.choice(FORMATS[form][1])}"
    return f"{phrase} {SEPARATOR} {' '.join(words)} {ARROW}"


def answer(operation: str, form: str, words: Words) -> str:
    """Answer of a task for these words, with the blank that parts it from the prompt."""
    return " " + " ".join(FORMATS[form][0](OPERATIONS[operation][0](words)))
