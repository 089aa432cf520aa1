"""Unlabelled prompts of a task, from a file: JSON, one JSON value a line, paragraphs, or lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llgbm.runtime import UserError, say
from llgbm.system.documents import AROUND, brief, is_text, parse_json, read_text
from llgbm.tasks.extraction import choices
from llgbm.tasks.forms import CONVERSATIONS, LONGEST, PAIRS, BadRow, read_prompt
from llgbm.tasks.rows import SUFFIXES

NEEDED = (
    "name a text file with one prompt a line or with blank lines between prompts, or one of JSON"
)
# Fields that an object with one prompt has.
ASKED = {*CONVERSATIONS, *(asked for asked, _ in PAIRS)}
_FIRST_CHOICE = re.compile(r"\s*[\[(]?\s*[A1]\s*[:.)\]]\s*\S")
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")


def read_prompts(path: Path) -> list[str]:
    """Read the prompts of a file, and say how they are parted; its content tells.

    Raises UserError for a missing, unreadable or empty file, and for a prompt that no tokenizer can read.
    """
    text = read_text(path, NEEDED, "surrogateescape")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    prompts, how = _parted(path, text)
    prompts = check_prompts(prompts, str(path))
    say(f"{path.name}: {len(prompts)} prompts, {how}")
    return prompts


def check_prompts(prompts: Any, source: str = "the prompts") -> list[str]:
    """Return prompts without the blanks around them, and without empty ones.

    Raises UserError for none, for a single text in place of a list, and for a prompt that is no text.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise UserError(f"{source} is a {type(prompts).__name__}: give a list of prompts")
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise UserError(f"prompt {number} of {source} is a {type(prompt).__name__} and no text")
        if not is_text(prompt):
            raise UserError(
                f"prompt {number} of {source} holds bytes that are no text (no UTF-8, half a character, or a NUL): "
                "mend it"
            )
        if len(prompt) > LONGEST:
            raise UserError(
                f"prompt {number} of {source} has {len(prompt)} characters, {LONGEST} is the limit: shorten it"
            )
    found = [bare for prompt in prompts if (bare := prompt.strip(AROUND).strip())]
    if not found:
        raise UserError(
            f"there is no prompt in {source}: give at least one unlabelled prompt of the task"
        )
    return found


def _parted(path: Path, text: str) -> tuple[list[str], str]:
    """Return the prompts that a text holds, and what parts them."""
    stripped = text.strip(AROUND)
    lines = [line for line in stripped.split("\n") if line.strip(AROUND)]
    if path.suffix in SUFFIXES or stripped[:1] in ("[", "{", '"'):
        listed = _listed(path, stripped, lines)
        if listed is not None:
            return listed
    paragraphs = _BLANK_LINES.split(stripped)
    if 1 < len(paragraphs) < len(lines):
        return paragraphs, "with blank lines between them"
    if len(paragraphs) == 1 and _is_question(path, lines):
        return [stripped], "a question with its choices"
    return lines, "one a line"


def _is_question(path: Path, lines: Sequence[str]) -> bool:
    """Say if lines are a question and its choices, and no list of prompts. Raises UserError for several questions."""
    firsts = [number for number, line in enumerate(lines) if _FIRST_CHOICE.match(line)]
    if not firsts or firsts[0] == 0 or not choices("\n".join(lines)):
        return False
    if len(firsts) > 1:
        raise UserError(
            f"{path} holds questions whose choices stand on lines of their own: put a blank line between two, "
            "or write a JSON list"
        )
    return True


def _listed(path: Path, text: str, lines: Sequence[str]) -> tuple[list[str], str] | None:
    """Return the prompts of a JSON list, or of one JSON value a line; None for a text that is neither."""
    try:
        found, how = parse_json(text), "of JSON"
    except ValueError as error:
        found, how = _values(lines), "one JSON value a line"
        if found is None and path.suffix in SUFFIXES:
            raise UserError(f"{path} cannot be read as JSON ({brief(error)}): {NEEDED}") from error
    if isinstance(found, dict) and "prompts" in found and not found.keys() & ASKED:
        found = found["prompts"]
        if not isinstance(found, list):
            raise UserError(
                f"the 'prompts' of {path} is a {type(found).__name__}: give a list of prompts"
            )
    if isinstance(found, (dict, str)):
        found = [found]
    if not isinstance(found, list) or not _holds_prompts(found):
        if path.suffix in SUFFIXES:
            raise UserError(f"{path} is JSON without a prompt: {NEEDED}")
        return None  # A number, or a list of numbers, may be a prompt itself.
    return [_prompt(path, number, value) for number, value in enumerate(found, 1)], how


def _holds_prompts(found: Sequence[Any]) -> bool:
    """Say if a list has a text or an object, or nothing at all."""
    return not found or any(isinstance(value, (dict, str)) for value in found)


def _values(lines: Sequence[str]) -> list[Any] | None:
    """Parse lines that are texts or objects of JSON; None where one is anything else."""
    try:
        found = [parse_json(line) for line in lines]
    except ValueError:
        return None
    return found if all(isinstance(value, (str, dict)) for value in found) else None


def _prompt(path: Path, number: int, value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return read_prompt(value)
    except BadRow as error:
        raise UserError(f"prompt {number} of {path} {error}: mend it, or take it out") from error
