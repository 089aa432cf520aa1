"""Rows of dataset files: lists of JSON, or one JSON object a line."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from llgbm.runtime import UserError
from llgbm.system.documents import AROUND, brief, decode, parse_json
from llgbm.tasks.extraction import question_key
from llgbm.tasks.forms import PAIRS, BadRow, RowRules, read_row
from llgbm.tasks.suite import Example

SUFFIXES = (".json", ".jsonl", ".ndjson")
NEEDED = "a dataset is a JSON list of rows, or a file with one row a line"
Record = tuple[int, Any]


@dataclass(frozen=True)
class Row:
    """One row of a file, and where it stands; rows of a list are counted from 1, those on lines by their line."""

    example: Example
    file: str
    number: int

    @property
    def place(self) -> str:
        return f"row {self.number} of {self.file}"

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Key of the question that the row asks, whatever the order of its choices, after the turns before it."""
        return (*question_key(self.example.prompt), *self.example.before)


@dataclass(frozen=True)
class _Parsed:
    rows: tuple[Row, ...]
    faults: dict[int, str]
    notes: tuple[str, ...]


def read_rows(path: Path, rules: RowRules | None = None) -> tuple[list[Row], list[str]]:
    """Rows of a file, and notes: the form that it is read in, and what is wrong with rows that are left out.

    Raises UserError for a file that holds no rows and, unless the rules skip them, for bad rows.
    """
    rules = rules or RowRules()
    try:
        stat = path.stat()
        parsed = _parse(path, stat.st_mtime_ns, stat.st_size, rules.longest)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} cannot be read as JSON ({brief(error)}): name a folder with whole files"
        ) from error
    faults = parsed.faults
    if faults and not rules.skip_bad:
        first = ", ".join(f"row {number} {fault}" for number, fault in list(faults.items())[:3])
        more = ", …" if len(faults) > 3 else ""
        raise UserError(
            f"{path.name} has {len(faults)} bad rows: {first}{more}; mend them, or leave them out with --skip-bad-rows"
        )
    left_out = [
        f"row {number} of {path.name} {fault}: left out" for number, fault in faults.items()
    ]
    return list(parsed.rows), [*parsed.notes, *left_out]


@lru_cache(maxsize=64)
def _parse(path: Path, changed: int, size: int, longest: int) -> _Parsed:
    """Read a file; the result is kept until the file changes."""
    rows, faults, forms = [], {}, Counter[str]()
    for number, record in records(path):
        try:
            if isinstance(record, BadRow):
                raise record
            example, form = read_row(record, longest)
        except BadRow as error:
            faults[number] = str(error)
            continue
        forms[form] += 1
        rows.append(Row(example, path.name, number))
    usual = ", ".join(PAIRS[0])
    notes = [f"{path.name}: {n} rows of {form}" for form, n in forms.items() if form != usual]
    return _Parsed(tuple(rows), faults, tuple(notes))


def records(path: Path) -> list[Record]:
    """Return what a file lists, each with its number; a line that is no JSON is a BadRow.

    Raises OSError and ValueError for a file that cannot be read, and UserError for one that holds something else.
    """
    text = decode(path.read_bytes(), "surrogateescape")
    try:
        found = parse_json(text)
    except ValueError:
        if not _are_lines(path, text):
            raise
        return _on_lines(text)
    if isinstance(found, list):
        return list(enumerate(found, 1))
    if path.suffix != ".json":
        return _on_lines(text)
    raise UserError(f"{path} holds no list: {NEEDED}")


def _are_lines(path: Path, text: str) -> bool:
    """Say if a file holds one JSON value a line: it is called so, or its first line is an object."""
    first = text.strip(AROUND).partition("\n")[0]
    try:
        return path.suffix != ".json" or isinstance(parse_json(first), dict)
    except ValueError:
        return False


def _on_lines(text: str) -> list[Record]:
    """Parse each line that is not blank. Other marks than the newline may stand in a text of JSON."""
    found: list[Record] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip(AROUND):
            continue
        try:
            found.append((number, parse_json(line)))
        except ValueError as error:
            found.append((number, BadRow(f"is no JSON ({brief(error)})")))
    return found
