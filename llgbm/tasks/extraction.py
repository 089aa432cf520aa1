"""Kinds of answers, the choices that a prompt offers, and the answer that a response gives. Knows texts only."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from llgbm.tasks.answers import read_text, read_truth
from llgbm.tasks.numerals import AMOUNT, read_number, same_number
from llgbm.tasks.picks import ChoiceReader

Kind = Literal["choice", "truth", "number", "text"]
# Raised when a response may be read as another answer than before: accuracies of datasets in files depend on it.
READING_VERSION = 2
KINDS: tuple[Kind, ...] = ("choice", "truth", "number", "text")
_CHOICE_LINE = re.compile(
    r"^\s*(?:[\[(]\s*)?(?P<label>[A-Z]|\d)\s*(?:[\])]\s*[:.]?|[:.])\s*(?P<text>\S.*)$"
)
_CLOSING_LINE = re.compile(r"^please answer the question choosing from\b", re.I)
_ASKED: Mapping[Kind, re.Pattern[str]] = {
    "choice": re.compile(r"\[(?:[A-Z]|\d)\]"),
    "truth": re.compile(r"\[(?:True|False)\]"),
    "number": re.compile(
        rf"(?:.*\n)?#### ?(?:{AMOUNT})|The (?:answer|value of \w) is (?:{AMOUNT})\.?", re.S
    ),
}
# A byte-order mark, soft hyphens, and blanks and joiners without width.
INVISIBLE = dict.fromkeys([0xFEFF, 0x00AD, 0x200B, 0x2060])


def choices(prompt: str) -> dict[str, str]:
    """Choices that a prompt offers, by label: its last run of lines `A: …`, `B: …` from the first on.

    Labels may be numbers, and stand in brackets. Lines of the question itself that look alike (`A: …` in a dialogue)
    belong to an earlier run. Empty for none.
    """
    runs: list[dict[str, str]] = []
    for line in prompt.splitlines():
        match = _CHOICE_LINE.match(line)
        if match is None:
            continue
        label, text = match["label"], match["text"].strip()
        if label in "A1":
            runs.append({label: text})
        elif runs and ord(label) == ord(list(runs[-1])[-1]) + 1:
            runs[-1][label] = text
    whole = [run for run in runs if len(run) > 1]
    return whole[-1] if whole else {}


def question_key(prompt: str) -> tuple[str, tuple[str, ...]]:
    """Return the key of a question, whatever its whitespace, its Unicode form, its labels and the order of its choices.

    Signs, brackets and case part questions: `5! = ?` is not `5 = ?`.
    """
    offered = choices(prompt)
    lines = [line for line in prompt.splitlines() if not _CLOSING_LINE.match(line)]
    stem = [
        line
        for line in lines
        if not ((m := _CHOICE_LINE.match(line)) and offered.get(m["label"]) == m["text"].strip())
    ]
    return _spelled(" ".join(stem)), tuple(sorted(_spelled(text) for text in offered.values()))


def _spelled(text: str) -> str:
    """Return a text in one spelling: Unicode's composed form, single blanks, no invisible marks."""
    return " ".join(unicodedata.normalize("NFC", text).translate(INVISIBLE).split())


def answer_kind(responses: Iterable[str]) -> Kind:
    """Kind of a dataset by its own responses: all of one form, else `text`."""
    stripped = [response.strip() for response in responses]
    for kind, form in _ASKED.items():
        if stripped and all(form.fullmatch(response) for response in stripped):
            return kind
    return "text"


def in_form(kind: Kind, response: str) -> bool:
    """Check that a response has exactly the form that the instruction asks for. Any text has the form `text`."""
    return kind == "text" or _ASKED[kind].fullmatch(response.strip()) is not None


def extract(kind: Kind, prompt: str, response: str) -> str | None:
    """Answer that a response gives to a prompt, in one spelling for each; None for no answer or more than one."""
    if kind == "choice":
        return extract_choice(response, choices(prompt))
    readers: Mapping[str, Callable[[str], str | None]] = {
        "truth": extract_truth,
        "number": extract_number,
    }
    return readers.get(kind, read_text)(response)


def extract_choice(response: str, offered: Mapping[str, str]) -> str | None:
    """Label of the one choice that a response picks."""
    return ChoiceReader(offered).read(response)


extract_truth, extract_number = read_truth, read_number


def is_same(kind: Kind, answer: str | None, wanted: str) -> bool:
    """Compare the answer that a response gives with the one that is wanted."""
    if kind == "number" and answer is not None:
        return same_number(answer, wanted)
    return answer == wanted


def rivals(kind: Kind, prompt: str) -> Sequence[str]:
    """Responses that a question allows, in the form asked for; empty where there is no closed list of them."""
    if kind == "choice":
        return [f"[{label}]" for label in choices(prompt)]
    return ["[True]", "[False]"] if kind == "truth" else []
