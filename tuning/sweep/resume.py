"""Find a study again, and select its trials that are left to run.

All state is read from MLflow: a tag of the study's run holds its arguments, and each trial has one run with its status.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llgbm.runtime import UserError
from tuning.registry.fetch import BUNDLE_FILE
from tuning.studies.options import Options, StudyArguments
from tuning.studies.spec import Study, TrialSpec
from tuning.sweep.checkpoints import TrialCheckpoints
from tuning.tracking.ownership import Ownership
from tuning.tracking.runs import NO_SCHEDULER, PARENT_TAG, STUDY_ID_TAG, TrialResult
from tuning.tracking.store import connect, store_errors
from tuning.tracking.study import StudyTracker

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ARGUMENTS_TAG = "llgbm.arguments"


def recorded_options(options: Options, tracker: StudyTracker) -> tuple[Options, str]:
    """Return the options of the study that `--resume` names, run as `options` say, and the id of that study.

    Raises UserError if there is no such study, or if `options` themselves say what is to be studied.
    """
    if given := options.study.given:
        option = "--" + given[0].replace("_", "-")
        raise UserError(
            f"--resume takes the study as it was begun: leave {option} out, or leave out --resume"
        )
    tags = tracker.find_study(str(options.run.resume)).data.tags
    arguments = StudyArguments.from_record(json.loads(tags.get(ARGUMENTS_TAG, "{}")))
    return replace(options, study=arguments), tags[STUDY_ID_TAG]


def check_same_study(study: Study, recorded_id: str) -> None:
    """Raise UserError unless the study made again is the one that was begun."""
    if study.id != recorded_id:
        raise UserError(
            f"study {recorded_id} cannot be resumed, since the configuration that its numbers depend on changed with "
            f"the code (its trials would now be those of {study.id}): go back to the code that it was begun with, or "
            "run it anew without --resume"
        )


def begin_anew(
    trials: Sequence[TrialSpec], tracker: StudyTracker, storage: str, ownership: Ownership
) -> None:
    """Mark the runs of trials as obsolete and delete their checkpoints.

    A trial that another driver holds is left alone: it is being run at this moment.
    """
    runs = tracker.live_runs()
    for trial in trials:
        if not ownership.take(trial.id):
            continue
        if trial.id in runs:
            tracker.supersede([runs[trial.id].info.run_id])
        TrialCheckpoints(storage, trial.id).remove()
        ownership.release(trial.id)


def lost_trials(uri: str, results: Iterable[TrialResult]) -> set[str]:
    """Return the ids of complete trials that lack an artifact which every trial keeps.

    Raises UserError if the store fails.
    """
    with store_errors(uri):
        client = connect(uri)
        return {
            result.trial_id
            for result in results
            if result.is_complete and not _has_artifacts(client, result.run_id)
        }


def _has_artifacts(client: MlflowClient, run_id: str) -> bool:
    kept = {item.path for item in client.list_artifacts(run_id)}
    inside = {item.path for item in client.list_artifacts(run_id, "generator")}
    return f"generator/{BUNDLE_FILE}" in inside and {"deltas", "per_task.json"} <= kept


def trials_to_run(
    trials: Sequence[TrialSpec],
    runs: Mapping[str, Run],
    resume: bool,
    retry_failed: bool,
    scheduler: str = NO_SCHEDULER,
) -> list[TrialSpec]:
    """Select trials by their runs, as `left_to_run` does; both by trial id."""
    results = {trial_id: TrialResult.of(run) for trial_id, run in runs.items()}
    return left_to_run(trials, results, resume, retry_failed, scheduler)


def left_to_run(
    trials: Sequence[TrialSpec],
    results: Mapping[str, TrialResult],
    resume: bool,
    retry_failed: bool,
    scheduler: str,
) -> list[TrialSpec]:
    """Select trials by how they ended; `results` by trial id.

    A retry takes failed trials only. A resumed study leaves failed trials, since their error would come again. A study
    that is run again takes all trials that did not finish, and those that another scheduler stopped.
    """
    found = {trial_id: result.seen_under(scheduler) for trial_id, result in results.items()}
    failed = {trial_id for trial_id, result in found.items() if result.status == "FAILED"}
    if retry_failed:
        return [trial for trial in trials if trial.id in failed]
    done = {trial_id for trial_id, result in found.items() if result.is_done(scheduler)}
    if resume:
        done |= failed
    return [trial for trial in trials if trial.id not in done]


def adopt_finished(
    trials: Sequence[TrialSpec],
    runs: Mapping[str, Run],
    tracker: StudyTracker,
    scheduler: str = NO_SCHEDULER,
) -> list[TrialSpec]:
    """Make trials that any study finished, or that this scheduler stopped, count in this one.

    Returns those that were run to their end.
    """
    found = {trial.id: TrialResult.of(runs[trial.id]) for trial in trials if trial.id in runs}
    done = [trial for trial in trials if trial.id in found and found[trial.id].is_done(scheduler)]
    for trial in done:
        tags = runs[trial.id].data.tags
        if tags.get(PARENT_TAG) != tracker.parent_run_id:
            tracker.adopt(trial.id, trial.name)
    return [trial for trial in done if found[trial.id].is_complete]
