"""A worker that dies between two trials: Ray gives the second one up, and the sweep hands it out again."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle, tune

from llgbm.training import TrainingConfig
from llgbm.world import WorldConfig
from tuning.search.queue import ListQueue
from tuning.studies.spec import TrialSpec
from tuning.sweep.places import require_token
from tuning.sweep.ray_tune import HANDED_OUT_AGAIN, QueueSearcher, Watcher
from tuning.tracking.ownership import Ownership
from tuning.tracking.runs import read_trials
from tuning.tracking.study import StudyTracker
from tuning.tracking.trial import TrialTracker

SPECS = [TrialSpec("multitask", TrainingConfig(seed=seed), WorldConfig()) for seed in (0, 1)]


def test_a_trial_that_was_given_up_is_handed_out_a_few_times_again() -> None:
    own = ListQueue(SPECS[:1], SPECS[:1], 1)
    searcher = QueueSearcher(own)
    for turn in range(HANDED_OUT_AGAIN + 1):
        assert searcher.suggest(f"try {turn}") == {"trial": SPECS[0]}
        assert searcher.suggest("another") is None
        searcher.on_trial_complete(f"try {turn}", error=True)
    assert searcher.suggest("last") == searcher.FINISHED
    assert own.steps_left() == 0


class WaitsForADeath(ListQueue):
    """Hand out a trial that is not the first one only when the last worker is dead."""

    def __init__(self, place: Path) -> None:
        super().__init__(SPECS, SPECS, 1)
        self.place, self.started = place, 0

    def ask(self) -> TrialSpec | None:
        if self.started and not self.place.exists():
            return None
        self.started += 1
        return super().ask()


def die_soon(place: Path) -> None:
    """End this process when its trial has ended."""
    time.sleep(1)
    place.touch()
    os._exit(1)


@pytest.mark.whole
@pytest.mark.timeout(300)
def test_a_worker_that_dies_between_two_trials_costs_none(
    tmp_path: Path, empty_store: Path
) -> None:
    shutil.copytree(empty_store, tmp_path / "mlruns")
    tracker = StudyTracker.open(None, tmp_path, "ablation")
    tracker.begin("study", "id", {}, {})
    assert tracker.target is not None
    for spec in SPECS:
        TrialTracker.open(tracker.target, spec.id, "multitask", {}, {})
    ownership = Ownership(tracker.tracking_uri, tracker.experiment_id, tracker.parent_run_id)
    place = tmp_path / "dead"

    def trainable(config: dict[str, Any]) -> None:
        tune.report({"step": 1, "finished": True})
        if config["trial"] == SPECS[0]:
            threading.Thread(target=die_soon, args=(place,), daemon=True).start()

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    require_token()  # Ray keeps what the first call in a process found, for the tests after this one too
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=QueueSearcher(WaitsForADeath(place)), num_samples=-1, reuse_actors=True
            ),
            run_config=tune.RunConfig(
                storage_path=str(tmp_path / "ray"),
                failure_config=tune.FailureConfig(max_failures=-1),
                verbose=0,
                callbacks=[watcher := Watcher(tracker, ownership, None, 1)],
            ),
        ).fit()
    finally:
        ray.shutdown()
    watcher.close()
    assert place.exists()
    known = read_trials(tracker.tracking_uri, tracker.parent_run_id)
    assert [trial.status for trial in known] == ["FINISHED", "FINISHED"]
