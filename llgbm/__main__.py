"""What is done outside a sweep: `teachers` makes a bank, `bank` takes one over; `generate` writes an adapter, `fetch`
asks a server or the hub for one, `show` says where one comes from, `try` shows its answers, `evaluate` scores it,
`merge`, `stack`, `gguf` and `push` hand it on; `models` says which generators are registered, `serve` serves the
champion.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llgbm.commands import (
    bank,
    evaluate,
    generators,
    gguf,
    hub,
    load,
    merge,
    serve,
    show,
    teachers,
    tryout,
)
from llgbm.runtime import begin_program, exit_status, quiet_libraries

NAME = "llgbm"
COMMANDS = (generators, show, tryout, merge, gguf, hub, load, serve, evaluate, teachers, bank)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line. A wrong option ends with one line and exit status 2."""
    parser = argparse.ArgumentParser(prog=program_name(), description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
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
    begin_program()
    return main()


if __name__ == "__main__":
    sys.exit(run())
