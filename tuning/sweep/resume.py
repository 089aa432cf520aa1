"""Which trials of a study are run: all, what was left unfinished, what failed; and how a study is found again.

What was done is read from MLflow alone: the arguments that made a study are a tag of its run, and a trial is done when
the one run with its id says so.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llgbm.runtime import UserError
from tuning.studies.spec import Study, TrialSpec
from tuning.sweep.checkpoints import TrialCheckpoints
from tuning.tracking.runs import PARENT_TAG, STUDY_ID_TAG
from tuning.tracking.study import StudyTracker

if TYPE_CHECKING:
    from mlflow.entities import Run

ARGUMENTS_TAG = "llgbm.arguments"
# Arguments that say how a study is run, not what it is; all others make the study and are recorded with it.
HOW = frozenset(
    "resume retry_failed fresh cpus_per_trial gpus_per_trial max_concurrent address storage_path keep_checkpoints "
    "tracking_uri experiment keep_artifacts keep_best cache estimate dry_run debug".split()
)


def study_arguments(arguments: Namespace) -> dict[str, Any]:
    """The arguments that make the study."""
    return {key: value for key, value in vars(arguments).items() if key not in HOW}


def recorded_arguments(
    arguments: Namespace, defaults: Namespace, tracker: StudyTracker
) -> tuple[Namespace, str]:
    """The arguments of the study that `arguments.resume` names, run as `arguments` say; and the id of that study.

    Raises UserError if there is no such study, or if `arguments` themselves say what is to be studied.
    """
    changed = [
        key for key, value in study_arguments(arguments).items() if value != getattr(defaults, key)
    ]
    if changed:
        option = "--" + changed[0].replace("_", "-")
        raise UserError(
            f"--resume takes the study as it was begun: leave {option} out, or leave out --resume"
        )
    run = tracker.find_study(arguments.resume)
    recorded = json.loads(run.data.tags.get(ARGUMENTS_TAG, "{}"))
    return Namespace(
        **{**vars(defaults), **recorded, **{k: getattr(arguments, k) for k in HOW}}
    ), run.data.tags[STUDY_ID_TAG]


def check_same_study(study: Study, recorded_id: str) -> None:
    """Raise UserError unless the study made again is the one that was begun."""
    if study.id != recorded_id:
        raise UserError(
            f"study {recorded_id} cannot be resumed, since the configuration that its numbers depend on changed with "
            f"the code (its trials would now be those of {study.id}): go back to the code that it was begun with, or "
            "run it anew without --resume"
        )


def begin_anew(study: Study, tracker: StudyTracker, storage: str) -> None:
    """Make what ran of a study obsolete: its runs count no more, its checkpoints are deleted."""
    ids = [trial.id for trial in study.trials]
    tracker.supersede(study.id, ids)
    for trial_id in ids:
        TrialCheckpoints(storage, trial_id).remove()


def trials_to_run(
    trials: Sequence[TrialSpec], runs: Mapping[str, Run], resume: bool, retry_failed: bool
) -> list[TrialSpec]:
    """Those of `trials` whose run (`runs`, by trial id) asks for it.

    Retrying takes the failed ones only. Resuming takes those that neither finished nor failed, for an error comes
    again with the same code and data. A study that is simply run again takes all that did not finish.
    """
    done = {"FINISHED", "FAILED"} if resume else {"FINISHED"}

    def wanted(trial: TrialSpec) -> bool:
        status = runs[trial.id].info.status if trial.id in runs else None
        return status == "FAILED" if retry_failed else status not in done

    return [trial for trial in trials if wanted(trial)]


def adopt_finished(
    trials: Sequence[TrialSpec], runs: Mapping[str, Run], tracker: StudyTracker
) -> list[TrialSpec]:
    """Count trials that are finished already, by whichever study, in this one, and return them."""
    finished = [
        trial for trial in trials if trial.id in runs and runs[trial.id].info.status == "FINISHED"
    ]
    for trial in finished:
        tags = runs[trial.id].data.tags
        if tags.get(PARENT_TAG) != tracker.parent_run_id:
            tracker.adopt(trial.id, trial.name)
    return finished
