"""ASHA whose rungs begin with what a study's trials had reported before this driver."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.tune.schedulers import ASHAScheduler

from tuning.tracking.curves import Curve


class StoredASHA(ASHAScheduler):
    """Fill the rungs of Ray's ASHA from curves, by trial id.

    A rung holds one value a trial: the first at or after its step. A trial of the curves that is run again is judged
    anew at the rungs that it meets again, and keeps its value at those that its checkpoint lies beyond.
    """

    def __init__(self, curves: Mapping[str, Curve], **settings: Any) -> None:
        super().__init__(**settings)
        self._stored: dict[str, dict[float, int]] = {}  # step of each value, by trial id and rung
        for trial_id, curve in curves.items():
            self._store(trial_id, curve)

    @property
    def _levels(self) -> list[tuple[float, dict[str, float]]]:
        return self._brackets[0]._rungs

    def _store(self, trial_id: str, curve: Curve) -> None:
        for milestone, recorded in self._levels:
            reached = [(step, value) for step, value in curve if step >= milestone]
            if reached:
                step, recorded[trial_id] = reached[0]
                self._stored.setdefault(trial_id, {})[milestone] = step

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        """Judge a result, after the trial's stored values took the name that Ray has for it."""
        if "step" in result:
            self._meet_again(trial, int(result["step"]))
        return super().on_trial_result(tune_controller, trial, result)

    def _meet_again(self, trial: Any, step: int) -> None:
        trial_id = trial.config["trial"].id
        steps = self._stored.pop(trial_id, {})
        for milestone, recorded in self._levels:
            if milestone in steps:
                value = recorded.pop(trial_id)
                if steps[milestone] < step:
                    recorded[trial.trial_id] = value
