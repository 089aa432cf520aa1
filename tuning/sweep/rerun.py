"""Run one finished trial again in this process, without Ray, and hold its numbers against the store's."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llgbm.runtime import UserError, pick_device, say
from llgbm.world import build_world
from tuning.arguments import study_of
from tuning.studies.options import Options, StudyArguments
from tuning.studies.spec import Study, TrialSpec
from tuning.sweep.checkpoints import TrialCheckpoints
from tuning.sweep.resume import ARGUMENTS_TAG
from tuning.sweep.worker import DEVICE_TAG, THREADS_TAG, Outputs, run_trial
from tuning.tracking.curves import read_points
from tuning.tracking.runs import PARENT_TAG, TRIAL_TAG, TrialResult, find_runs, is_live
from tuning.tracking.store import connect, store_errors

if TYPE_CHECKING:
    from mlflow.entities import Run

Points = dict[tuple[str, int], str]  # text of every value, by metric and step
# Of the machine and the moment, not of the trial.
NOT_COMPARED = ("time/", "system/")
SHOWN = 5


class Recorder:
    """Keep what a trial logs; nothing is written and no state is kept."""

    def __init__(self) -> None:
        self.points: Points = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of a step."""
        for key, value in metrics.items():
            if not key.startswith(NOT_COMPARED):
                self.points.setdefault((key, step), repr(float(value)))

    def is_flushed(self) -> bool:
        """Return False: a trial that is run again keeps no checkpoints."""
        return False

    def log_artifacts(self, folder: Path, artifact_path: str | None = None) -> None:
        """Leave the artifacts: the store has them."""

    def set_tag(self, key: str, value: str) -> None:
        """Leave the run as it is."""


def rerun_trial(
    uri: str, trial_id: str, cache: Path, experiment: str | None = None
) -> dict[str, Any]:
    """Train and evaluate a trial anew; return how many of its values are `same` and `different`.

    Raises UserError if the store has no such finished trial, or today's code makes another one of its arguments.
    """
    run, study_run = _find(uri, trial_id, experiment)
    trial = _trial_of(run, study_run)
    stored = _stored_points(uri, run)
    say(f"trial {trial_id} ({trial.label}) is run again to compare {len(stored)} values")
    measured = _measure(trial, run, cache)
    differing = [
        key for key in sorted({*stored, *measured}) if stored.get(key) != measured.get(key)
    ]
    for name, step in differing[:SHOWN]:
        was, now = stored.get((name, step), "no value"), measured.get((name, step), "no value")
        say(f"{name} at step {step}: {was} in the store, {now} now")
    return {
        "trial": trial_id,
        "run": run.info.run_id,
        "same": len({*stored, *measured}) - len(differing),
        "different": len(differing),
    }


def _find(uri: str, trial_id: str, experiment: str | None) -> tuple[Run, Run]:
    """Return the run of a finished trial and that of its study."""
    with store_errors(uri):
        client = connect(uri)
        places = [
            one.experiment_id
            for one in client.search_experiments()
            if experiment in (None, one.name)
        ]
        runs = [
            run
            for place in places
            for run in find_runs(client, place, {TRIAL_TAG: trial_id})
            if is_live(run)
        ]
        whole = [run for run in runs if TrialResult.of(run).is_complete]
        if not whole:
            ends = ", ".join(run.info.status for run in runs) or "none at all"
            raise UserError(
                f"the store has no finished run of trial {trial_id!r} (its runs: {ends}): give the id of a finished "
                "trial, as results.csv of a report lists them"
            )
        return whole[-1], client.get_run(whole[-1].data.tags[PARENT_TAG])


def _trial_of(run: Run, study_run: Run) -> TrialSpec:
    """Make the trial again from the arguments that its study recorded."""
    trial_id = run.data.tags[TRIAL_TAG]
    arguments = json.loads(study_run.data.tags.get(ARGUMENTS_TAG, "{}"))
    study = study_of(Options(study=StudyArguments.from_record(arguments)))
    for trial in _candidates(study, run):
        if trial.id == trial_id:
            return trial
    raise UserError(
        f"trial {trial_id} cannot be made again: the arguments of its study {study.name} make other trials with this "
        "version of the code, so use the version that it was run with"
    )


def _candidates(study: Study, run: Run) -> tuple[TrialSpec, ...]:
    if study.space is None:
        return study.trials
    params = run.data.params
    point = {name: float(params[name]) for name in study.space.ranges if name in params}
    return study.space.trials(point)


def _stored_points(uri: str, run: Run) -> Points:
    with store_errors(uri):
        curves = read_points(connect(uri), [run])[run.info.run_id]
    found: Points = {}
    for key, points in curves.items():
        if key.startswith(NOT_COMPARED):
            continue
        for step, _, value in points:
            if value == value:  # no placeholder: see `TrialTracker.show_first`
                found[key, step] = repr(value)
    return found


def _measure(trial: TrialSpec, run: Run, cache: Path) -> Points:
    """Train as the worker did: on its kind of device, with its number of threads."""
    torch.set_num_threads(int(run.data.tags.get(THREADS_TAG, 1)))
    device = "cpu"
    if run.data.tags.get(DEVICE_TAG, "cpu") != "cpu":
        device = pick_device()
    world = build_world(cache, trial.world).to(device)
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        run_trial(trial, world, Outputs(recorder, TrialCheckpoints(folder, trial.id)))
    return recorder.points
