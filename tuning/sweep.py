"""Trials under Ray Tune: what the machine has, what a trial gets, who says how each trial ended."""

from __future__ import annotations

import logging
import math
import os
import signal
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llgbm.runtime import UserError, progress_bar
from llgbm.world import World
from tuning.studies import Study, TrialSpec
from tuning.tracking import StudyTracker, TrackingTarget

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Resources:
    """What each trial gets, and how many run at once."""

    cpus: float
    gpus: float
    concurrent: int
    machine_cpus: int
    machine_gpus: int

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))

    def describe(self) -> str:
        gpus = f" and {self.gpus:g} GPUs" if self.gpus else ""
        return f"{self.concurrent} at a time, {self.cpus:g} CPUs{gpus} each"


def check_resources(cpus: float | None, gpus: float | None, concurrent: int | None) -> Resources:
    """What trials get. Raises UserError for more than the machine has, or for nothing."""
    has_cpus, has_gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    cpus = 1.0 if cpus is None else cpus
    gpus = (0.25 if has_gpus else 0.0) if gpus is None else gpus
    for name, asked, has in (("CPUs", cpus, has_cpus), ("GPUs", gpus, has_gpus)):
        if not math.isfinite(asked) or asked < 0 or (name == "CPUs" and asked == 0):
            raise UserError(
                f"{asked:g} {name} per trial asked for; it must be a number above 0 (0 is allowed for GPUs)"
            )
        if asked > has:
            raise UserError(f"{asked:g} {name} per trial asked for, this machine has {has}: ask for at most that")
    if gpus > 1 and not float(gpus).is_integer():
        raise UserError(f"{gpus:g} GPUs per trial asked for; above 1 it must be a whole number")
    if concurrent is not None and concurrent < 1:
        raise UserError(f"max-concurrent is {concurrent}; it must be at least 1")
    fits = int(min(has_cpus / cpus, has_gpus / gpus if gpus else math.inf) + 1e-9)
    return Resources(cpus, gpus, min(fits, concurrent or fits), has_cpus, has_gpus)


def start_ray(resources: Resources) -> None:
    """Start a local Ray, quietly."""
    os.environ.update({k: v for k, v in QUIET.items() if k not in os.environ})
    import ray

    # The shared tensors are only read, which is what Ray's note asks for.
    warnings.filterwarnings("ignore", message="Zero-copy tensor serialization|The input tensor is non-contiguous")
    if not ray.is_initialized():
        ray.init(
            num_cpus=resources.machine_cpus,
            num_gpus=resources.machine_gpus,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            object_store_memory=512 * 2**20,
        )
    terminate_as_interrupt()


def terminate_as_interrupt() -> None:
    """Make SIGTERM end the program as Ctrl-C does. Ray puts a handler of its own in place, so call it after too."""
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))


def run_sweep(
    study: Study,
    worlds: Mapping[str, World],
    target: TrackingTarget,
    tracker: StudyTracker,
    resources: Resources,
    searcher: Any,
    scheduler: Any = None,
) -> None:
    """Run every trial that a searcher suggests; each run's final status is set here, in the driver.

    Raises KeyboardInterrupt after an interrupt, once Ray has stopped the trials.
    """
    from ray import tune

    from tuning.trainable import ray_trainable

    watcher = make_watcher(tracker)
    trainable = tune.with_parameters(ray_trainable, worlds=dict(worlds), target=target, threads=resources.threads)
    with tempfile.TemporaryDirectory() as storage:
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": resources.cpus, "gpu": resources.gpus}),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=-1,
                reuse_actors=True,
                max_concurrent_trials=resources.concurrent,
            ),
            run_config=tune.RunConfig(
                name=study.id, storage_path=str(Path(storage).resolve()), verbose=0, callbacks=[watcher]
            ),
        )
        try:
            tuner.fit()
        finally:
            watcher.close()
    if watcher.ended < watcher.begun:
        raise KeyboardInterrupt


def make_list_searcher(trials: Sequence[TrialSpec]) -> Any:
    """A Ray Tune searcher that suggests a list of trials in its order."""
    from ray.tune.search import Searcher

    class ListSearcher(Searcher):
        def __init__(self) -> None:
            super().__init__()
            self.left = list(trials)

        def suggest(self, trial_id: str) -> Any:
            return {"trial": self.left.pop(0)} if self.left else self.FINISHED

        def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
            """Nothing depends on it."""

        def save(self, checkpoint_path: str) -> None:
            """MLflow says what has run."""

    return ListSearcher()


def make_watcher(tracker: StudyTracker) -> Any:
    """A Tune callback that shows progress and sets final statuses."""
    from ray import tune

    class Watcher(tune.Callback):
        """Counts steps for the bar; FINISHED and FAILED are decided here."""

        def __init__(self) -> None:
            self.bar = progress_bar("trials", 0)
            self.seen: dict[str, int] = {}
            self.begun = 0
            self.ended = 0

        def on_trial_start(self, iteration, trials, trial, **info) -> None:
            self.begun += 1
            self.bar.total += trial.config["trial"].config.steps

        def on_trial_result(self, iteration, trials, trial, result, **info) -> None:
            spec = trial.config["trial"]
            self.seen[spec.id] = min(int(result.get("step", 0)), spec.config.steps)
            self.bar.n = sum(self.seen.values())
            self.bar.refresh()

        def on_trial_complete(self, iteration, trials, trial, **info) -> None:
            self._end(trial, "FINISHED")

        def on_trial_error(self, iteration, trials, trial, **info) -> None:
            self._end(trial, "FAILED")

        def _end(self, trial, status: str) -> None:
            self.ended += 1
            tracker.finish_trial(trial.config["trial"].id, status)

        def close(self) -> None:
            self.bar.close()

    return Watcher()
