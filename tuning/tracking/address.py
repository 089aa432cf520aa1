"""Choose the store and the experiment of a command: an option, else MLflow's variable, else the local store."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from llgbm.runtime import say
from tuning.tracking.ownership import reap
from tuning.tracking.runs import STUDY_ID_TAG
from tuning.tracking.store import connect, existing_uri, local_tracking_uri, store_errors

STORE_VARIABLE = "MLFLOW_TRACKING_URI"
EXPERIMENT_VARIABLE = "MLFLOW_EXPERIMENT_NAME"


def chosen_uri(given: str | None) -> str:
    """Return the address of the store that a command uses."""
    return given or os.environ.get(STORE_VARIABLE) or local_tracking_uri(Path.cwd())


def chosen_experiment(given: str | None) -> str | None:
    """Return the experiment that a command uses, None if neither the user nor the environment names one."""
    return given or os.environ.get(EXPERIMENT_VARIABLE) or None


def add_store_options(parser: argparse.ArgumentParser, otherwise: str) -> None:
    """Add the options of store and experiment; `otherwise` says which experiment is the default."""
    parser.add_argument(
        "--tracking-uri",
        metavar="URI",
        help=f"the MLflow store (default: ${STORE_VARIABLE}, else ./mlruns/mlflow.db)",
    )
    parser.add_argument(
        "--experiment",
        metavar="NAME",
        help=f"the experiment (default: ${EXPERIMENT_VARIABLE}, else {otherwise})",
    )


def open_past(given: str | None) -> str:
    """Return the address of a store that exists, after the runs that dead drivers left running were marked KILLED.

    Raises UserError if there is no such store or it fails.
    """
    uri = existing_uri(chosen_uri(given))
    reap_all(uri)
    return uri


def reap_all(uri: str, undriven: bool = False) -> list[str]:
    """Mark what dead drivers left running in any experiment as KILLED; return the ids of their studies.

    `undriven`: see `reap`. Raises UserError if the store fails.
    """
    with store_errors(uri):
        experiments = connect(uri).search_experiments()
    found = [run for one in experiments for run in reap(uri, one.experiment_id, undriven)]
    studies = [run.data.tags.get(STUDY_ID_TAG, run.info.run_id) for run in found]
    for study in studies:
        say(f"the driver of study {study} was killed: its unfinished runs are marked KILLED")
    return studies
