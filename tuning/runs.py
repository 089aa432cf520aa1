"""Look after studies in a store.

python -m tuning.runs export STUDY_ID --out study.zip [--tracking-uri URI] [--experiment NAME]
python -m tuning.runs import study.zip [--tracking-uri URI] [--experiment NAME]
python -m tuning.runs reap [--undriven] [--tracking-uri URI]
python -m tuning.runs rerun TRIAL_ID [--cache DIR] [--tracking-uri URI] [--experiment NAME]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llgbm.runtime import begin_program, exit_status, quiet_libraries
from llgbm.system.output import named_path
from tuning.tracking.address import (
    add_store_options,
    chosen_experiment,
    chosen_uri,
    open_past,
    reap_all,
)
from tuning.tracking.store import existing_uri
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
        "--out", metavar="FILE", type=named_path, required=True, help="the file to write"
    )


def _export(arguments: argparse.Namespace) -> dict[str, Any]:
    experiment = chosen_experiment(arguments.experiment)
    return export_study(
        open_past(arguments.tracking_uri), arguments.study, arguments.out, experiment
    )


def _import_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=named_path, help="a file that `export` wrote")


def _import(arguments: argparse.Namespace) -> dict[str, Any]:
    experiment = chosen_experiment(arguments.experiment)
    return import_study(chosen_uri(arguments.tracking_uri), arguments.file, Path.cwd(), experiment)


def _reap_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--undriven",
        action="store_true",
        help="also studies that name no driver, as older versions left them: only if none of them runs",
    )


def _reap(arguments: argparse.Namespace) -> dict[str, Any]:
    uri = existing_uri(chosen_uri(arguments.tracking_uri))
    return {"killed": reap_all(uri, arguments.undriven)}


def _rerun_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trial", metavar="TRIAL_ID", help="the id of a finished trial")
    parser.add_argument(
        "--cache", metavar="DIR", default=".llgbm", help="folder of worlds (default: ./.llgbm)"
    )


def _rerun(arguments: argparse.Namespace) -> dict[str, Any]:
    from tuning.sweep.rerun import rerun_trial

    quiet_libraries()
    experiment = chosen_experiment(arguments.experiment)
    cache = Path(arguments.cache).expanduser().resolve()
    return rerun_trial(open_past(arguments.tracking_uri), arguments.trial, cache, experiment)


COMMANDS: Mapping[str, Command] = {
    "export": Command(
        "write a study with its runs, artifacts and registered versions to a file",
        _export_options,
        _export,
    ),
    "import": Command("bring an exported study into a store", _import_options, _import),
    "reap": Command(
        "mark what killed drivers left running as KILLED, in all experiments", _reap_options, _reap
    ),
    "rerun": Command(
        "run one trial again in this process, without Ray, and compare its numbers with the store's, bit for bit; "
        "exit status 1 if one differs",
        _rerun_options,
        _rerun,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and translate errors: 2 and one sentence for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m tuning.runs", description="Look after studies in a store."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.help, description=command.help)
        command.add_options(own)
        add_store_options(own, "the study's own")
        own.add_argument("--debug", action="store_true", help="show tracebacks")
        own.set_defaults(do=command.do)
    parsed = parser.parse_args(arguments)

    def run() -> int:
        answer = parsed.do(parsed)
        print(json.dumps(answer, sort_keys=True))
        return int(bool(answer.get("different")))

    return exit_status(run, parsed.debug)


if __name__ == "__main__":
    begin_program()
    sys.exit(main())
