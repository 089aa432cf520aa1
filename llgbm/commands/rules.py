"""Options about rows of dataset files, which several commands share."""

from __future__ import annotations

import argparse
from typing import Any

from llgbm.tasks.forms import LONGEST, RowRules


def add_row_rules(parser: Any) -> None:
    """Add the options to a parser, or to a group of one."""
    parser.add_argument(
        "--skip-bad-rows",
        action="store_true",
        help="leave bad rows out, and say so, instead of ending",
    )
    parser.add_argument(
        "--longest-row",
        type=int,
        default=LONGEST,
        metavar="N",
        help=f"characters that a row may have; longer ones are bad rows (default: {LONGEST})",
    )


def row_rules(arguments: argparse.Namespace) -> RowRules:
    """Return the rules that the options ask for."""
    return RowRules(arguments.skip_bad_rows, arguments.longest_row)
