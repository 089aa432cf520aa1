"""Forms of a row in a dataset file, each read as one example.

Pairs: `prompt` and `response` (or `completion`), Alpaca's `instruction`, `input` and `output`, `question` and `answer`.
Turns: OpenAI's `messages` (`role`, `content`) and ShareGPT's `conversations` (`from`, `value`). The last answer of a
conversation is the one that is wanted; the turns before it are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from llgbm.runtime import UserError
from llgbm.system.documents import is_text
from llgbm.tasks.suite import Example

LONGEST = 20_000
PAIRS = (
    ("prompt", "response"),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("question", "answer"),
)
CONVERSATIONS = ("messages", "conversations")
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot"), "assistant"),
}
# Fields that a question cannot be asked without, and that a pair leaves out.
PARTS_OF_A_QUESTION = ("choices", "options", "context", "passage")


class BadRow(ValueError):
    """Row that is no example; its message goes on after "row 3"."""


@dataclass(frozen=True)
class RowRules:
    """Settings for reading rows: leave bad ones out or refuse their file, and the longest row in characters."""

    skip_bad: bool = False
    longest: int = LONGEST

    def __post_init__(self) -> None:
        if self.longest < 1:
            raise UserError(f"the longest row is {self.longest} characters; it must be at least 1")


def read_row(row: Any, longest: int = LONGEST) -> tuple[Example, str]:
    """Return a row as an example, and the name of its form. Raises BadRow."""
    if not isinstance(row, dict):
        raise BadRow(f"is a {type(row).__name__} and no object")
    names = _form(row)
    example = _example(row, names)
    length = _length(example)
    if length > longest:
        raise BadRow(f"has {length} characters, {longest} is the limit (--longest-row)")
    return example, ", ".join(names)


def read_prompt(row: Any) -> str:
    """Return the prompt of a row, which needs no answer: of a conversation the last turn of a user. Raises BadRow."""
    if not isinstance(row, dict):
        raise BadRow(f"is a {type(row).__name__} and no object")
    for name in (*CONVERSATIONS, "prompt"):
        if isinstance(row.get(name), list):
            asked = [text for role, text in map(_turn, row[name]) if role == "user"]
            if not asked:
                raise BadRow(f"has no turn of a user in its {name!r}")
            return asked[-1]
    names = [name for name, _ in PAIRS if name in row]
    prompt = _text(row, names[0] if names else "prompt")
    return _with_input(prompt, row) if names[0] == "instruction" else prompt


def _form(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the fields that a row is read from: those of the first form that it has all fields of, or else some."""
    for name in CONVERSATIONS:
        if isinstance(row.get(name), list):
            return (name,)
    for pair in PAIRS:
        if row.keys() >= set(pair):
            return pair
    return next((pair for pair in PAIRS if row.keys() & set(pair)), PAIRS[0])


def _example(row: Mapping[str, Any], names: tuple[str, ...]) -> Example:
    system = row.get("system") or ""
    if not isinstance(system, str):
        raise BadRow("has a 'system' that is no text")
    _check_text(system, "system")
    if len(names) == 1:
        return _of_turns(row[names[0]], system)
    asked, answered = names
    if isinstance(row.get(asked), list) and isinstance(row.get(answered), list):
        return _of_turns([*row[asked], *row[answered]], system)
    prompt, answer = _text(row, asked), _text(row, answered)
    if asked == "instruction":
        return Example(_with_input(prompt, row), answer, system, _history(row))
    left_out = [name for name in PARTS_OF_A_QUESTION if row.get(name)]
    if asked == "question" and left_out:
        raise BadRow(f"has {left_out[0]!r} beside its question: put it into the question")
    return Example(prompt, answer, system)


def _with_input(instruction: str, row: Mapping[str, Any]) -> str:
    """Return Alpaca's instruction with its input on the next line, where it has one."""
    given = row.get("input") or ""
    if not isinstance(given, str):
        raise BadRow("has an 'input' that is no text")
    _check_text(given, "input")
    return f"{instruction}\n{given}" if given.strip() else instruction


def _history(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return the (instruction, output) pairs that some Alpaca rows list as turns before."""
    found = row.get("history") or []
    pairs = []
    for pair in found if isinstance(found, list) else [found]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow("has a 'history' that is no list of pairs")
        first, second = (_checked(text, "history") for text in pair)
        pairs.append((first, second))
    return tuple(pairs)


def _of_turns(turns: Sequence[Any], system: str) -> Example:
    """Return a conversation as an example: its last answer, and the pairs of turns before."""
    said = [_turn(turn) for turn in turns]
    while said and said[0][0] == "system":
        if said[0][1] != system:
            system = "\n\n".join(filter(None, (system, said[0][1])))
        said = said[1:]
    wanted = ["user", "assistant"] * (len(said) // 2)
    if not said or [role for role, _ in said] != wanted:
        raise BadRow(
            "has turns that do not go from user to assistant in turn, with an answer at the end"
        )
    texts = [text for _, text in said]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    prompt, answer = pairs[-1]
    return Example(prompt, answer, system, tuple(pairs[:-1]))


def _turn(turn: Any) -> tuple[str, str]:
    """Return role and text of a turn. Raises BadRow for a role or a content that is not read, such as a picture."""
    if not isinstance(turn, dict):
        raise BadRow(f"has a turn that is a {type(turn).__name__} and no object")
    named = turn.get("role", turn.get("from"))
    role = ROLES.get(named.lower()) if isinstance(named, str) else None
    if role is None:
        raise BadRow(f"has a turn of {str(named)[:40]!a}, which is none of system, user, assistant")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = "".join(_checked(_part(part), "turn") for part in content)
    return role, _checked(content, "turn")


def _part(part: Any) -> Any:
    """Return the text of a part of a content; anything but a text is refused where it is checked."""
    is_text_part = isinstance(part, dict) and part.get("type", "text") == "text"
    return part.get("text") if is_text_part else part if isinstance(part, str) else None


def _text(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise BadRow(f"has no {name!r}")
    return _checked(row[name], name)


def _checked(value: Any, name: str) -> str:
    """Return a value as the text that it must be. Raises BadRow naming it."""
    article = "an" if name[0] in "aeiou" else "a"
    if not isinstance(value, str):
        raise BadRow(f"has {article} {name!r} that is no text")
    if not value.strip():
        raise BadRow(f"has an empty {name!r}")
    _check_text(value, name)
    return value


def _check_text(value: str, name: str) -> None:
    if not is_text(value):
        raise BadRow(
            f"has bytes in its {name!r} that are no text (no UTF-8, half a character, or a NUL)"
        )


def _length(example: Example) -> int:
    turns = list(chain.from_iterable(example.before))
    return sum(map(len, (example.prompt, example.answer, example.system or "", *turns)))
