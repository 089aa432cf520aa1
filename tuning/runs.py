"""Look after studies in a store.

python -m tuning.runs export STUDY_ID --out study.zip [--tracking-uri URI] [--experiment NAME]
python -m tuning.runs import study.zip [--tracking-uri URI] [--experiment NAME]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llgbm.output import output_path
from llgbm.runtime import exit_status
from tuning.tracking.store import local_tracking_uri
from tuning.tracking.transfer import export_study, import_study


@dataclass(frozen=True)
class Command:
    """A subcommand: its help, its own options, and what it does with them; the answer is printed as JSON."""

    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    do: Callable[[argparse.Namespace], Any]


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "study", metavar="STUDY_ID", help="a study id, the id of its MLflow run, or `latest`"
    )
    parser.add_argument(
        "--out", metavar="FILE", type=output_path, required=True, help="the file to write"
    )


def _export(arguments: argparse.Namespace) -> dict[str, Any]:
    return export_study(_store(arguments), arguments.study, arguments.out, arguments.experiment)


def _import_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="a file that `export` wrote")


def _import(arguments: argparse.Namespace) -> dict[str, Any]:
    return import_study(_store(arguments), arguments.file, Path.cwd(), arguments.experiment)


COMMANDS: Mapping[str, Command] = {
    "export": Command(
        "write a study with its runs, artifacts and registered versions to a file",
        _export_options,
        _export,
    ),
    "import": Command("bring an exported study into a store", _import_options, _import),
}


def _store(arguments: argparse.Namespace) -> str:
    named = arguments.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return named or local_tracking_uri(Path.cwd())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and translate errors: 2 and one sentence for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m tuning.runs", description="Look after studies in a store."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.help, description=command.help)
        command.add_options(own)
        own.add_argument(
            "--tracking-uri", metavar="URI", help="the MLflow store (default: ./mlruns/mlflow.db)"
        )
        own.add_argument(
            "--experiment", metavar="NAME", help="the experiment (default: the study's own)"
        )
        own.add_argument("--debug", action="store_true", help="show tracebacks")
        own.set_defaults(do=command.do)
    parsed = parser.parse_args(arguments)

    def run() -> int:
        print(json.dumps(parsed.do(parsed), sort_keys=True))
        return 0

    return exit_status(run, parsed.debug)


if __name__ == "__main__":
    sys.exit(main())
