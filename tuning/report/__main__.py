"""Write the report of a past study, from MLflow alone.

python -m tuning.report STUDY_ID [--tracking-uri URI] [--experiment NAME] [--out DIR] [--open-sealed]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llgbm.runtime import begin_program, exit_status, say
from llgbm.system.output import Output, named_path
from tuning.report import find_study, read_study, write_report
from tuning.report.document import REPORT_PATTERNS
from tuning.report.names import file_name
from tuning.tracking.address import add_store_options, chosen_experiment, open_past
from tuning.tracking.runs import STUDY_ID_TAG

if TYPE_CHECKING:
    from mlflow.entities import Run


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line. A wrong option ends with one line and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m tuning.report",
        description="Write the report of a past study, from MLflow alone.",
    )
    parser.add_argument(
        "study", metavar="STUDY_ID", help="a study id, the id of its MLflow run, or `latest`"
    )
    add_store_options(parser, "all")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=named_path,
        help="where the report is written (default: reports/STUDY_ID)",
    )
    parser.add_argument(
        "--open-sealed",
        action="store_true",
        help="measure the study on its sealed tasks, once, and record who opened them when",
    )
    parser.add_argument(
        "--cache",
        metavar="DIR",
        default=".llgbm",
        help="folder of worlds, for --open-sealed (default: ./.llgbm)",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> int:
    """Read the study, write its report, print the summary; return the exit status."""
    if arguments.out:
        Output(arguments.out, REPORT_PATTERNS)
    uri = open_past(arguments.tracking_uri)
    parent = find_study(uri, arguments.study, chosen_experiment(arguments.experiment))
    if arguments.open_sealed:
        _open_sealed(arguments, uri, parent)
    record = read_study(uri, parent.info.run_id)
    out = arguments.out or Path("reports") / file_name(record.study_id or record.run_id)
    print(write_report(out, record))
    say(f"written: {out / 'report.html'} (and report.md, results.csv, results.json)")
    return 0


def _open_sealed(arguments: argparse.Namespace, uri: str, parent: Run) -> None:
    """Measure the study on its sealed tasks. Raises UserError if the code has changed since it was run."""
    from tuning.arguments import study_of
    from tuning.report.sealed import open_sealed
    from tuning.studies.options import Options, StudyArguments
    from tuning.sweep.resume import ARGUMENTS_TAG, check_same_study

    recorded = StudyArguments.from_record(json.loads(parent.data.tags.get(ARGUMENTS_TAG, "{}")))
    study = study_of(replace(Options(), study=recorded))
    check_same_study(study, parent.data.tags.get(STUDY_ID_TAG, ""))
    count = open_sealed(uri, parent, study, Path(arguments.cache).expanduser().resolve())
    say(f"sealed tasks: {count} trials measured now; those measured before keep their numbers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and translate errors: 2 for a user's mistake, 130 for an interrupt."""
    parsed = parse_arguments(arguments)
    return exit_status(lambda: run(parsed), parsed.debug)


if __name__ == "__main__":
    begin_program()
    sys.exit(main())
