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

from llgbm.runtime import UserError
from tuning.analysis import (
    CHOOSING,
    AccuracyByTask,
    Comparison,
    Group,
    compare,
    group_trials,
    ranked,
    size_of,
)
from tuning.plots import CURVES, DeltaMap
from tuning.runs import STUDY_ID_TAG, STUDY_TAG, SUPERSEDED_TAG, TrialResult, read_trials
from tuning.store import connect, explained, shown

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

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


def find_study(tracking_uri: str, asked: str, experiment: str | None = None) -> Run:
    """The parent run of a study, by study id, run id or `latest`, in one experiment or (None) in all.

    Of several runs of one study the newest that was not begun anew counts. Raises UserError if the store fails, or has
    no such experiment or study.
    """
    with explained(tracking_uri):
        client = connect(tracking_uri)
        runs = parent_runs(client, _experiment_ids(client, experiment, tracking_uri))
    found = [run for run in runs if asked in ("latest", run.data.tags[STUDY_ID_TAG], run.info.run_id)]
    if found:
        return max(found, key=lambda run: (SUPERSEDED_TAG not in run.data.tags, run.info.start_time))
    where = f"{shown(tracking_uri)}" + (f", experiment {experiment!r}," if experiment else "")
    raise UserError(f"{where} has no study {asked!r}: it has {_known(runs)}.")


def _known(runs: Sequence[Run]) -> str:
    newest = sorted(runs, key=lambda run: -run.info.start_time)
    named = dict.fromkeys(f"{run.data.tags[STUDY_ID_TAG]} ({run.data.tags.get(STUDY_TAG, '?')})" for run in newest)
    more = f" and {len(named) - 10} older ones" if len(named) > 10 else ""
    return ", ".join(list(named)[:10]) + more if named else "none at all"


def _experiment_ids(client: MlflowClient, name: str | None, tracking_uri: str) -> list[str]:
    known = {experiment.name: experiment.experiment_id for experiment in client.search_experiments()}
    if name is None:
        return list(known.values())
    if name not in known:
        raise UserError(f"{shown(tracking_uri)} has no experiment {name!r}: it has {', '.join(sorted(known))}.")
    return [known[name]]


def parent_runs(client: MlflowClient, experiment_ids: Sequence[str]) -> list[Run]:
    """The parent runs of all studies in these experiments."""
    where = f"tags.`{STUDY_ID_TAG}` LIKE '%'"
    runs = [run for one in experiment_ids for run in client.search_runs([one], where, max_results=10_000)]
    return [run for run in runs if "mlflow.parentRunId" not in run.data.tags]


def read_study(tracking_uri: str, parent_run_id: str) -> StudyRecord:
    """Read a study by the id of its parent run: trials, baselines, numbers by task and deltas.

    Raises UserError if the store fails, has no such run, or a trial's artifact is damaged.
    """
    trials = tuple(read_trials(tracking_uri, parent_run_id, tuple(CURVES)))
    with explained(tracking_uri), tempfile.TemporaryDirectory() as folder:
        client = connect(tracking_uri)
        parent = client.get_run(parent_run_id)
        store = _Artifacts(client, Path(folder))
        by_task = {trial.run_id: store.accuracy_by_task(trial) for trial in trials if trial.whole}
        by_task = {run_id: values for run_id, values in by_task.items() if values}
        deltas = [found for trial in _mapped(group_trials(trials)) if (found := store.delta_map(trial))]
    return StudyRecord(
        parent.data.tags.get(STUDY_TAG, parent.info.run_name),
        trials,
        collect_baselines(parent.data.metrics, dict.fromkeys(size_of(trial) for trial in trials)),
        by_task,
        tuple(deltas),
        parent.data.tags.get(STUDY_ID_TAG, ""),
        parent_run_id,
    )


def collect_baselines(metrics: Mapping[str, float], sizes: Iterable[str] = ()) -> dict[str, dict[str, float]]:
    """Sort metrics named `baseline/<name>/<key>` into a mapping by name and key.

    Where a study has several model sizes, each baseline is named `<name>_<size>` and comes back as "name (size)".
    """
    several = list(sizes)
    found: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        if key.startswith("baseline/") and key.count("/") == 2:
            _, name, metric = key.split("/")
            size = next((size for size in several if name.endswith(f"_{size}")), "") if len(several) > 1 else ""
            label = f"{name.removesuffix(f'_{size}')} ({size})" if size else name
            found.setdefault(label, {})[metric] = value
    return found


def _mapped(groups: Sequence[Group]) -> list[TrialResult]:
    """Of the best configurations of each size, the trial that is best on validation tasks."""
    chosen = [g for size in dict.fromkeys(group.size for group in groups) for g in ranked(groups, size)[:MAPS_PER_SIZE]]
    return [max(group.trials, key=lambda trial: trial.metrics.get(CHOOSING, -1.0)) for group in chosen]


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
                teacher, generated = (np.asarray(file.get_tensor(key)) for key in ("teacher", "predicted"))
            return DeltaMap(teacher, generated, tuple(map(family_name, tasks)), trial.config, size_of(trial))
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
