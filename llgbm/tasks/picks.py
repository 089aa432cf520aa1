"""Read which of some labelled choices a response picks, tier by tier as `answers` says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from llgbm.tasks.answers import NOT, VERDICT, cut, later, plain_markup

_SINCE = r"because|since|as|due|given|which|and|so|for|with|if"
_RIGHT = (
    r"(?:correct|right|best|true|likely|accurate|appropriate|answer|choice|option|solution|one)"
)
_WRONG = (
    r"(?:\s+(?:is|are|was|were|would\s+be|can\s+be|seems?)(?:\s+(?:both|all|clearly|also|obviously|definitely))*\s+)"
    r"(?:not\b|wrong|incorrect|false|inaccurate|untrue|eliminated|excluded|ruled\s+out|out\b|no\b)|\s+(?:isn't|aren't|wasn't"
    r"|cannot|can't|doesn't|does\s+not|do\s+not|don't|makes\s+no\s+sense)\b"
)
_PICKED = (
    r"\b(?:I|we|let's|let us)(?:'d|'ll|\s+would|\s+will|\s+am|'m|\s+have\s+to)?\s+(?:go(?:ing)?\s+(?:with|for)|pick"
    r"|picked|choose|chose|select|selected|say|answer|guess|vote\s+for|opt\s+for|take)"
)
_IS = r"(?:is|would\s+be|must\s+be|seems(?:\s+to\s+be)?)\s+(?:(?:the|most|my|probably|clearly|only)\s+)*"
_SO = r"\b(?:so|thus|therefore|hence|but)\b,?\s+(?:(?:it\s+is|it's|it\s+must\s+be|must\s+be)\s+)?"
_SURELY = r"definitely|certainly|clearly|surely|probably"
# Before the text of a choice.
_NAMES = rf"(?:{VERDICT}|\\boxed\s*\{{|<answer>|\bit\s+is\s+|\bit's\s+|{_PICKED}\s)"


class ChoiceReader:
    """Reads which of some labelled choices a response picks."""

    def __init__(self, offered: Mapping[str, str]) -> None:
        self.offered = offered
        labels = "".join(offered) or "ABCDE"
        self.any_case = f"[{labels}{labels.lower()}]"
        wordlike = "".join(label for label in labels if label in "AI" or label.isdigit())
        others = "".join(label for label in labels if label not in wordlike)
        plain = [rf"[{others}](?!\w|')"] if others else []
        # "A metal" is no choice, and neither are "2 scales".
        if wordlike:
            plain.append(rf"[{wordlike}](?!\w|'|[.,]\d)(?!\s+(?!(?:{_SINCE})\b)[a-z])")
        small = rf"{self.any_case}(?=\s*(?:$|[.,;:)\n]))"
        bare = f"(?:{'|'.join(plain)})"
        self.label = rf"(?:[\[(]\s*{self.any_case}\s*[\])]|{bare})"
        self.final = rf"(?:{self.label}|{small})"
        self.listed = rf"(?:\[{self.any_case}\]|\({self.any_case}\)|[{labels}]\b)"

    def read(self, response: str) -> str | None:
        """Return the label of the one choice that is picked, None for none or several."""
        text = self._own(cut(response))
        by_text = self._by_text(" ".join(cut(response).split()), text)
        # A label may be the text of another choice.
        if by_text is not None and _words(text).upper() not in self.offered:
            return by_text
        for part in later(text):
            known = self._without_others(part)
            for found in self._tiers(known):
                if found:
                    return found.pop() if len(found) == 1 else None
        return None

    def _own(self, text: str) -> str:
        """Return a text without a next question that bears no name, and without repeated lists of the choices.

        Labels in bold, and those before the text of their choice, stand in round brackets.
        """
        paragraphs = self._of_this_question(re.split(r"\n\s*\n", text))
        text = _plain_bold(_plain_but_bold("\n\n".join(paragraphs)), self.any_case)
        lines = text.split("\n")
        others = [line for line in lines if not self._is_choice_line(line)]
        if len(lines) - len(others) > 1:
            lines = others
        text = "\n".join(lines).strip()
        for label, choice in self.offered.items():
            told = rf"(?<!\w)[\[(]?{label}[\])]?\s*[:.)-]\s*{re.escape(choice)}(?!\w)"
            text = re.sub(told, f"({label})", text)
        return text

    def _of_this_question(self, paragraphs: list[str]) -> list[str]:
        """Return the paragraphs before one that lists other choices."""
        own = {_words(choice) for choice in self.offered.values()}
        for number, paragraph in enumerate(paragraphs[1:], 1):
            listed = set(_listed_choices(paragraph))
            if len(listed) > 1 and listed - own:
                return paragraphs[:number]
        return paragraphs

    def _is_choice_line(self, line: str) -> bool:
        found = re.match(rf"^\W{{0,3}}({self.any_case})\s*[\])]?\s*[:.)]?\s+(.+)$", line)
        if found is None:
            return False
        return _words(found[2]) == _words(self.offered.get(found[1].upper(), "\0"))

    def _without_others(self, text: str) -> str:
        """Return a text without the labels that it denies, and without lists of labels."""
        many = rf"{self.listed}(?:\s*(?:/|,|&|\bor\b|\band\b|,\s*(?:or|and)\b)\s*{self.listed})*"
        text = re.sub(rf"{many}(?:{_WRONG})", " ", text)
        text = re.sub(rf"{NOT}{many}(?!\w)", " ", text, flags=re.I)
        joined = rf"(?:\s*(?:/|,|&|\bor\b|\band\b|,\s*(?:or|and)\b)\s*{self.listed})+(?!\w)"
        text = re.sub(rf"(?<!\w){self.listed}{joined}(?!')", " ", text)
        inside = rf"[\[(]{self.any_case}(?:\s*(?:/|,|\bor\b|\band\b)\s*{self.any_case})+[\])]"
        return re.sub(inside, " ", text)

    def _tiers(self, text: str) -> Iterator[set[str]]:
        """Yield the labels that each tier finds, the clearest first."""
        label, final = self.label, self.final
        known = (rf"\\boxed\s*\{{\s*({final})", rf"<answer>\s*({final})", rf"####\s*({final})")
        yield self._find(text, *known)
        yield self._find(text, rf"(?i:\bfinal\s+{VERDICT})\W{{0,3}}({final})")
        yield self._find(
            text,
            rf"(?i:{VERDICT})\W{{0,3}}(?:(?i:option|choice|letter|number)\s+)?({final})",
            rf"(?<!\w)({self.listed})\s*,?\s+(?i:{_IS}{_RIGHT})\b",
            rf"(?i:{_PICKED})\s+(?:(?i:with|for|option|choice)\s+)?({final})",
            rf"(?i:\b(?:correct|right|final)\s+answer)\W{{0,3}}\s*({label})",
            rf"(?:\u7b54\u6848\s*[\u662f\u4e3a]?|\u9009\u62e9?)\s*[:\uff1a]?\s*({final})",
        )
        yield self._after_verdicts(text)
        yield self._find(text, rf"\[\s*({self.any_case})\s*\]")
        yield self._leading(text)
        yield self._find(text, rf"(?<!\w)\(({self.any_case})\)")
        yield self._find(
            text,
            rf"\b(?i:option|choice|pick|choose|select|letter|label)\s+({final})",
            rf"(?i:{_SO})({label})(?=\W*$|[.,\n])",
            rf"\b(?i:it\s+is|it's|must\s+be|{_SURELY})\s+({label})(?=\W*$|[.,\n])",
            rf"(?<!\w)({self.listed})\s+is\W*$",
        )
        yield self._find(text, rf"(?:\n|[.!?]\s)\W{{0,3}}({label})\W{{0,2}}$")

    def _leading(self, text: str) -> set[str]:
        """Find a label that the response begins with: alone, or parted from what follows."""
        alone = self._find(text, rf"^[^\n:\uff1a]{{1,24}}[:\uff1a]\s*({self.final})\W{{0,2}}$")
        if alone:
            return alone
        counted = self._find(text, rf"(?<!\w)({self.listed})[).:]\s")
        if len(counted) >= min(3, len(self.offered) or 3):
            return set()
        start = rf"^\W{{0,3}}(?:(?i:option|choice|answer)\s+)?({self.label})"
        found = self._find(text, rf"{start}(?:\W{{0,2}}$|[.):,;]|\s*[-\u2013\n]|\s+(?:{_SINCE})\b)")
        if found:
            return found
        for label, choice in self.offered.items():
            # "A wolf" is a wolf.
            if label not in "AI" and _begins(_words(text), f"{_words(label)} {_words(choice)}"):
                return {label}
        small = rf"^\W{{0,3}}({self.any_case})\W{{0,2}}$"
        return self._find(text, small)

    def _after_verdicts(self, text: str) -> set[str]:
        """Find the choices whose text follows a verdict."""
        found = set()
        for match in re.finditer(_NAMES, text, re.I):
            rest = _named(re.split(r"[\n}]", text[match.end() :], maxsplit=1)[0])
            own = [c for c, t in self.offered.items() if _begins(rest, _named(t))]
            # The longest: "ice" begins "ice cream" too.
            own.sort(key=lambda label: len(_words(self.offered[label])))
            found |= set(own[-1:])
        return found

    def _by_text(self, exact: str, text: str) -> str | None:
        """Return the label of the choice whose text, maybe behind its label, is the whole response."""
        for said, spell in ((exact, _exact), (_words(text), _words), (_named(text), _named)):
            named = [label for label in self.offered if self._is_said(label, said, spell)]
            if said and len(named) == 1:
                return named[0]
        return None

    def _is_said(self, label: str, said: str, spell: Callable[[str], str]) -> bool:
        choice = self.offered[label]
        return said in (spell(choice), spell(f"{label} {choice}"))

    def _find(self, text: str, *patterns: str) -> set[str]:
        found = set()
        for pattern in patterns:
            for match in re.finditer(pattern, text):
                found.add(re.sub(r"\W", "", match[1]).upper())
        return found


def _listed_choices(text: str) -> list[str]:
    """Return the texts of lines of a text that look like choices."""
    found = re.findall(r"^\s*[\[(]?[A-H1-8][\])]?\s*[:.)]\s+(\S.*)$", text, re.M)
    return [_words(choice) for choice in found]


def _plain_but_bold(text: str) -> str:
    """Return a text as `plain_markup`, its bold kept."""
    return "**".join(plain_markup(part) if part.strip() else part for part in text.split("**"))


def _plain_bold(text: str, label: str) -> str:
    """Return a text in which a label in bold stands in round brackets, and no other bold is."""
    text = re.sub(rf"\*\*\s*[\[(]?({label})[\])]?\s*[.:)]?\s*\*\*", r" (\1) ", text)
    return text.replace("**", "")


def _words(text: str) -> str:
    """Return the words of a text in lower case, without punctuation; one without words as it is."""
    return " ".join(re.findall(r"\w+|[-+*/<>=%]", text.lower())) or text.strip()


def _named(text: str) -> str:
    """Return the words of a text without an article before them."""
    words = _words(text)
    return re.sub(r"^(?:a|an|the) ", "", words)


def _exact(text: str) -> str:
    return " ".join(text.split())


def _begins(text: str, start: str) -> bool:
    return bool(start) and f"{text} ".startswith(f"{start} ")
