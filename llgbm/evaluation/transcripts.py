"""Answers of several systems to the same prompts, side by side: a table for terminals and a page for browsers."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llgbm.evaluation.benchmark import System
from llgbm.lora.apply import chunks
from llgbm.models.encoding import prompt_tokens
from llgbm.models.load import Base
from llgbm.models.scoring import Continuation, continuations
from llgbm.runtime import progress
from llgbm.system.documents import COLOURS, check_format

FORMAT_VERSION = 1
CUT = " […]"
OWN_STYLE = """
:root { --right: #0a7a4b; }
@media (prefers-color-scheme: dark) { :root { --right: #4cc38a; } }
body { margin: 0 auto; max-width: 76rem; padding: 0 1rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.about { color: var(--soft); }
article { border: 1px solid var(--line); border-radius: 6px; margin: 1rem 0; overflow: hidden; }
.prompt { background: var(--band); padding: .6rem .9rem; border-bottom: 1px solid var(--line); }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); }
.answers > div { padding: .6rem .9rem; border-right: 1px solid var(--line); min-width: 0; }
.answers > div:last-child { border-right: 0; }
.who { color: var(--soft); font-size: .8rem; overflow-wrap: anywhere; }
pre { margin: 0; font: .95rem/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.same { color: var(--right); }
.none, .cut { color: var(--soft); font-style: italic; }
"""
STYLE = COLOURS + OWN_STYLE


@dataclass(frozen=True)
class Transcript:
    """Prompt with an answer of each system, by name, and the right answer where it is known."""

    prompt: str
    answers: Mapping[str, Continuation]
    wanted: str | None = None


@dataclass(frozen=True)
class Section:
    """Transcripts under a title, such as those of one task."""

    title: str
    transcripts: Sequence[Transcript]


def ask_systems(
    base: Base, systems: Sequence[System], asked: Sequence[str], max_tokens: int
) -> list[dict[str, Continuation]]:
    """Return greedy answers of each system, by name, to texts as the model reads them."""
    found: list[dict[str, Continuation]] = [{} for _ in asked]
    longest = max(map(len, prompt_tokens(base.tokenizer, list(asked))))
    for system in systems:
        for rows in progress(chunks(len(asked), longest + max_tokens), system.name):
            with system.applied(base):
                answers = continuations(base, list(asked[rows]), max_tokens)
            for own, answer in zip(found[rows], answers, strict=True):
                own[system.name] = answer
    return found


def as_table(transcripts: Sequence[Transcript], width: int) -> str:
    """Return transcripts as a table of at most about `width` letters a line."""
    from tabulate import tabulate

    names = list(transcripts[0].answers)
    column = max(16, width // (len(names) + 1) - 3)
    rows = [
        [printable(one.prompt), *(_told(answer) for answer in one.answers.values())]
        for one in transcripts
    ]
    return tabulate(
        rows,
        ["prompt", *map(printable, names)],
        tablefmt="grid",
        maxcolwidths=column,
        disable_numparse=True,
    )


def _told(answer: Continuation) -> str:
    return printable(answer.text).strip() + (CUT if answer.is_cut else "")


def printable(text: str) -> str:
    """Return text without letters that would move a terminal's cursor or turn the order of others."""
    return "".join(
        letter if letter == "\n" or letter.isprintable() else f"\\x{ord(letter):02x}"
        for letter in text
    )


def as_json(sections: Sequence[Section], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return all of a page as data."""
    return {
        "version": FORMAT_VERSION,
        **facts,
        "sections": [
            {"title": section.title, "transcripts": [_as_data(t) for t in section.transcripts]}
            for section in sections
        ],
    }


def from_json(data: Mapping[str, Any]) -> list[Section]:
    """Return the sections that `as_json` wrote.

    Raises UserError for a newer format; ValueError, KeyError or TypeError for other data.
    """
    check_format(data["version"], FORMAT_VERSION, "the file of answers")
    return [
        Section(str(own["title"]), list(map(_transcript, own["transcripts"])))
        for own in data["sections"]
    ]


def _transcript(data: Mapping[str, Any]) -> Transcript:
    answers = {str(name): Continuation(**answer) for name, answer in data["answers"].items()}
    wanted = data["wanted"]
    return Transcript(str(data["prompt"]), answers, None if wanted is None else str(wanted))


def _as_data(transcript: Transcript) -> dict[str, Any]:
    answers = {name: answer._asdict() for name, answer in transcript.answers.items()}
    return {**asdict(transcript), "answers": answers}


def html_page(title: str, about: str, sections: Sequence[Section]) -> str:
    """Return one self-contained page; every text is escaped, no script is in it."""
    body = "\n".join(_section(section) for section in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{_escape(title)}</h1>\n<p class="about">{_escape(about)}</p>\n{body}\n</body>\n</html>\n'
    )


def _section(section: Section) -> str:
    return "\n".join(_section_parts(section))


def _section_parts(section: Section) -> Iterator[str]:
    if section.title:
        yield f"<h2>{_escape(section.title)}</h2>"
    for one in section.transcripts:
        yield f'<article><div class="prompt"><pre>{_escape(one.prompt)}</pre></div><div class="answers">'
        if one.wanted is not None:
            yield _cell("wanted", f"<pre>{_escape(one.wanted)}</pre>")
        for name, answer in one.answers.items():
            yield _cell(name, _answer(answer, one.wanted))
        yield "</div></article>"


def _cell(who: str, content: str) -> str:
    return f'<div><div class="who">{_escape(who)}</div>{content}</div>'


def _answer(answer: Continuation, wanted: str | None) -> str:
    text = answer.text.strip()
    if not text:
        return '<pre class="none">(nothing)</pre>'
    kind = ""
    if wanted is not None and text == wanted.strip():
        kind = ' class="same"'
    cut = ""
    if answer.is_cut:
        cut = f'<span class="cut">{CUT}</span>'
    return f"<pre{kind}>{_escape(text)}{cut}</pre>"


def _escape(text: str) -> str:
    return html.escape(printable(text))
