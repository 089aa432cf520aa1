"""`python -m llgbm try`: what a base and adapters of it answer to the same prompts."""

from __future__ import annotations

import argparse
import json
import shutil
from typing import TYPE_CHECKING, Any

from llgbm.commands.adapters import adapter_system, load_base_of, parse_named
from llgbm.runtime import UserError, say
from llgbm.system.output import Output, named_path

if TYPE_CHECKING:
    from llgbm.evaluation.benchmark import System

PAGE_PATTERNS = ("answers.json", "answers.html")
MOST_LETTERS = 120  # of a line, where there is no terminal


def add_parser(commands: Any) -> None:
    """Register the command."""
    ask = commands.add_parser("try", help="see answers of base and adapters side by side")
    ask.add_argument(
        "--adapter",
        required=True,
        nargs="+",
        metavar="[NAME=]DIR",
        help="folders of PEFT adapters, named in the result",
    )
    ask.add_argument(
        "--prompts", required=True, type=named_path, metavar="FILE", help="what is asked"
    )
    ask.add_argument(
        "--base", metavar="DIR|HUB", help="the base (default: the one that the adapter names)"
    )
    ask.add_argument(
        "--max-tokens", type=int, default=64, metavar="N", help="longest answer (default: 64)"
    )
    ask.add_argument(
        "--chat",
        action="store_true",
        help="the prompts are turns of a chat: use the base's template",
    )
    ask.add_argument(
        "--out", type=named_path, metavar="DIR", help="write answers.html and answers.json there"
    )
    ask.set_defaults(do=attempt)


def attempt(arguments: argparse.Namespace) -> str:
    """Return the answers as a table; write them as a page where `--out` says. Answers are greedy."""
    from llgbm.evaluation.benchmark import System
    from llgbm.evaluation.transcripts import (
        Section,
        Transcript,
        as_json,
        as_table,
        ask_systems,
        html_page,
    )
    from llgbm.models.encoding import chat_prompt
    from llgbm.tasks.prompts import read_prompts

    if arguments.max_tokens < 1:
        raise UserError(f"--max-tokens is {arguments.max_tokens}; it must be at least 1")
    output = arguments.out and Output(arguments.out, PAGE_PATTERNS)
    prompts = read_prompts(arguments.prompts)
    base = load_base_of(parse_named(arguments.adapter[0])[1], arguments.base)
    systems = [System("base"), *(adapter_system(base, named) for named in arguments.adapter)]
    _check_names(systems)
    system = "" if arguments.chat else None
    asked = [chat_prompt(base.tokenizer, prompt, system) for prompt in prompts]
    answers = ask_systems(base, systems, asked, arguments.max_tokens)
    found = [Transcript(*pair) for pair in zip(prompts, answers, strict=True)]
    if output:
        names = ", ".join(one.name for one in systems[1:])
        about = (
            f"Greedy answers of at most {arguments.max_tokens} tokens to {len(prompts)} prompts of "
            f"{arguments.prompts.name}, by the base {base.path} and with {names}."
        )
        sections = [Section("", found)]
        with output.writing() as stage:
            data = as_json(sections, {"base": base.path, "max_tokens": arguments.max_tokens})
            (stage / "answers.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
            page = html_page("Base and adapters, side by side", about, sections)
            (stage / "answers.html").write_text(page, encoding="utf-8")
        say(f"wrote {arguments.out}/answers.html")
    return as_table(found, shutil.get_terminal_size((MOST_LETTERS, 24)).columns)


def _check_names(systems: list[System]) -> None:
    names = [system.name for system in systems]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two systems are called {twice[0]}: name adapters as NAME=DIR")
