"""What is done outside a sweep: `teachers` makes a bank, `bank` takes one over; `generate` writes an adapter, `fetch`
asks a served generator for one, `evaluate` scores one; `models` says which are registered and which is champion.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llgbm.commands import bank, evaluate, teachers
from llgbm.output import ADAPTER_PATTERNS, Output, output_path
from llgbm.runtime import UserError, exit_status, quiet_libraries, say


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. A wrong option ends with one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m llgbm", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("generate", help="write a PEFT adapter from the unlabelled prompts of a task")
    make.add_argument(
        "--model", required=True, help="models:/NAME@ALIAS, models:/NAME/VERSION, or a generator's folder"
    )
    make.add_argument("--prompts", required=True, type=Path, help="a text file, one prompt a line")
    make.add_argument("--out", required=True, type=output_path, help="the folder that the adapter is written to")
    make.add_argument("--tracking-uri", metavar="URI", help="an MLflow server (default: ./mlruns/mlflow.db)")
    make.set_defaults(do=generate)
    ask = commands.add_parser("fetch", help="ask a served generator (`mlflow models serve`) for an adapter")
    ask.add_argument("--url", required=True, help="the server, such as http://127.0.0.1:5001")
    ask.add_argument("--prompts", required=True, type=Path, help="a text file, one prompt a line")
    ask.add_argument("--out", required=True, type=output_path, help="the folder that the adapter is written to")
    ask.set_defaults(do=fetch)
    _add_models(commands.add_parser("models", help="list, show, promote and roll back registered generators"))
    for command in (evaluate, teachers, bank):
        command.add_parser(commands)
    return parser.parse_args(arguments)


def _add_models(parser: argparse.ArgumentParser) -> None:
    """The four commands about registered generators."""
    actions = parser.add_subparsers(dest="action", required=True)
    for name, target, text in (
        ("list", "NAME", "every version, the newest first (of the model NAME, if given)"),
        ("show", "NAME[/VERSION]", "all that is known of a version (default: the champion)"),
        ("promote", "NAME/VERSION", "make a version the champion, whatever the comparison said"),
        ("rollback", "NAME", "go back to the champion before"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("target", metavar=target, nargs="?" if name == "list" else None)
        action.add_argument("--json", action="store_true", help="print JSON")
        action.add_argument("--tracking-uri", metavar="URI", help="an MLflow server (default: ./mlruns/mlflow.db)")
        action.set_defaults(do=models)


def models(arguments: argparse.Namespace) -> Any:
    """What a command about registered generators answers: a text, or what JSON is made of with `--json`."""
    from tuning import model_commands

    answer = model_commands.COMMANDS[arguments.action](arguments.tracking_uri, arguments.target)
    return answer if arguments.json else model_commands.as_text(answer)


def fetch(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ask a served generator; return where the adapter is."""
    from llgbm.client import fetch_adapter

    prompts = read_prompts(arguments.prompts)
    fetch_adapter(arguments.url, prompts, arguments.out)
    return {"adapter": str(arguments.out), "server": arguments.url, "prompts": len(prompts)}


def generate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the adapter; return where it is and what made it."""
    Output(arguments.out, ADAPTER_PATTERNS)
    prompts = read_prompts(arguments.prompts)
    from llgbm.bundle import GeneratorBundle
    from tuning.registry import fetch_bundle

    bundle = GeneratorBundle.load(fetch_bundle(arguments.model, arguments.tracking_uri))
    bundle.save_adapter(prompts, arguments.out)
    say(f"wrote {arguments.out} from {len(prompts)} prompts; its base is {bundle.facts['base_path']}")
    return {"adapter": str(arguments.out), "base": bundle.facts["base_path"], "prompts": len(prompts)}


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not blank. Raises UserError for a missing, unreadable or empty file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name a text file with one prompt a line") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: name a text file with one prompt a line") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt: write at least one unlabelled prompt of the task, one a line")
    return prompts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and print its result, JSON or a text; 2 for a user's mistake, 130 for an interrupt."""
    parsed = parse_arguments(arguments)
    quiet_libraries()
    return exit_status(lambda: print_result(parsed.do(parsed)), parsed.debug)


def print_result(result: Any) -> int:
    """Print a text as it is and anything else as JSON; return status 0."""
    print(result if isinstance(result, str) else json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
