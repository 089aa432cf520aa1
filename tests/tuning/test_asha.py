"""ASHA: where its rungs lie, what they begin with, and what it stops."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llgbm.runtime import UserError
from llgbm.training import TrainingConfig
from tuning.studies import STUDIES, Study, StudyOptions
from tuning.studies.spec import TrialSpec
from tuning.sweep.asha import make_scheduler
from tuning.tracking.runs import TrialResult

SPACE = STUDIES["optuna_lambda"](StudyOptions()).space
assert SPACE is not None


@given(steps=st.integers(1, 2000), eval_every=st.integers(1, 600))
@settings(deadline=None)
def test_asha_stops_nothing_after_the_last_evaluation_before_the_end(
    steps: int, eval_every: int
) -> None:
    config = TrainingConfig(steps=steps, eval_every=eval_every)
    study = Study("s", (TrialSpec("one", config, SPACE.base.world),), metric="val/delta_cosine")
    evaluations = [step for step in range(1, steps) if step % eval_every == 0]
    if not evaluations:
        with pytest.raises(UserError, match="have none"):
            make_scheduler("asha", study)
        return
    scheduler = make_scheduler("asha", study)
    milestones = [milestone for milestone, _ in scheduler._brackets[0]._rungs]
    assert milestones and eval_every <= min(milestones) and max(milestones) <= evaluations[-1]
    assert scheduler._metric == "val/delta_cosine"


def test_ashas_rungs_compare_validation_values_and_let_a_last_step_pass() -> None:
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import TrialScheduler

    study = Study(
        "s", (TrialSpec("one", TrainingConfig(steps=600, eval_every=100), SPACE.base.world),)
    )
    scheduler = make_scheduler("asha", study)
    said = {}
    for name, value in (("good", 0.8), ("better", 0.9), ("bad", 0.1)):
        trial = Trial("x", trial_id=name, stub=True)
        trial.config = {"trial": study.trials[0]}
        scheduler.on_trial_add(None, trial)
        for step in (100, 200):
            said[name, step] = scheduler.on_trial_result(
                None, trial, {"step": step, "val/accuracy": value}
            )
        said[name, 600] = scheduler.on_trial_result(None, trial, {"step": 600, "val/accuracy": 0.0})
    go, stop = TrialScheduler.CONTINUE, TrialScheduler.STOP
    assert [said["bad", step] for step in (100, 200)] == [go, stop]
    assert {said[name, step] for name in ("good", "better") for step in (100, 200, 600)} == {go}


def test_rungs_begin_with_what_the_store_has_of_each_trial() -> None:
    """Of three known trials one is run anew, and one from a checkpoint beyond the first rung."""
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import TrialScheduler

    config = TrainingConfig(steps=600, eval_every=100)
    specs = [
        TrialSpec(f"t{seed}", replace(config, seed=seed), SPACE.base.world) for seed in range(4)
    ]
    curves = {
        specs[0].id: [(100, 0.9), (200, 0.9), (300, 0.9), (600, 0.2)],
        specs[1].id: [(100, 0.5), (200, 0.6)],
        specs[2].id: [(100, 0.8)],
    }
    known = [
        TrialResult(spec.id, "", 0, "FINISHED", {}, {"val/accuracy": curves[spec.id]})
        for spec in specs[:3]
    ]
    scheduler = make_scheduler("asha", Study("s", tuple(specs)), known)
    levels = {milestone: set(values.values()) for milestone, values in scheduler._levels}
    assert levels == {150: {0.9, 0.6}, 300: {0.9}}

    def says(spec: TrialSpec, step: int, value: float) -> str:
        trial = trials.setdefault(spec.id, Trial("x", trial_id=spec.name, stub=True))
        trial.config = {"trial": spec}
        if trial.trial_id not in scheduler._trial_info:
            scheduler.on_trial_add(None, trial)
        return scheduler.on_trial_result(None, trial, {"step": step, "val/accuracy": value})

    trials: dict[str, Trial] = {}
    go, stop = TrialScheduler.CONTINUE, TrialScheduler.STOP
    # A new trial meets filled rungs; one from the store keeps its place there, or is judged again.
    assert says(specs[3], 200, 0.5) == stop
    assert says(specs[1], 300, 0.1) == stop
    assert says(specs[0], 100, 0.9) == go and says(specs[0], 200, 0.9) == go
    assert {m: dict(values) for m, values in scheduler._levels} == {
        150: {"t3": 0.5, "t1": 0.6, "t0": 0.9},
        300: {"t1": 0.1},
    }
