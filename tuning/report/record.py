"""Read a study from MLflow: its trials, baselines, numbers by task and deltas."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llgbm.evaluation.baselines import from_metrics, known_baselines, to_metrics
from llgbm.runtime import content_hash
from llgbm.world import World
from tuning.report.answers import DATA, FOLDER, StudyAnswers
from tuning.report.delta_map import DeltaMap
from tuning.report.groups import (
    CHOOSING,
    AccuracyByTask,
    Baselines,
    Comparison,
    Group,
    compare,
    group_trials,
    ranked,
    size_of,
    size_of_label,
    world_label,
)
from tuning.report.names import Renaming, escaped
from tuning.report.plots import CURVES
from tuning.sweep.artifacts import PER_TASK, read_per_task
from tuning.tracking.notes import read_gates
from tuning.tracking.runs import STUDY_ID_TAG, STUDY_TAG, TrialResult, measured, read_trials
from tuning.tracking.store import connect, store_errors
from tuning.tracking.study import StudyTracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAPS_PER_SIZE = 4
DELTAS = "deltas"
OPENED_TAG = "llgbm.sealed_opened"


@dataclass(frozen=True)
class StudyRecord:
    """Everything that a report needs of one study.

    `by_task` is held-out accuracy by run id and task, for the trials that kept it; `deltas` are those of the best
    configurations; `missing` says in sentences which artifacts could not be read; `planned` is the number of trials
    that the study was begun with, None for a search. `gates` are those that worlds missed, by their labels.
    """

    study: str
    trials: tuple[TrialResult, ...]
    baselines: Baselines
    by_task: Mapping[str, AccuracyByTask] = field(default_factory=dict)
    deltas: tuple[DeltaMap, ...] = ()
    study_id: str = ""
    run_id: str = ""
    status: str = "FINISHED"
    planned: int | None = None
    missing: tuple[str, ...] = ()
    gates: Mapping[str, Sequence[str]] = field(default_factory=dict)
    openings: tuple[Mapping[str, Any], ...] = ()
    answers: tuple[StudyAnswers, ...] = ()

    @cached_property
    def groups(self) -> list[Group]:
        """Return the complete trials by configuration and model size."""
        return group_trials(self.trials, self.by_task)

    def renamed(self, make: Callable[[str], str]) -> StudyRecord:
        """Return the record with every name that comes from the store passed through `make`; see `names`."""
        name = Renaming(make)
        trials = [
            replace(
                trial,
                trial_id=name(trial.trial_id),
                config=name(trial.config),
                run_id=name(trial.run_id),
                status=name(trial.status),
                cause=make(trial.cause),
                params={**trial.params, "model_size": name(size_of(trial))},
            )
            for trial in self.trials
        ]
        by_task = {}
        for run_id, values in self.by_task.items():
            by_task[name(run_id)] = {name(task): value for task, value in values.items()}
        return replace(
            self,
            study=name(self.study),
            study_id=name(self.study_id),
            run_id=name(self.run_id),
            trials=tuple(trials),
            by_task=by_task,
            baselines={name(key): values for key, values in self.baselines.items()},
            missing=tuple(map(make, self.missing)),
        )

    @cached_property
    def as_markdown(self) -> StudyRecord:
        """Return the record with names that Markdown shows as they are."""
        return self.renamed(escaped)

    @cached_property
    def by_rank(self) -> list[Group]:
        """Return the groups size by size, best held-out accuracy first, those without one last."""
        sizes = dict.fromkeys(group.size for group in self.groups)
        best = list(chain.from_iterable(ranked(self.groups, size) for size in sizes))
        return best + [group for group in self.groups if group not in best]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Return the paired comparisons of configurations."""
        return compare(self.groups)


def read_study(tracking_uri: str, parent_run_id: str) -> StudyRecord:
    """Read a study by the id of its parent run: trials, baselines, numbers by task and deltas.

    Artifacts that are gone or damaged are named in `missing`. Raises UserError if the store fails or has no such run.
    """
    trials = tuple(read_trials(tracking_uri, parent_run_id, tuple(CURVES)))
    labels = dict.fromkeys(map(world_label, trials))
    with store_errors(tracking_uri), tempfile.TemporaryDirectory() as folder:
        client = connect(tracking_uri)
        parent = client.get_run(parent_run_id)
        artifacts = _Artifacts(client, Path(folder))
        found = {t.run_id: artifacts.accuracy_by_task(t) for t in trials if t.is_complete}
        by_task = {run_id: values for run_id, values in found.items() if values}
        answers = artifacts.answers(parent_run_id)
        maps = [artifacts.delta_map(trial) for trial in _mapped(group_trials(trials))]
    planned = parent.data.params.get("trials", "")
    return StudyRecord(
        study=parent.data.tags.get(STUDY_TAG, parent.info.run_name),
        trials=trials,
        baselines=collect_baselines(measured(parent), labels),
        by_task=by_task,
        deltas=tuple(filter(None, maps)),
        study_id=parent.data.tags.get(STUDY_ID_TAG, ""),
        run_id=parent_run_id,
        status=parent.info.status,
        planned=int(planned) if planned.isdecimal() else None,
        missing=tuple(artifacts.missing),
        gates=read_gates(parent.data.tags),
        openings=tuple(json.loads(parent.data.tags.get(OPENED_TAG, "[]"))),
        answers=tuple(answers),
    )


