"""Stop the worse trials early with ASHA."""

from __future__ import annotations

from typing import Any

from llgbm.runtime import UserError
from tuning.studies.spec import Study


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


def make_scheduler(name: str, study: Study) -> Any:
    """Make Ray's ASHA on the study's validation metric, None for `none`.

    The worse half of the trials stops at each rung; each rung has twice the steps of the one before. Raises UserError
    as `rungs`.
    """
    if name == "none":
        return None
    from ray.tune.schedulers import ASHAScheduler

    first, last = rungs(study)
    return ASHAScheduler(
        time_attr="step",
        metric=study.metric,
        mode="max",
        max_t=last,
        grace_period=first,
        reduction_factor=2,
        stop_last_trials=False,
    )
