"""MLflow's pages over the store of a study: `python -m tuning.ui [--tracking-uri URI] [--port N]`, what `make ui` runs.

Every experiment with a study gets three saved views (in the menu "Views" of its runs): its studies with their trials
below them and the columns that matter first; the curves of its configurations, each a mean over trials within a band
from the lowest to the highest; and its trials, the best first, with a chart of parallel coordinates over λ_w, λ_d, seed
and held-out accuracy. Beside it lies an experiment with a run per configuration
(`tuning.report.summaries`), whose view lists mean, standard deviation and number of seeds. MLflow keeps a view as a
tag of the experiment. The server listens on this machine only.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llgbm.runtime import UserError, begin_program, exit_status, say
from tuning.report.groups import CHOOSING, MAIN
from tuning.report.summaries import SUFFIX, SUMMARY_TAG
from tuning.tracking.address import STORE_VARIABLE, open_past
from tuning.tracking.runs import CONFIG_TAG, TRIAL_TAG, parent_runs
from tuning.tracking.store import (
    connect,
    redact,
    store_errors,
    with_login,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

HOST = "127.0.0.1"
STUDIES_VIEW, CURVES_VIEW = "llgbm-studies", "llgbm-curves"
CHARTS_VIEW, SUMMARY_VIEW = "llgbm-charts", "llgbm-configurations"
AS_CHARTS = "&compareRunsMode=CHART"
# Title, and how its page is opened.
VIEWS = {
    STUDIES_VIEW: ("LLGBM studies", ""),
    CURVES_VIEW: ("LLGBM curves", AS_CHARTS),
    CHARTS_VIEW: ("LLGBM charts", AS_CHARTS),
    SUMMARY_VIEW: ("LLGBM configurations", ""),
}
VIEW_TAG = "mlflow.sharedViewState."
METRICS = (MAIN, "heldout/delta_cosine", CHOOSING, "train/accuracy")
PARAMS = ("lambda_weight", "lambda_delta", "seed", "model_size")
AXES = PARAMS[:3]
CURVES = ("val/accuracy", "val/delta_cosine", "val/accuracy_shuffled_prompts", "loss/total")
MADE_BY_HAND = {"deleted": False, "isGenerated": False}
PARALLEL = {
    "uuid": "llgbm-parallel",
    "type": "PARALLEL",
    "metricSectionId": "llgbm",
    "selectedParams": list(AXES),
    "selectedMetrics": [MAIN],
    "showAllRuns": True,
    "runsCountToCompare": 500,
    **MADE_BY_HAND,
}


def view_state(flat: bool) -> dict[str, Any]:
    """Return the state of MLflow's runs page under a view: search, order, columns and charts, by its own names.

    Only in the order of creation does it put children below their parent; only what it lists is in its charts. So a
    `flat` view lists trials by held-out accuracy, and the other one studies.
    """
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
        "compareRunSections": [_section("LLGBM: λ, seed and held-out accuracy", columns=1)],
        "compareRunCharts": [PARALLEL],
        "isAccordionReordered": True,
    }


def _section(name: str, columns: int) -> dict[str, Any]:
    """Return a section of charts, so many beside each other."""
    shown = {"display": True, "columns": columns, "cardHeight": 420, "isReordered": True}
    return {"uuid": "llgbm", "name": name, **shown, **MADE_BY_HAND}


def curves_state() -> dict[str, Any]:
    """Return the state of the runs page of learning curves: trials grouped by configuration.

    MLflow draws the mean of a group, and behind it a band from its lowest to its highest trial.
    """
    by_configuration = {"mode": "tag", "groupByData": CONFIG_TAG}
    return {
        **view_state(flat=True),
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [by_configuration]},
        "groupsExpanded": {},
        "useGroupedValuesInCharts": True,
        "compareRunSections": [_section("LLGBM: mean and range of each configuration", columns=2)],
        "compareRunCharts": [_line(metric) for metric in CURVES],
    }


def _line(metric: str) -> dict[str, Any]:
    """Return a chart of a metric over training steps."""
    return {
        "uuid": f"llgbm-{metric}",
        "type": "LINE",
        "metricSectionId": "llgbm",
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "lineSmoothness": 0,
        "runsCountToCompare": 20,
        **MADE_BY_HAND,
    }


def summary_state() -> dict[str, Any]:
    """Return the state of the runs page of the configurations: mean, sd and number of seeds, the best first."""
    columns = [MAIN, f"{MAIN}/sd", f"{MAIN}/n", *METRICS[1:]]
    return {
        **view_state(flat=True),
        "searchFilter": f"tags.`{SUMMARY_TAG}` LIKE '%'",
        "selectedColumns": [f"metrics.`{key}`" for key in columns]
        + [f"params.`{key}`" for key in PARAMS if key != "seed"],
    }


def keep_views(
    client: MlflowClient, experiment_id: str, created: int, states: Mapping[str, dict[str, Any]]
) -> None:
    """Save views with an experiment where they are not there in this form. `created` is in ms."""
    tags = client.get_experiment(experiment_id).tags
    for key, state in states.items():
        view = {
            "name": VIEWS[key][0],
            "createdAt": created,
            "updatedAt": created,
            "state": json.dumps(state),
        }
        if tags.get(VIEW_TAG + key) != json.dumps(view):
            client.set_experiment_tag(experiment_id, VIEW_TAG + key, json.dumps(view))


def prepare(tracking_uri: str) -> list[tuple[str, str, list[str]]]:
    """Save the views with every experiment of studies or of their configurations; return name, id and views of each.

    Raises UserError if the store fails.
    """
    with store_errors(tracking_uri):
        client = connect(tracking_uri)
        found = []
        for experiment in client.search_experiments():
            states = {}
            if experiment.name.endswith(SUFFIX):
                states = {SUMMARY_VIEW: summary_state()}
            elif parent_runs(client, [experiment.experiment_id]):
                states = {
                    STUDIES_VIEW: view_state(flat=False),
                    CURVES_VIEW: curves_state(),
                    CHARTS_VIEW: view_state(flat=True),
                }
            if states:
                created = experiment.creation_time or 0
                keep_views(client, experiment.experiment_id, created, states)
                found.append((experiment.name, experiment.experiment_id, list(states)))
    return found


def check_free(port: int) -> None:
    """Raise UserError unless a server can listen at this port of this machine."""
    if not 0 < port < 2**16:
        raise UserError(f"--port is {port}: give one from 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"port {port} cannot be used ({error.strerror}): give another one with --port"
            ) from error


def run(arguments: argparse.Namespace) -> int:
    """Check the store, prepare the views, print their addresses and become the server."""
    check_free(arguments.port)
    uri = open_past(arguments.tracking_uri)
    if uri.startswith("http"):
        raise UserError(
            f"{redact(uri)} is a server that shows its pages itself: open it in a browser."
        )
    experiments = prepare(uri)
    for name, experiment_id, keys in experiments:
        for key in keys:
            view, mode = VIEWS[key]
            page = f"http://{HOST}:{arguments.port}/#/experiments/{experiment_id}/runs"
            say(f"{name}, {view.removeprefix('LLGBM ')}: {page}?viewStateShareKey={key}{mode}")
    say(f"all: http://{HOST}:{arguments.port} (end with Ctrl-C)")
    options = ["--host", HOST, "--port", str(arguments.port), "--workers", "1"]
    # Its jobs score traces of language models: processes that pages of runs do not need.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    # Not an option, for everybody on the machine can read those.
    os.environ["MLFLOW_BACKEND_STORE_URI"] = with_login(uri)
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "server", *options])


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve, or translate errors: 2 and one sentence for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m tuning.ui", description="Serve MLflow's pages on this machine."
    )
    parser.add_argument(
        "--tracking-uri",
        metavar="URI",
        help=f"the MLflow store (default: ${STORE_VARIABLE}, else ./mlruns/mlflow.db)",
    )
    parser.add_argument("--port", type=int, default=5000, metavar="N", help="default: 5000")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parsed = parser.parse_args(arguments)
    return exit_status(lambda: run(parsed), parsed.debug)


if __name__ == "__main__":
    begin_program()
    sys.exit(main())
