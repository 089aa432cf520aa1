"""Remove passwords and tokens from text that is printed, logged, tagged or stored."""

from __future__ import annotations

import os
import re

MASK = "***"
SHORTEST = 6  # letters of a secret that is looked for by its value
LOGIN = re.compile(r"(?<=://)[^\s/]*@")
NAMED = re.compile(
    r"(?<![\w-])(password|passwd|pwd|secret|token|api[_-]?key|access[_-]?key|sig|signature)"
    r"([\"']?\s*[=:]\s*[\"']?)[^\s\"'&,;]+",
    re.IGNORECASE,
)
HEADER = re.compile(r"\b(Basic|Bearer)\s+[A-Za-z0-9+/=._~-]{8,}")
SECRET_VARIABLE = re.compile(r"PASSWORD|PASSWD|TOKEN$|SECRET|ACCESS_KEY$|API_KEY$|_PWD$")


def redact(text: str) -> str:
    """Return text without the logins of addresses, named secrets and the secrets of the environment."""
    text = redact_forms(text)
    for secret in _secrets():
        text = text.replace(secret, MASK)
    return text


def redact_forms(text: str) -> str:
    """Return text without what looks like a secret, in any environment: for text that is compared again later."""
    text = LOGIN.sub("", text)
    text = NAMED.sub(rf"\1\2{MASK}", text)
    return HEADER.sub(rf"\1 {MASK}", text)


_known: set[str] = set()


def keep_secret(value: str) -> None:
    """Remove this value from all text from now on."""
    if len(value) >= SHORTEST:
        _known.add(value)


def _secrets() -> list[str]:
    """Return known secrets and those of environment variables that are named like one, longest first."""
    named = {value for name, value in os.environ.items() if SECRET_VARIABLE.search(name)}
    found = _known | {value for value in named if len(value) >= SHORTEST}
    return sorted(found, key=len, reverse=True)
