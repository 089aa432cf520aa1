"""Run one trial in a Ray Tune worker: train, evaluate, log. Ray is used in the last function only.

A trial continues from its newest checkpoint. An error that would come again is caught and reported to the driver, which
marks the trial FAILED; Ray restarts only workers that die.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llgbm.evaluation.metrics import REPORTED_PARTS, PartResult, evaluate_generator
from llgbm.runtime import UserError, freeze_gc, pick_device, release_device_memory
from llgbm.training import Outcome, State, Trial
from llgbm.world import World
from tuning.studies.spec import TrialSpec
from tuning.sweep.artifacts import write_artifacts, write_trial_adapters
from tuning.sweep.checkpoints import TrialCheckpoints, trial_lock
from tuning.sweep.cluster import take_share
from tuning.tracking.notes import log_datasets, note_tags, system_metrics, trial_note
from tuning.tracking.runs import DEATH_TAG, NO_SCHEDULER, TrackingTarget
from tuning.tracking.trial import TrialTracker, finished_result

CHECKPOINT_SECONDS = 300.0
MAX_RESTARTS = 10
STARTS_TAG = "llgbm.starts"
RUN_ID = "run_id"


@dataclass(frozen=True)
class TrialSetting:
    """Setting that all trials of a sweep share: where to report, where to keep state, and a trial's share.

    `session` names the driver's process, `scheduler` what may stop its trials.
    """

    target: TrackingTarget
    storage: str
    session: str
    threads: int
    gpus: float
    keep_adapters: bool
    scheduler: str = NO_SCHEDULER


def run_trial(
    trial: TrialSpec,
    world: World,
    tracker: TrialTracker,
    checkpoints: TrialCheckpoints,
    on_evaluation: Callable[[int, Mapping[str, float]], Any],
    keep_adapters: bool = True,
) -> dict[str, float]:
    """Train from the newest checkpoint, evaluate and log one trial; return its final metrics.

    Final metrics are logged at the step after the last, since they are of the best generator, not of the last.
    `on_evaluation(step, metrics)` is called at each validation. `keep_adapters` adds the generated adapters to the
    artifacts.
    """

    def report(step: int, metrics: Mapping[str, float]) -> bool:
        tracker.log(step, metrics)
        if "val/accuracy" in metrics:
            on_evaluation(step, metrics)
        return True

    def keep(state: State) -> None:
        if tracker.is_flushed():
            checkpoints.write(state)

    started, state = time.perf_counter(), checkpoints.newest()
    before = state["seconds"] if state else 0.0
    training = Trial(trial.config, world.data, world.lora_model)
    if state:
        training.restore(state)
    outcome = training.run(report, keep, CHECKPOINT_SECONDS)
    results = {
        p: evaluate_generator(outcome.generator, world.data, world.lora_model, p)
        for p in ("test", "val", "train")
    }
    metrics = final_metrics(outcome, results)
    metrics["time/seconds"] = before + time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        write_artifacts(Path(folder), trial, world, outcome, results)
        if keep_adapters:
            write_trial_adapters(Path(folder), world, results)
        tracker.log_artifacts(Path(folder), "")
    tracker.log(outcome.steps_run + 1, metrics)
    return metrics


def final_metrics(outcome: Outcome, results: Mapping[str, PartResult]) -> dict[str, float]:
    """Name the metrics of a finished training: `heldout/…`, `val/…`, `train/…`, its best step, speed and memory."""
    metrics = {
        "best_step": float(outcome.best_step),
        "time/steps_per_second": outcome.steps_run / outcome.seconds,
        "time/peak_memory_mb": peak_memory_mb(),
    }
    for name, part in REPORTED_PARTS.items():
        for key, value in results[part].metrics.items():
            metrics[f"{name}/{key}"] = value
    return metrics


def peak_memory_mb() -> float:
    """Return the peak memory in MB: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def attempt(
    trial: TrialSpec,
    world: World,
    setting: TrialSetting,
    on_evaluation: Callable[[int, Mapping[str, Any]], Any],
) -> dict[str, Any]:
    """Run a trial; return its final metrics with `finished`, or the cause in `failed`.

    A trial that is finished already is not run: its metrics come with `reused`. Raises only errors that a new process
    may not have.
    """
    run: dict[str, Any] = {}

    def report(step: int, metrics: Mapping[str, float]) -> None:
        on_evaluation(step, {**metrics, **run})

    try:
        with trial_lock(setting.storage, trial.id):
            known = finished_result(setting.target, trial.id, setting.scheduler)
            if known is not None:
                return {**known.last_result, "reused": True}
            tracker = open_tracker(trial, world, setting)
            run[RUN_ID] = tracker.run_id
            metrics = run_tracked(trial, world, tracker, setting, report)
        return {"step": trial.config.steps, "finished": True, **metrics, **run}
    except Exception as error:
        if is_of_the_process(error):
            raise
        return {"step": 0, "failed": cause_of(error, setting), **run}
    finally:
        release_device_memory()


