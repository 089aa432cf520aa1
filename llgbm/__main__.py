"""What is done outside a sweep: `teachers` makes a bank, `bank` takes one over; `generate` writes an adapter, `fetch`
asks a server or the hub for one, `show` says where one comes from, `try` shows its answers, `evaluate` scores it,
`merge`, `stack` and `push` hand it on; `models` says which generators are registered, `serve` serves the champion.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llgbm.commands import bank, evaluate, hub, merge, serve, show, teachers, tryout
from llgbm.commands.generators import _add_models, fetch, generate
from llgbm.runtime import exit_status, quiet_libraries, speak_utf8
from llgbm.system.output import output_path

NAME = "llgbm"
PROMPTS_HELP = "prompts, one a line, with blank lines between them, or in JSON; the content tells"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line. A wrong option ends with one line and exit status 2."""
    parser = argparse.ArgumentParser(prog=program_name(), description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser(
        "generate", help="write a PEFT adapter from the unlabelled prompts of a task"
    )
    make.add_argument(
        "--model",
        required=True,
        help="models:/NAME@ALIAS, models:/NAME/VERSION, or a generator's folder",
    )
    make.add_argument("--prompts", required=True, type=Path, help=PROMPTS_HELP)
    make.add_argument(
        "--out", required=True, type=output_path, help="the folder that the adapter is written to"
    )
    make.add_argument(
        "--dtype", default="float32", help="of the weights: float32 (default), bfloat16 or float16"
    )
    make.add_argument(
        "--tracking-uri", metavar="URI", help="an MLflow server (default: ./mlruns/mlflow.db)"
    )
    make.set_defaults(do=generate)
    ask = commands.add_parser(
        "fetch", help="ask a served generator for an adapter, or the hub for what was pushed"
    )
    source = ask.add_mutually_exclusive_group(required=True)
    source.add_argument("--url", help="a server (`llgbm serve`), such as http://127.0.0.1:5001")
    source.add_argument("--hub", metavar="REPO", help=hub.REPOSITORY)
    ask.add_argument("--prompts", type=Path, help=f"with --url: {PROMPTS_HELP}")
    ask.add_argument("--out", required=True, type=output_path, help="the folder that is written")
    ask.set_defaults(do=fetch)
    _add_models(
        commands.add_parser(
            "models", help="list, show, promote and roll back registered generators"
        )
    )
    for command in (show, tryout, merge, hub, serve, evaluate, teachers, bank):
        command.add_parser(commands)
    return parser.parse_args(arguments)


def program_name() -> str:
    """Return how this program was called: by its command, or as a module."""
    return NAME if Path(sys.argv[0]).stem == NAME else f"python -m {NAME}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and print its result, JSON or a text; 2 for a user's mistake, 130 for an interrupt."""
    parsed = parse_arguments(arguments)
    quiet_libraries()
    return exit_status(lambda: print_result(parsed.do(parsed)), parsed.debug)


def print_result(result: Any) -> int:
    """Print a text as it is and anything else as JSON; return status 0."""
    print(result if isinstance(result, str) else json.dumps(result))
    return 0


def run() -> int:
    """Run as the program `llgbm`; return its exit status."""
    speak_utf8()
    return main()


if __name__ == "__main__":
    sys.exit(run())