def collect_baselines(
    metrics: Mapping[str, float], labels: Iterable[str] = ()
) -> dict[str, dict[str, float]]:
    """Sort the baselines among metrics by name, averaged over the worlds of a size; `labels` are those of the worlds.

    In a study of several sizes the name is "ridge (nano)".
    """
    labels = list(labels)
    sizes = dict.fromkeys(map(size_of_label, labels))
    found: dict[str, dict[str, list[float]]] = {}
    for label, baselines in from_metrics(metrics, labels if len(labels) > 1 else ()).items():
        size = f" ({size_of_label(label)})" * (len(sizes) > 1)
        for name, numbers in baselines.items():
            own = found.setdefault(name + size, {})
            for number, value in numbers.items():
                own.setdefault(number, []).append(value)
    return {name: _means(numbers) for name, numbers in found.items()}


def _means(numbers: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {number: float(np.mean(values)) for number, values in numbers.items()}


def _mapped(groups: Sequence[Group]) -> list[TrialResult]:
    """Return the trial with the best validation accuracy of each of the best configurations, by size."""
    sizes = dict.fromkeys(group.size for group in groups)
    chosen = chain.from_iterable(ranked(groups, size)[:MAPS_PER_SIZE] for size in sizes)
    return [
        max(group.trials, key=lambda trial: trial.metrics.get(CHOOSING, -1.0)) for group in chosen
    ]


class _Artifacts:
    """Artifacts of trials, copied into a folder on demand; `missing` collects what cannot be read."""

    def __init__(self, client: MlflowClient, folder: Path) -> None:
        self.client = client
        self.folder = folder
        self.missing: list[str] = []

    def accuracy_by_task(self, trial: TrialResult) -> dict[str, float]:
        """Return held-out accuracy by task; empty if the trial did not keep it or it cannot be read."""
        try:
            path = self._fetch(trial, PER_TASK)
            if path is None:
                return {}
            found = read_per_task(path)["test"]["accuracy"]
            return {str(task): float(value) for task, value in found.items()}
        except (
            Exception
        ) as error:  # of the artifact store or of any parser: the report is made without
            self._note(trial, PER_TASK, error)
            return {}

    def delta_map(self, trial: TrialResult) -> DeltaMap | None:
        """Return teacher and generated deltas of the held-out tasks; None if not kept or not readable."""
        from safetensors import safe_open

        try:
            folder = self._fetch(trial, DELTAS)
            if folder is None:
                return None
            with safe_open(folder / "test.safetensors", "numpy") as file:
                tasks = json.loads(file.metadata()["tasks"])
                teacher, generated = map(file.get_tensor, ("teacher", "predicted"))
            names = tuple(map(family_name, tasks))
            deltas = (np.asarray(teacher), np.asarray(generated))
            return DeltaMap(*deltas, names, trial.config, size_of(trial))
        except Exception as error:  # as above
            self._note(trial, DELTAS, error)
            return None

    def answers(self, parent_run_id: str) -> list[StudyAnswers]:
        """Return the answers that the study kept, by size; none where they cannot be read."""
        try:
            kept = {item.path for item in self.client.list_artifacts(parent_run_id)}
            if FOLDER not in kept:
                return []
            folder = self.client.download_artifacts(parent_run_id, FOLDER, str(self.folder))
            return list(map(StudyAnswers.read, sorted(Path(folder).rglob(DATA))))
        except Exception as error:  # as above
            self.missing.append(
                f"The answers of the study cannot be read and are left out: {_reason(error)}."
            )
            return []

    def _fetch(self, trial: TrialResult, name: str) -> Path | None:
        kept = {item.path for item in self.client.list_artifacts(trial.run_id)}
        if not kept:  # every complete trial keeps some
            raise FileNotFoundError("all artifacts of this run are gone")
        if name not in kept:
            return None
        own = self.folder / content_hash(trial.run_id)
        own.mkdir(exist_ok=True)
        return Path(self.client.download_artifacts(trial.run_id, name, str(own)))

    def _note(self, trial: TrialResult, name: str, error: Exception) -> None:
        self.missing.append(
            f"The artifact {name} of run {trial.run_id} ({trial.config}, seed {trial.seed}) cannot be read and is "
            f"left out: {_reason(error)}."
        )


def _reason(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return first[:200].rstrip(".")


def family_name(task: str) -> str:
    """Return "operation/task" as delta maps name a task; the operation ends at its last hyphen."""
    return f"{task.rpartition('-')[0] or task}/{task}"


def log_baselines(tracker: StudyTracker, worlds: Mapping[str, World], cache: Path) -> None:
    """Log the baselines of every world on the parent run, unless it has them."""
    several = len(worlds) > 1
    known = from_metrics(tracker.metrics(), [w.config.label for w in worlds.values() if several])
    for world in worlds.values():
        own = world.config.label
        label = own if several else ""
        if label not in known:
            logged = to_metrics(known_baselines(cache, world.data, world.lora_model), label)
            facts = {f"world/{own}/{name}": value for name, value in world.bank.facts.items()}
            tracker.log_metrics(logged | facts)
