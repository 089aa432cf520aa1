"""Stop the worse trials early with ASHA.

Source: Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning" (arXiv 1810.05934).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llgbm.runtime import UserError
from tuning.studies.spec import Study
from tuning.tracking.runs import NO_SCHEDULER, TrialResult


def rungs(study: Study) -> tuple[int, int]:
    """Return the first and the last step at which ASHA may stop a trial.

    The first rung lies at a quarter of the steps. The last one is the last evaluation before the end: a trial at its
    last step must not be stopped, since its final evaluation is still to come. Raises UserError if no evaluation
    comes before the end.
    """
    trials = [study.space.base] if study.space else study.trials
    shortest = min((trial.config for trial in trials), key=lambda config: config.steps)
    last = (shortest.steps - 1) // shortest.eval_every * shortest.eval_every
    if last == 0:
        raise UserError(
            f"asha judges trials at evaluations before their end, but {shortest.steps} steps with one every "
            f"{shortest.eval_every} have none: raise --steps or leave --scheduler out"
        )
    return min(last, max(shortest.steps // 4, shortest.eval_every)), last


def scheduler_key(name: str, study: Study) -> str:
    """Describe a scheduler and all that its decisions depend on. Raises UserError as `rungs`."""
    if name == NO_SCHEDULER:
        return NO_SCHEDULER
    first, last = rungs(study)
    return f"{name} by {study.metric}, rungs {first} to {last} by 2"


def make_scheduler(name: str, study: Study, known: Sequence[TrialResult] = ()) -> Any:
    """Make Ray's ASHA on the study's validation metric, None for `none`.

    The worse half of the trials stops at each rung; each rung has twice the steps of the one before. The rungs begin
    with the curves of `known`. Raises UserError as `rungs`.
    """
    if name == NO_SCHEDULER:
        return None
    from tuning.sweep.stored_asha import StoredASHA

    first, last = rungs(study)
    curves = {trial.trial_id: trial.curves.get(study.metric, []) for trial in known}
    return StoredASHA(
        curves,
        time_attr="step",
        metric=study.metric,
        mode="max",
        max_t=last,
        grace_period=first,
        reduction_factor=2,
        stop_last_trials=False,
    )
