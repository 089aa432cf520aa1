"""MLflow's pages over the store of a study: `python -m tuning.ui [--tracking-uri URI] [--port N]`, what `make ui` runs.

Every experiment with a study gets two saved views (in the menu "Views" of its runs): its studies with their trials
below them and the columns that matter first; and its trials, the best first, with a chart of parallel coordinates over
λ_w, λ_d, seed and held-out accuracy. MLflow keeps such a view as a tag of the experiment. The server listens on this
machine only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llgbm.runtime import UserError, exit_status, say
from tuning.report.groups import CHOOSING, MAIN
from tuning.tracking.runs import TRIAL_TAG, parent_runs
from tuning.tracking.store import (
    connect,
    existing_uri,
    local_tracking_uri,
    redact,
    store_errors,
    with_login,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

HOST = "127.0.0.1"
STUDIES_VIEW, CHARTS_VIEW = "llgbm-studies", "llgbm-charts"
VIEWS = {
    STUDIES_VIEW: ("LLGBM studies", False, ""),
    CHARTS_VIEW: ("LLGBM charts", True, "&compareRunsMode=CHART"),
}
VIEW_TAG = "mlflow.sharedViewState."
METRICS = (MAIN, "heldout/delta_cosine", CHOOSING, "train/accuracy")
PARAMS = ("lambda_weight", "lambda_delta", "seed", "model_size")
AXES = PARAMS[:3]


def view_state(flat: bool) -> dict[str, Any]:
    """Return the state of MLflow's runs page under a view: search, order, columns and charts, by its own names.

    Only in the order of creation does it put children below their parent; only what it lists is in its charts. So a
    `flat` view lists trials by held-out accuracy, and the other one studies.
    """
    section = {
        "uuid": "llgbm",
        "name": "LLGBM: λ, seed and held-out accuracy",
        "display": True,
        "columns": 1,
        "cardHeight": 420,
    }
    chart = {
        "uuid": "llgbm-parallel",
        "type": "PARALLEL",
        "metricSectionId": "llgbm",
        "selectedParams": list(AXES),
        "selectedMetrics": [MAIN],
        "showAllRuns": True,
        "runsCountToCompare": 500,
    }
    made_by_hand = {"deleted": False, "isGenerated": False}
    return {
        "searchFilter": f"tags.`{TRIAL_TAG}` LIKE '%'" if flat else "",
        "orderByKey": f"metrics.`{MAIN}`" if flat else "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": [f"metrics.`{key}`" for key in METRICS]
        + [f"params.`{key}`" for key in PARAMS],
        "runsHiddenMode": "SHOW_ALL",
        "hideEmptyCharts": False,
        "compareRunSections": [{**section, **made_by_hand, "isReordered": True}],
        "compareRunCharts": [{**chart, **made_by_hand}],
        "isAccordionReordered": True,
    }


def keep_views(client: MlflowClient, experiment_id: str, created: int) -> None:
    """Save the views with an experiment where they are not there in this form. `created` is in ms."""
    tags = client.get_experiment(experiment_id).tags
    for key, (name, flat, _) in VIEWS.items():
        view = {
            "name": name,
            "createdAt": created,
            "updatedAt": created,
            "state": json.dumps(view_state(flat)),
        }
        if tags.get(VIEW_TAG + key) != json.dumps(view):
            client.set_experiment_tag(experiment_id, VIEW_TAG + key, json.dumps(view))


def prepare(tracking_uri: str) -> list[tuple[str, str]]:
    """Save the views with every experiment that holds a study; return their names and ids.

    Raises UserError if the store fails.
    """
    with store_errors(tracking_uri):
        client = connect(tracking_uri)
        found = []
        for experiment in client.search_experiments():
            if parent_runs(client, [experiment.experiment_id]):
                keep_views(client, experiment.experiment_id, experiment.creation_time or 0)
                found.append((experiment.name, experiment.experiment_id))
    return found


def run(arguments: argparse.Namespace) -> int:
    """Check the store, prepare the views, print their addresses and become the server."""
    uri = existing_uri(arguments.tracking_uri or local_tracking_uri(Path.cwd()))
    if uri.startswith("http"):
        raise UserError(
            f"{redact(uri)} is a server that shows its pages itself: open it in a browser."
        )
    experiments = prepare(uri)
    for name, experiment_id in experiments:
        for key, (view, _, mode) in VIEWS.items():
            page = f"http://{HOST}:{arguments.port}/#/experiments/{experiment_id}/runs"
            say(f"{name}, {view.removeprefix('LLGBM ')}: {page}?viewStateShareKey={key}{mode}")
    say(f"all: http://{HOST}:{arguments.port} (end with Ctrl-C)")
    options = ["--host", HOST, "--port", str(arguments.port), "--workers", "1"]
    # Not an option, for everybody on the machine can read those.
    os.environ["MLFLOW_BACKEND_STORE_URI"] = with_login(uri)
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "server", *options])


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve, or translate errors: 2 and one sentence for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m tuning.ui", description="Serve MLflow's pages on this machine."
    )
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="the MLflow store (default: ./mlruns/mlflow.db)"
    )
    parser.add_argument("--port", type=int, default=5000, metavar="N", help="default: 5000")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parsed = parser.parse_args(arguments)
    return exit_status(lambda: run(parsed), parsed.debug)


if __name__ == "__main__":
    sys.exit(main())
