"""Read files of text and JSON that users bring: past byte-order marks, never with a traceback; colours of pages."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from llgbm.runtime import UserError

# Colours of every page that is written, in light and dark.
COLOURS = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5a6069; --page: #ffffff; --line: #d9dce1; --band: #f4f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --soft: #a2a9b4; --page: #16181c; --line: #343942;
  --band: #1f2329; } }
* { box-sizing: border-box; }
"""
# The marks of UTF-16 begin those of UTF-32. That of UTF-8 stands around a text, as blanks do.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What may stand around a line of JSON: files are joined with their marks.
AROUND = "\ufeff \t\r\n"


def check_format(version: Any, newest: int, what: str) -> None:
    """Raise UserError for a format that is newer than this program, ValueError for no number; `what` names the file."""
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"version {version!r}")
    if version > newest:
        raise UserError(
            f"{what} is of format {version}, and this version of llgbm reads formats up to {newest}: "
            "install a newer llgbm"
        )


def decode(content: bytes, errors: str = "strict") -> str:
    """Decode the content of a file: UTF-8, or what its byte-order mark says. Raises ValueError for other bytes.

    With `errors` "surrogateescape", bytes that are no UTF-8 become lone surrogates, which `is_text` finds.
    """
    for mark, encoding in MARKS:
        if content.startswith(mark):
            return content.decode(encoding)
    return content.decode("utf-8", errors)


def parse_json(text: str) -> Any:
    """Parse JSON. Raises ValueError for a text that is none, or that is nested too deeply to be read."""
    try:
        return json.loads(text.strip(AROUND))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_text(path: Path, needed: str, errors: str = "strict") -> str:
    """Read a text file. Raises UserError for one that is missing or no text; `needed` says what to name."""
    try:
        return decode(path.read_bytes(), errors)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; {needed}") from error
    except ValueError as error:
        raise UserError(f"{path} is no UTF-8 text ({brief(error)}): {needed}") from error


def read_json(path: Path, needed: str) -> Any:
    """Read a file of JSON. Raises UserError for one that is missing or none; `needed` says what to name."""
    try:
        return parse_json(decode(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({brief(error)}): {needed}") from error


def brief(error: Exception) -> str:
    """Return the first line of an error's message, cut to what a sentence can hold."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def is_text(text: str) -> bool:
    """Say if a text can be written and was read as what it is.

    It holds no lone surrogate, and no NUL, which stands between the letters of UTF-16 that is read byte by byte.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in text
