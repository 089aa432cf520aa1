"""Operations and formats of the embedded suite, with the phrases that name them.

Of a part that is seen in training, the first three phrases are for training and evaluation, the last one for the level
of unseen paraphrases alone. The parts that are not seen have no such last phrase.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, repeat

Words = list[str]
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six")


@dataclass(frozen=True)
class Part:
    """One operation or format: a function of words, and phrases in natural language that ask for it."""

    apply: Callable[[Words], Words]
    phrases: tuple[str, ...]
    unseen: str = ""

    @property
    def every_phrase(self) -> tuple[str, ...]:
        return tuple(filter(None, (*self.phrases, self.unseen)))


def _between(words: Words, separator: str) -> Words:
    pieces = chain.from_iterable(zip(words, repeat(separator)))
    return list(pieces)[:-1]


OPERATIONS: Mapping[str, Part] = {
    "first": Part(
        lambda w: w[:1],
        ("give the first word", "return the initial item", "what comes at the start"),
        "name the leading item",
    ),
    "second": Part(
        lambda w: w[1:2],
        ("give the second word", "return item number two", "what comes after the start"),
        "name the item after the leading one",
    ),
    "third": Part(
        lambda w: w[2:3],
        ("give the third word", "return item number three", "what is in third place"),
        "name the item in position three",
    ),
    "last": Part(
        lambda w: w[-1:],
        ("give the last word", "return the final item", "what comes at the end"),
        "name the closing item",
    ),
    "penultimate": Part(
        lambda w: w[-2:-1],
        (
            "give the word before the last",
            "return the penultimate item",
            "what comes just before the end",
        ),
        "name the last item but one",
    ),
    "ends": Part(
        lambda w: [w[0], w[-1]],
        ("give both ends", "return the outer items", "what stands at the start and at the end"),
        "name the leading and the closing item",
    ),
    "tail": Part(
        lambda w: w[1:],
        ("drop the first word", "return all items but the initial one", "leave out the start"),
        "remove the leading item",
    ),
    "init": Part(
        lambda w: w[:-1],
        ("drop the last word", "return all items but the final one", "leave out the end"),
        "remove the closing item",
    ),
    "reverse": Part(
        lambda w: w[::-1],
        ("reverse the words", "return the items backwards", "turn the order around"),
        "list the words from back to front",
    ),
    "copy": Part(
        lambda w: list(w),
        ("copy the words", "return the items unchanged", "repeat the list as it is"),
        "write the same words once more",
    ),
    "swap": Part(
        lambda w: [w[1], w[0], *w[2:]],
        (
            "swap the first two words",
            "exchange the leading pair of items",
            "let the two at the front change places",
        ),
        "let items one and two trade places",
    ),
    "count": Part(
        lambda w: [NUMBER_WORDS[len(w)]],
        ("count the words", "return how many items there are", "tell the size of the list"),
        "say the number of words",
    ),
    "rotate": Part(
        lambda w: [*w[1:], w[0]],
        (
            "move the first word to the end",
            "rotate the items by one",
            "let the start go to the back",
        ),
        "shift the leading item behind the closing one",
    ),
}
NOVEL_OPERATIONS: Mapping[str, Part] = {
    "inner": Part(
        lambda w: w[1:-1],
        ("drop both ends", "return the inner items", "leave out the start and the end"),
    ),
}
SEALED_OPERATIONS: Mapping[str, Part] = {
    "middle": Part(
        lambda w: [w[len(w) // 2]],
        ("give the middle word", "return the central item", "what stands halfway"),
    ),
}
FORMATS: Mapping[str, Part] = {
    "plain": Part(
        lambda w: w,
        ("in plain text", "with nothing added", "and write it bare"),
        "without decoration",
    ),
    "brackets": Part(
        lambda w: ["[", *w, "]"],
        ("in square brackets", "inside a bracket pair", "and put brackets around"),
        "within squared brackets",
    ),
    "parentheses": Part(
        lambda w: ["(", *w, ")"],
        ("in parentheses", "inside round parens", "and enclose it with parentheses"),
        "within rounded brackets",
    ),
    "quotes": Part(
        lambda w: ['"', *w, '"'],
        ("in quotes", "inside quotation marks", "and quote it"),
        "as a quotation",
    ),
    "commas": Part(
        lambda w: [*_between(w, ","), "."],
        (
            "separated by commas and with a full stop",
            "as a comma list ending in a period",
            "and use commas then a dot",
        ),
        "with a comma between them and a period last",
    ),
    "dashes": Part(
        lambda w: ["-", *_between(w, "-")],
        ("with a dash before each", "as a dashed list", "and mark every entry by a hyphen"),
        "hyphenated item by item",
    ),
    "twice": Part(
        lambda w: [*w, *w],
        ("two times", "twice in a row", "and say it again"),
        "and repeat the result",
    ),
    "label": Part(
        lambda w: ["answer", ":", *w],
        ("after the label answer", "labelled as answer", "and begin with answer"),
        "with answer written in front",
    ),
    "closed": Part(
        lambda w: [*w, "done"],
        ("then say done", "closed by the word done", "and finish with done"),
        "with done written last",
    ),
    "polite": Part(
        lambda w: ["sure", ",", *w],
        ("with a polite opening", "in a friendly manner", "and be courteous about it"),
        "with kind words first",
    ),
    "stars": Part(
        lambda w: ["*", *w, "*"],
        ("between stars", "in bold asterisks", "and emphasise it with stars"),
        "starred on either side",
    ),
    "shout": Part(
        lambda w: [*w, "!"],
        ("with an exclamation mark", "as a shout", "and make it loud"),
        "exclaimed",
    ),
    "semicolons": Part(
        lambda w: [*_between(w, ";"), ";"],
        (
            "with a semicolon after each",
            "as a semicolon list",
            "and follow every entry by a semicolon",
        ),
        "semicolons behind them all",
    ),
}
NOVEL_FORMATS: Mapping[str, Part] = {
    "braces": Part(
        lambda w: ["{", *w, "}"],
        ("in curly braces", "inside a brace pair", "and put braces around"),
    ),
}
SEALED_FORMATS: Mapping[str, Part] = {
    "arrows": Part(
        lambda w: [">", *w, "<"],
        ("between arrows", "inside angled marks", "and point arrows at it"),
    ),
}
ALL_OPERATIONS = {**OPERATIONS, **NOVEL_OPERATIONS, **SEALED_OPERATIONS}
ALL_FORMATS = {**FORMATS, **NOVEL_FORMATS, **SEALED_FORMATS}
