"""Make names from a store harmless: as Markdown, as labels of pictures, as file names.

Whoever may write to a store chooses the names of studies, configurations, tasks and baselines. None is trusted.
"""

from __future__ import annotations

import re
from collections.abc import Callable

MARKUP = re.compile(r"[\\`*\[\]<>#|!&~$^]|(?<![^\W_])_|_(?![^\W_])")
LABEL_LENGTH = 60
FILE_LENGTH = 80


def one_line(text: str) -> str:
    """Return text without line breaks, control characters and changes of direction."""
    return "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))


def escaped(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return MARKUP.sub(lambda found: f"\\{found[0]}", one_line(text))


def label(text: str) -> str:
    """Return text for a picture, cut to `LABEL_LENGTH`."""
    text = one_line(text)
    if text.startswith("_"):
        text = f" {text}"  # matplotlib leaves other ones out of legends
    if len(text) > LABEL_LENGTH:
        return f"{text[: LABEL_LENGTH - 1]}…"
    return text


def file_name(text: str) -> str:
    """Return a name for a file or folder: letters, digits and `_.-`, not hidden."""
    return re.sub(r"[^\w.-]+", "_", text).strip("._")[:FILE_LENGTH] or "unnamed"


class Renaming:
    """Rename texts by `make` such that different texts keep different names."""

    def __init__(self, make: Callable[[str], str]) -> None:
        self._make = make
        self._names: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        """Return the new name of a text."""
        if text not in self._names:
            name = self._make(text)
            while name in self._names.values():
                name += "′"
            self._names[text] = name
        return self._names[text]
