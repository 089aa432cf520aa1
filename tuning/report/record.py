"""A study as MLflow remembers it: found by its id, read with what its trials left among their artifacts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llgbm.evaluation.baselines import from_metrics, known_baselines, to_metrics
from llgbm.runtime import UserError
from llgbm.world import World
from tuning.report.groups import (
    CHOOSING,
    AccuracyByTask,
    Comparison,
    Group,
    compare,
    group_trials,
    ranked,
    size_of,
)
from tuning.report.plots import CURVES, DeltaMap
from tuning.tracking.runs import STUDY_ID_TAG, STUDY_TAG, TrialResult, read_trials
from tuning.tracking.store import connect, store_errors
from tuning.tracking.study import StudyTracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

Baselines = Mapping[str, Mapping[str, float]]
MAPS_PER_SIZE = 4
PER_TASK = "per_task.json"
DELTAS = "deltas"


@dataclass(frozen=True)
class StudyRecord:
    """All that a report needs of one study.

    `by_task` is the held-out accuracy of every task by run id, for the trials that kept it; `deltas` those of the best
    configurations.
    """

    study: str
    trials: tuple[TrialResult, ...]
    baselines: Baselines
    by_task: Mapping[str, AccuracyByTask] = field(default_factory=dict)
    deltas: tuple[DeltaMap, ...] = ()
    study_id: str = ""
    run_id: str = ""

    @cached_property
    def groups(self) -> list[Group]:
        """The trials that count, by configuration and model size."""
        return group_trials(self.trials, self.by_task)

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The differences between them."""
        return compare(self.groups)


def read_study(tracking_uri: str, parent_run_id: str) -> StudyRecord:
    """Read a study by the id of its parent run: trials, baselines, numbers by task and deltas.

    Raises UserError if the store fails, has no such run, or a trial's artifact is damaged.
    """
    trials = tuple(read_trials(tracking_uri, parent_run_id, tuple(CURVES)))
    with store_errors(tracking_uri), tempfile.TemporaryDirectory() as folder:
        client = connect(tracking_uri)
        parent = client.get_run(parent_run_id)
        store = _Artifacts(client, Path(folder))
        by_task = {
            trial.run_id: store.accuracy_by_task(trial) for trial in trials if trial.is_complete
        }
        by_task = {run_id: values for run_id, values in by_task.items() if values}
        deltas = [
            found for trial in _mapped(group_trials(trials)) if (found := store.delta_map(trial))
        ]
    return StudyRecord(
        parent.data.tags.get(STUDY_TAG, parent.info.run_name),
        trials,
        collect_baselines(parent.data.metrics, dict.fromkeys(size_of(trial) for trial in trials)),
        by_task,
        tuple(deltas),
        parent.data.tags.get(STUDY_ID_TAG, ""),
        parent_run_id,
    )


def collect_baselines(
    metrics: Mapping[str, float], sizes: Iterable[str] = ()
) -> dict[str, dict[str, float]]:
    """Sort the baselines among metrics by name; in a study of several sizes the name is "ridge (nano)"."""
    several = list(sizes)
    by_size = from_metrics(metrics, several if len(several) > 1 else ())
    return {
        f"{name} ({size})" if size else name: numbers
        for size, baselines in by_size.items()
        for name, numbers in baselines.items()
    }


def _mapped(groups: Sequence[Group]) -> list[TrialResult]:
    """Of the best configurations of each size, the trial that is best on validation tasks."""
    chosen = [
        g
        for size in dict.fromkeys(group.size for group in groups)
        for g in ranked(groups, size)[:MAPS_PER_SIZE]
    ]
    return [
        max(group.trials, key=lambda trial: trial.metrics.get(CHOOSING, -1.0)) for group in chosen
    ]


class _Artifacts:
    """What trials left, copied into a folder as it is asked for."""

    def __init__(self, client: MlflowClient, folder: Path) -> None:
        self.client = client
        self.folder = folder

    def accuracy_by_task(self, trial: TrialResult) -> dict[str, float]:
        """Held-out accuracy by task; empty if the trial did not keep it."""
        path = self._fetch(trial, PER_TASK)
        if path is None:
            return {}
        try:
            found = json.loads(path.read_text())["test"]["accuracy"]
            return {str(task): float(value) for task, value in found.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(trial, PER_TASK, error) from error

    def delta_map(self, trial: TrialResult) -> DeltaMap | None:
        """Teacher and generated deltas of the held-out tasks; None if the trial did not keep them."""
        from safetensors import SafetensorError, safe_open

        folder = self._fetch(trial, DELTAS)
        if folder is None:
            return None
        try:
            with safe_open(folder / "test.safetensors", "numpy") as file:
                tasks = json.loads(file.metadata()["tasks"])
                teacher, generated = (
                    np.asarray(file.get_tensor(key)) for key in ("teacher", "predicted")
                )
            return DeltaMap(
                teacher, generated, tuple(map(family_name, tasks)), trial.config, size_of(trial)
            )
        except (SafetensorError, ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise _damaged(trial, f"{DELTAS}/test.safetensors", error) from error

    def _fetch(self, trial: TrialResult, name: str) -> Path | None:
        if name not in {item.path for item in self.client.list_artifacts(trial.run_id)}:
            return None
        own = self.folder / trial.run_id
        own.mkdir(exist_ok=True)
        return Path(self.client.download_artifacts(trial.run_id, name, str(own)))


def _damaged(trial: TrialResult, name: str, error: Any) -> UserError:
    return UserError(
        f"the artifact {name} of run {trial.run_id} ({trial.config}, seed {trial.seed}) is damaged ({error}): remove "
        "it, and the report is made without."
    )


def family_name(task: str) -> str:
    """The task with its operation before a slash, as delta maps name it: the name up to its last hyphen."""
    return f"{task.rpartition('-')[0] or task}/{task}"


def log_baselines(tracker: StudyTracker, worlds: Mapping[str, World], cache: Path) -> None:
    """Log the baselines of every world on the parent run, unless it has them."""
    several = len(worlds) > 1
    known = from_metrics(tracker.metrics(), [w.config.size for w in worlds.values() if several])
    for world in worlds.values():
        size = world.config.size
        label = size if several else ""
        if label not in known:
            logged = to_metrics(known_baselines(cache, world), label)
            facts = {f"world/{size}/{name}": value for name, value in world.bank.facts.items()}
            tracker.log_metrics(logged | facts)
