"""Read the number that a response gives, tier by tier as `answers` says."""

from __future__ import annotations

import re
from fractions import Fraction

from llgbm.tasks.answers import NOT, VERDICT, cut, later, plain_commands

_SIGN = r"[-\u2212]"
_CURRENCY = r"(?:[$\u20ac\u00a3\u00a5\u20b9]|\bRs\.?|\bUSD|\bEUR)"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d{1,40})(?:\.\d{1,40})?|\.\d{1,40}"
AMOUNT = rf"{_SIGN}?{_CURRENCY}?\s?{_SIGN}?(?:{_DIGITS})"
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_NUMBER = re.compile(
    rf"(?<![\w.,)/:])(?P<sign>negative\s+|{_SIGN})?(?:{_CURRENCY}\s?)?(?P<inner>{_SIGN})?(?P<digits>{_DIGITS})"
    r"(?:[eE](?P<exponent>[-+]?\d{1,2}))?"
    r"(?:\s+(?P<numerator>\d{1,9})/(?P<below>\d{1,9})(?![\d/])|\s*/\s*(?P<denominator>\d{1,9})(?![\d/]))?"
    r"(?:\s+(?P<scale>thousand|million|billion)\b)?(?!\d|,\d|:\d|/\d|\.\d)"
)
_OPERATOR = (
    r"\s*(?:[-+*/\u00d7\u00f7\u2212\u2013^%x]|\*\*|\\times|\\cdot|\\div|plus|minus|times)\s*"
)
# Before another number: a calculation without a result, or a list.
_MORE = rf"(?:{_OPERATOR}|\s*(?:,\s|or\b|and\b|to\b)\s*)"
_REFUSAL = re.compile(
    r"\b(?:can(?:no|')t|cannot|could ?n[o']t|unable to|not able to|do(?: not|n't) know|not sure|no idea|impossible to"
    r"|won't|will not)\b",
    re.I,
)
_MEANT = re.compile(
    rf"(?:{VERDICT}|\bvalue of \w is\s*|\b(?:total|result|sum|difference|product) (?:is|equals)\s*"
    r"|\u7b54\u6848\s*[\u662f\u4e3a]?\s*[:\uff1a]?\s*)",
    re.I,
)


def read_number(response: str) -> str | None:
    """Return the number that a response ends on: after `####`, in a box, after a verdict, or else the last one.

    Digit groups, currencies, fractions and signs are read; of an equation its result counts; `18.00` is `18`, and a
    fraction is reduced.
    """
    for text in later(_plain_formulas(cut(response))):
        marked = text.split("####")[1:]
        boxed = re.findall(r"\\boxed\s*\{([^{}]*)\}", text)
        for segments in (marked, boxed, _after(r"\bfinal\s+", text), _after("", text)):
            if segments:
                found = {value for s in segments if (value := _result(_clause(s))) is not None}
                return found.pop() if len(found) == 1 else None
        if _REFUSAL.search(text):
            return None
        known = re.sub(rf"{NOT}{AMOUNT}", " ", text, flags=re.I)
        stated = [c for c in re.split(r"\n|[.;?!](?=\s|$)", known) if _values(c)]
        if stated:
            return _of_equation(stated[-1]) or _values(stated[-1])[-1]
    return None


def same_number(one: str, other: str) -> bool:
    """Compare two numbers that were read: 3/4 is 0.75."""
    return Fraction(one) == Fraction(other)


def _plain_formulas(text: str) -> str:
    """Return a text with formulas in plain signs."""
    text = re.sub(r"<<[^<>]*>>", "", text)
    text = re.sub(r"\\d?t?frac\s*\{(\d+)\}\s*\{(\d+)\}", r"\1/\2", text)
    text = text.replace("{,}", ",").replace("\\$", "$").replace("\\%", "%")
    text = re.sub(r"\\[,;:! ]|\\(?:left|right)\b|\^\{?\\circ\}?", "", text)
    text = re.sub(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))", ",", text)
    text = re.sub(
        r"(?<![\d.,])(\d{1,3}(?: \d{3})*) (?=000(?!\d))",
        lambda m: f"{m[1].replace(' ', ',')},",
        text,
    )
    # Emphasis, not a product.
    text = re.sub(r"\*\*(?=\S)([^*\n]*)(?<=\S)\*\*", r"\1", text)
    return re.sub(r"`|(?<!\d)\$(?!\s?[\d.\-\u2212])", "", plain_commands(text, " "))


def _after(words: str, text: str) -> list[str]:
    """Return what follows each verdict that these words begin, where a number comes first."""
    found = []
    for match in _MEANT.finditer(text):
        if words and not re.search(rf"{words}$", text[: match.start()], re.I):
            continue
        rest = text[match.end() :]
        begins = re.match(
            rf"(?:\w\s*=\s*)?[^\w\d$.\-\u2212\n]{{0,4}}(?:about |approximately |around |exactly )?"
            rf"(?:negative\s+)?(?:{AMOUNT})",
            rest,
            re.I,
        )
        if begins or len(_values(_clause(rest))) == 1:
            found.append(rest)
    return found


def _clause(text: str) -> str:
    """Return a text up to the end of its first line that holds something, or of its sentence."""
    line = text.lstrip().split("\n")[0]
    return re.split(r"[.;?!](?=\s|$)", line)[0]


def _result(clause: str) -> str | None:
    """Return the number that a clause states: the result of an equation, or else the first one.

    None where the first is part of a calculation without a result.
    """
    result = _of_equation(clause)
    if result is not None:
        return result
    first = _NUMBER.search(clause)
    if first is None or re.match(rf"{_MORE}{_CURRENCY}?\s?[\d(]", clause[first.end() :]):
        return None
    return _value(first)


def _of_equation(clause: str) -> str | None:
    """Return the last side of an equation that is a number by itself; None for none."""
    sides = clause.split("=")
    for side in reversed(sides if len(sides) > 1 else []):
        values = _values(side)
        if len(values) == 1:
            return values[0]
    return None


def _values(text: str) -> list[str]:
    return [value for match in _NUMBER.finditer(text) if (value := _value(match)) is not None]


def _value(match: re.Match[str]) -> str | None:
    """Return a number in one spelling; None for a division by zero."""
    digits = match["digits"].replace(",", "")
    value = Fraction(digits if digits[0] != "." else f"0{digits}")
    if match["exponent"]:
        value *= Fraction(10) ** int(match["exponent"])
    below = match["denominator"] or match["below"]
    if below is not None and int(below) == 0:
        return None
    if match["denominator"]:
        value /= int(match["denominator"])
    elif match["below"]:
        value += Fraction(int(match["numerator"]), int(match["below"]))
    value *= _SCALES.get(match["scale"] or "", 1)
    negative = bool(match["sign"]) != bool(match["inner"])
    return _spell(-value if negative else value, bool(below))


def _spell(value: Fraction, as_fraction: bool) -> str:
    """Spell a number: whole numbers and decimals as digits, what was a fraction as one."""
    if as_fraction or value.denominator == 1:
        return str(value)
    places = 0
    while (value * 10**places).denominator != 1:
        places += 1
    whole = str(abs(value) * 10**places).rjust(places + 1, "0")
    sign = "-" if value < 0 else ""
    return f"{sign}{whole[:-places]}.{whole[-places:]}"