def open_tracker(trial: TrialSpec, world: World, setting: TrialSetting) -> TrialTracker:
    """Open the run of a trial, with its origin and its note."""
    tags = {
        "llgbm.bank": world.bank.hash,
        "llgbm.base": world.base.hash,
        "llgbm.world": trial.world.hash,
    }
    tags |= note_tags(trial_note(trial, trial.note))
    return TrialTracker.open(setting.target, trial.id, trial.name, trial_params(trial), tags)


def trial_params(trial: TrialSpec) -> dict[str, Any]:
    """Return the parameters of a run: the configuration and, of terms without a field, what they supervise by.

    A report may be made where the package of a term is not installed.
    """
    params = trial.config.as_dict()
    if trial.config.terms:
        params["matches"] = " ".join(trial.config.objective.matches)
    return params


def run_tracked(
    trial: TrialSpec,
    world: World,
    tracker: TrialTracker,
    setting: TrialSetting,
    on_evaluation: Callable[[int, Mapping[str, float]], Any],
) -> dict[str, float]:
    """Run a trial whose run is open. Metrics measured until an error or a stop are sent."""
    checkpoints = TrialCheckpoints(setting.storage, trial.id)
    try:
        tracker.show_first("heldout/accuracy")
        check_restarts(tracker, checkpoints, setting.session)
        log_datasets(tracker.client, tracker.run_id, [world])
        freeze_gc()
        with system_metrics(setting.target.tracking_uri, tracker.run_id):
            return run_trial(
                trial, world, tracker, checkpoints, on_evaluation, setting.keep_adapters
            )
    finally:
        tracker.close()


def check_restarts(tracker: TrialTracker, checkpoints: TrialCheckpoints, session: str) -> None:
    """Raise UserError after `MAX_RESTARTS` starts from the same checkpoint under one driver."""
    place = f"{session} {checkpoints.newest_name()}"
    tag = tracker.tag(STARTS_TAG)
    starts = 1 + (int(tag.rpartition(" ")[2]) if tag.startswith(f"{place} ") else 0)
    if starts > MAX_RESTARTS:
        cause = tracker.tag(DEATH_TAG) or "no cause known"
        raise UserError(
            f"its worker died {starts - 1} times in a row without reaching another checkpoint ({cause}): look for what "
            "kills it, most often the host's memory, and use --retry-failed"
        )
    tracker.set_tag(STARTS_TAG, f"{place} {starts}")


def is_of_the_process(error: Exception) -> bool:
    """Return True for an error of this process alone, such as a CUDA error that is not about memory."""
    return "CUDA error" in str(error) and not is_out_of_memory(error)


def is_out_of_memory(error: Exception) -> bool:
    """Return True if a GPU or the host ran out of memory."""
    return isinstance(
        error, torch.OutOfMemoryError | MemoryError
    ) or "can't allocate memory" in str(error)


def cause_of(error: Exception, setting: TrialSetting) -> str:
    """Say in one sentence why a trial failed."""
    first = (str(error).strip().splitlines() or ["no message"])[0]
    if is_out_of_memory(error):
        share = f"{setting.gpus:g} of a GPU" if setting.gpus else "its share of the host"
        return f"out of memory ({first[:200]}): give trials more than {share}, or a smaller batch"
    kind = "" if isinstance(error, UserError | FloatingPointError) else f"{type(error).__name__}: "
    return f"{kind}{first}"[:500]


def ray_trainable(
    params: Mapping[str, Any], worlds: Mapping[str, World], setting: TrialSetting
) -> None:
    """Run the trial `params["trial"]`, as Ray Tune calls it."""
    from ray import tune

    take_share(setting.threads, setting.gpus)
    trial: TrialSpec = params["trial"]
    world = worlds[trial.world.hash].to(pick_device() if setting.gpus else "cpu")
    tune.report(
        attempt(trial, world, setting, lambda step, found: tune.report({"step": step, **found}))
    )
