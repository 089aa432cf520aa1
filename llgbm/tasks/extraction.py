"""What a prompt offers and what a response says: choices, True or False, numbers. Knows texts only.

An answer is read from a response in tiers, from the form that the instruction asks for ("[C]") to the loosest (the
response repeats the text of one choice). The first tier that finds anything decides: one answer is the answer; two
different ones are no answer, since a response that names both has not chosen.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Literal

Kind = Literal["choice", "truth", "number", "text"]
KINDS: tuple[Kind, ...] = ("choice", "truth", "number", "text")
_CHOICE_LINE = re.compile(r"^\s*(?P<label>[A-Z]|\d)\s*[:.)]\s*(?P<text>\S.*)$")
_CLOSING_LINE = re.compile(r"^please answer the question choosing from\b", re.I)
_AMOUNT = r"[-\u2212]?\$?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-\u2212]?\$?\.\d+"
_NUMBER = re.compile(rf"(?<![\w.,)])(?:\$\s?)?(?P<amount>{_AMOUNT})(?![\d])")
_ASKED: Mapping[Kind, re.Pattern[str]] = {
    "choice": re.compile(r"\[(?:[A-Z]|\d)\]"),
    "truth": re.compile(r"\[(?:True|False)\]"),
    "number": re.compile(
        rf"(?:.*\n)?#### ?(?:{_AMOUNT})|The (?:answer|value of \w) is (?:{_AMOUNT})\.?", re.S
    ),
}
# A byte-order mark, soft hyphens, and blanks and joiners without width.
INVISIBLE = dict.fromkeys([0xFEFF, 0x00AD, 0x200B, 0x2060])
_REFUSAL = re.compile(
    r"\b(?:can(?:no|')t|cannot|could ?n[o']t|unable to|not able to|do(?: not|n't) know|not sure|no idea|impossible to"
    r"|won't|will not)\b",
    re.I,
)
_NOT = r"(?:\bnot|n't|\bnever|\bneither|\bnor|\brather than|\binstead of)\s+(?:is\s+|be\s+|the\s+|option\s+|choice\s+)*"
_VERDICT = (
    r"(?:answer|choice|option|solution)\b(?:\s+(?:should|must|would)\s+be|\s+is|\s*[:=])\s*:?\s*"
)


def choices(prompt: str) -> dict[str, str]:
    """Choices that a prompt offers, by label: its last run of lines `A: …`, `B: …` (or `1: …`) from the first on.

    Lines of the question itself that look alike (`A: …` in a dialogue) belong to an earlier run. Empty for none.
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


def _plain(text: str) -> str:
    """Words in lower case, without punctuation; text without any word (code, symbols) is kept as it is."""
    return " ".join(re.findall(r"\w+|[-+*/<>=%]", text.lower())) or text.strip()


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
    return readers.get(kind, _whole)(response)


def _whole(response: str) -> str | None:
    return " ".join(response.split()) or None


def extract_choice(response: str, offered: Mapping[str, str]) -> str | None:
    """Label of the one choice that a response picks."""
    labels = "".join(offered) or "ABCDE"
    one = f"[{labels}{labels.lower()}]"
    text = re.sub(
        rf"[\[(]?{one}[\])]?(?:\s*(?:/|,|\bor\b|\band\b)\s*[\[(]?{one}[\])]?)+(?!\w)",
        " ",
        response.strip(),
    )
    text = re.sub(rf"{_NOT}(?:\[{one}\]|\({one}\)|[{labels}]\b)", " ", text, flags=re.I)
    tiers = (
        rf"\[\s*({one})\s*\]",
        rf"(?i:{_VERDICT})\W{{0,3}}(?:(?i:option|choice)\s+)?([{labels}])(?!\w|['\u2019])(?!\s+[a-z])",
        rf"^\W{{0,3}}(?:(?i:option|choice)\s+)?([{labels}])(?:\W{{0,2}}$|[.):,]|\s*[-\u2013\n])",
        rf"(?<!\w)\(({one})\)|\*\*([{labels}])\b",
        rf"\b(?i:option|choice|pick|choose)\s+([{labels}])\b(?!['\u2019])",
        rf"\n\W{{0,3}}([{labels}])\W{{0,2}}$",
    )
    for tier in tiers:
        found = {next(filter(None, groups)).upper() for groups in _groups(tier, text)}
        if found:
            return found.pop() if len(found) == 1 else None
    said = _plain(response)
    named = [
        label
        for label, choice in offered.items()
        if said in (_plain(choice), _plain(f"{label} {choice}"))
    ]
    return named[0] if len(named) == 1 else None


def _groups(pattern: str, text: str) -> list[tuple[str, ...]]:
    return [match.groups() for match in re.finditer(pattern, text)]


def extract_truth(response: str) -> str | None:
    """`True` or `False`, as far as a response says one of them."""
    text = re.sub(
        r"\[?\btrue\b\]?\s*(?:/|,|\bor\b)\s*\[?\bfalse\b\]?", " ", response.strip(), flags=re.I
    )
    text = re.sub(r"\[?\bfalse\b\]?\s*(?:/|,|\bor\b)\s*\[?\btrue\b\]?", " ", text, flags=re.I)
    text = re.sub(rf"{_NOT}(?:\[?true\b\]?)|\buntrue\b", " false ", text, flags=re.I)
    text = re.sub(rf"{_NOT}(?:\[?false\b\]?)", " true ", text, flags=re.I)
    tiers = (
        r"\[\s*(true|false)\s*\]",
        rf"{_VERDICT}\W{{0,3}}(true|false|yes|no)\b",
        r"^\W{0,3}(true|false|yes|no)\b(?! (?:one|idea|information|way)\b)",
        r"\b(true|false)\b",
    )
    for tier in tiers:
        found = {match[1].lower() in ("true", "yes") for match in re.finditer(tier, text, re.I)}
        if found:
            return str(found.pop()) if len(found) == 1 else None
    return None


def extract_number(response: str) -> str | None:
    """Number that a response ends on: after `####`, in a box, after a verdict, or else the last one.

    Only what stands before a next question counts. Digit groups, currency and signs are read; `18.00` is `18`.
    """
    text = re.split(r"\n\s*(?:Question|Q|Problem)\s*\d*\s*[:.]", response)[0]
    tiers = (
        r"####[^\S\n]*(?:\w+\s*=\s*)?",
        r"\\boxed\{\s*",
        rf"(?:{_VERDICT}|\bvalue of \w is\s*)(?:\w\s*=\s*)?[^\w\d$.\-\u2212\n]{{0,4}}",
    )
    for tier in tiers:
        found = [
            _number(match["amount"])
            for match in re.finditer(rf"{tier}(?:\$\s?)?(?P<amount>{_AMOUNT})", text, re.I)
        ]
        if found:
            return found[0] if len(set(found)) == 1 else None
    if "####" in text or _REFUSAL.search(text):
        return None
    numbers = [
        _number(match["amount"]) for match in _NUMBER.finditer(re.sub(r"<<[^<>]*>>", " ", text))
    ]
    return numbers[-1] if numbers else None


def _number(amount: str) -> str:
    value = Decimal(re.sub(r"[\s$,]", "", amount.replace("\u2212", "-")))
    return f"{value.normalize():f}" if value else "0"


def rivals(kind: Kind, prompt: str) -> Sequence[str]:
    """Responses that a question allows, in the form asked for; empty where there is no closed list of them."""
    if kind == "choice":
        return [f"[{label}]" for label in choices(prompt)]
    return ["[True]", "[False]"] if kind == "truth" else []
