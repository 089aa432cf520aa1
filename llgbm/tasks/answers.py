"""Read the answer that a response gives: a choice, True or False, a number, or the text itself. Knows texts only.

A response is read up to a next question, without special tokens, markup and repeated choices. Then it is read in tiers,
from the form that says most clearly that it is the answer to the loosest. The first tier that finds anything decides:
one answer is the answer; two different ones are no answer, since a response that names both has not chosen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

SPECIAL = re.compile(r"<\|[^<>|]{1,40}\|>|</?s>|<(?:end|start)_of_turn>|</?(?:pad|bos|eos)>")
_THOUGHT = re.compile(r"<think>.*?</think>", re.S)
# Where a response that runs on puts the next question.
_NEXT = re.compile(
    r"\n\s*(?:#+\s*|\*\*)?(?:(?:Question|Problem|Exercise|Example)\s*\d*|Q\s*\d*|Human|User|Instruction|Input)\s*\*{0,2}"
    r"[:.]"
)
_TEXT_COMMAND = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}"
)
_FENCE = re.compile(r"^```[\w+-]*\n(.*?)\n?```", re.S)
# Words after which what was said before no longer counts.
_CORRECTION = re.compile(
    r"\b(?:wait|actually|on second thou?ght|correction|scratch that|I made (?:a|an) (?:mistake|error)"
    r"|let me (?:re-?check|reconsider|correct|re-?think))\b",
    re.I,
)
_WORDS = r"(?:\s+[\w'-]+){0,5}?"
VERDICT = (
    rf"\b(?:answer|choice|option|letter|solution|guess|pick|one)\b(?:{_WORDS}\s+"
    r"(?:is|equals|(?:should|must|would|will|has to)\s+be)\b|\s*[:=])\s*:?\s*"
)
NOT = (
    r"(?:\bnot|n't|\bcannot|\bnever|\bneither|\bnor|\brather than|\binstead of|\brul(?:e|es|ed|ing) out"
    r"|\beliminat(?:e|es|ed|ing)|\bexclud(?:e|es|ed|ing))\s+(?:is\s+|be\s+|the\s+|option\s+|choice\s+|answer\s+)*"
)


def cut(response: str) -> str:
    """Return a response without thoughts, special tokens, and what follows where a next question begins."""
    text = _THOUGHT.sub("", response)
    begun = text.lstrip()
    parts = SPECIAL.split(begun)
    text = next((part for part in parts if part.strip()), "")
    found = _NEXT.search(text.strip())
    return text.strip()[: found.start()] if found else text.strip()


def plain_markup(text: str) -> str:
    """Return a text without emphasis, quotes, code marks and LaTeX's commands for text."""
    text = re.sub(r"```\w*|[*`\"\u201c\u201d]", "", plain_commands(text, ""))
    text = re.sub("[\u2018\u2019]", "'", text)
    return re.sub(r"(?<!\w)'(\w)'(?!\w)", r"\1", text).strip()


def plain_commands(text: str, before: str) -> str:
    """Return a text in which LaTeX's commands for text are their content, with something `before` each."""
    while (shorter := _TEXT_COMMAND.sub(rf"{before}\1", text)) != text:
        text = shorter
    return text


def later(text: str) -> Iterator[str]:
    """Yield what follows the last word of correction, then the whole."""
    corrections = list(_CORRECTION.finditer(text))
    if corrections and corrections[-1].start() > 0:
        yield text[corrections[-1].end() :]
    yield text


def read_text(response: str) -> str | None:
    """Return the text of a response with single blanks, out of its code fence and without "The answer is"."""
    text = cut(response)
    fence = _FENCE.match(text)
    text = fence[1] if fence else text
    said = re.match(
        r"(?:so |thus |therefore )?,?\s*(?:the )?(?:final |correct )?answer\s*(?:is\b|:)\s*:?",
        text,
        re.I,
    )
    if said and "\n" not in text:
        text = text[said.end() :].strip().removesuffix(".")
    return " ".join(text.split()) or None


_ADVERB = r"(?:(?:necessarily|entirely|completely|actually|really|always|quite|exactly|strictly|generally)\s+)?"
_BOTH = re.compile(
    r"\[?\btrue\b\]?\s*(?:/|,|\bor\b)\s*\[?\bfalse\b\]?|\[?\bfalse\b\]?\s*(?:/|,|\bor\b)\s*\[?\btrue\b\]?"
    r"|\bneither true nor false\b|\byes\s*(?:/|or|and)\s*no\b|\bno\s*(?:/|or|and)\s*yes\b",
    re.I,
)
_TRUE = ("true", "yes", "yep", "yeah", "correct", "right", "accurate", "t")
_TRUTH_TIERS = (
    r"(?:\\boxed\s*\{|<answer>|####)\s*\[?(true|false|yes|no)\b",
    r"\[\s*(true|false)\s*\]",
    rf"{VERDICT}\W{{0,3}}(true|false|yes|no)\b",
    r"^\W{0,3}(true|false|yes|yep|yeah|no|nope)\b(?! (?:one|idea|information|way)\b)",
    r"\b(true|false)\b",
    r"^\W*(t|f|correct|incorrect|right|wrong)\W*$",
    r"\b(?:statement|claim|assertion|sentence|this|that|it)(?:\s+(?:is|was)|'s)\s+(correct|right|accurate|incorrect|wrong"
    r"|inaccurate)\b",
)


def read_truth(response: str) -> str | None:
    """Return `True` or `False`, as far as a response says one of them."""
    for part in later(plain_markup(cut(response))):
        text = _BOTH.sub(" ", part)
        text = re.sub(rf"{NOT}{_ADVERB}(?:\[?true\b\]?)|\buntrue\b", " false ", text, flags=re.I)
        text = re.sub(rf"{NOT}{_ADVERB}(?:\[?false\b\]?)", " true ", text, flags=re.I)
        text = re.sub(
            rf"{NOT}{_ADVERB}(?:correct|right|accurate)\b", " incorrect ", text, flags=re.I
        )
        for tier in _TRUTH_TIERS:
            found = {m[1].lower() in _TRUE for m in re.finditer(tier, text, re.I)}
            if found:
                return str(found.pop()) if len(found) == 1 else None
    return None
