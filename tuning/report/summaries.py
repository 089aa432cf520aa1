"""Keep a run per configuration beside a study: mean, sample standard deviation and number of seeds, and mean curves.

They lie in an experiment of their own, `<experiment>-configurations`, so that they are not taken for trials.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from tuning.report.groups import CHOOSING, MAIN, Group
from tuning.report.record import StudyRecord
from tuning.tracking.runs import (
    CONFIG_TAG,
    METRICS_PER_CALL,
    STUDY_TAG,
    chunks,
    find_runs,
    log_params,
    now_ms,
    open_run,
)
from tuning.tracking.store import open_experiment, store_errors
from tuning.tracking.study import StudyTracker

if TYPE_CHECKING:
    from mlflow.entities import Metric

SUFFIX = "-configurations"
SUMMARY_TAG = "llgbm.summary_of"
SIZE_TAG = "llgbm.model_size"
SUMMARISED = (MAIN, "heldout/delta_cosine", CHOOSING, "train/accuracy")
CURVES = (CHOOSING, "loss/total")


def keep_summaries(tracker: StudyTracker, record: StudyRecord) -> None:
    """Write the summary of each configuration, over that of an earlier report. Raises UserError if the store fails."""
    client = tracker.client
    with store_errors(tracker.tracking_uri):
        experiment = client.get_experiment(tracker.experiment_id)
        place = None
        if tracker.tracking_uri.startswith("sqlite"):
            place = experiment.artifact_location
        own = open_experiment(client, experiment.name + SUFFIX, place)
        found = find_runs(client, own, {SUMMARY_TAG: tracker.parent_run_id})
        known = {_key(run.data.tags): run for run in found}
        for group in record.groups:
            tags = {
                SUMMARY_TAG: tracker.parent_run_id,
                STUDY_TAG: record.study,
                CONFIG_TAG: group.config,
                SIZE_TAG: group.size,
            }
            run_id = open_run(client, own, known.get(_key(tags)), group.label, tags)
            log_params(client, run_id, _params(group))
            for batch in chunks(list(_metrics(group)), METRICS_PER_CALL):
                client.log_batch(run_id, metrics=batch)
            client.set_terminated(run_id, "FINISHED")


def _key(tags: dict[str, str]) -> tuple[str, str]:
    return tags.get(CONFIG_TAG, ""), tags.get(SIZE_TAG, "")


def _params(group: Group) -> dict[str, str]:
    """Return the settings that all trials of a group share."""
    first, *others = (dict(trial.params) for trial in group.trials)
    shared = {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}
    shared.pop("seed", None)  # of one trial so far, maybe of several later
    return shared


def _metrics(group: Group) -> Iterator[Metric]:
    from mlflow.entities import Metric

    now = now_ms()
    for key in CURVES:
        for step, mean in _mean_curve(group, key):
            yield Metric(f"mean/{key}", mean, now, step)
    for key in SUMMARISED:
        cell = group.cell(key)
        if cell is None:
            continue
        yield Metric(key, cell.mean, now, 0)
        yield Metric(f"{key}/n", cell.n, now, 0)
        if cell.sd is not None:
            yield Metric(f"{key}/sd", cell.sd, now, 0)


def _mean_curve(group: Group, key: str) -> list[tuple[int, float]]:
    """Return the mean over trials at the steps that all of them have."""
    curves = group.curves(key)
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return [(step, float(np.mean([curve[step] for curve in curves]))) for step in steps]
