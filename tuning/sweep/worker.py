"""Run one trial in a Ray Tune worker: train, evaluate, log. Ray is used in the last function only.

A trial continues from its newest checkpoint. An error that would come again is caught and reported to the driver, which
marks the trial FAILED; Ray restarts only workers that die.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch

import tuning.program  # noqa: F401, imported for its effect on later ones: transformers, MLflow
from llgbm.evaluation.levels import evaluate_levels, level_metric
from llgbm.evaluation.metrics import REPORTED_PARTS, PartResult, evaluate_generator
from llgbm.runtime import UserError, freeze_gc, pick_device, release_device_memory
from llgbm.training import Outcome, State, TrainingConfig, Trial
from llgbm.world import World
from tuning.studies.spec import TrialSpec
from tuning.sweep.artifacts import write_artifacts, write_trial_adapters
from tuning.sweep.checkpoints import TrialCheckpoints, trial_lock
from tuning.sweep.cluster import take_share
from tuning.tracking.notes import log_datasets, note_tags, system_metrics, trial_note
from tuning.tracking.runs import DEATH_TAG, NO_SCHEDULER, WORLD_PARAM, TrackingTarget
from tuning.tracking.trial import TrialTracker, finished_result

CHECKPOINT_SECONDS = 300.0
MAX_RESTARTS = 10
STARTS_TAG = "llgbm.starts"
RUN_ID = "run_id"
# What numbers depend on beside the trial, for whoever runs it again.
THREADS_TAG = "llgbm.threads"
DEVICE_TAG = "llgbm.device"
# What a trial ran out of memory with, before it was tried again with less.
OOM_TAG = "llgbm.out_of_memory_with"
logger = logging.getLogger("tuning.worker")


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
    retry_oom: bool = False
    # Logins of the stores, where a worker's machine has an environment of its own.
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)


class TrialLog(Protocol):
    """Take what a trial measures and makes."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step."""

    def is_flushed(self) -> bool:
        """Return True if all that was logged is safe, so that a checkpoint may be kept."""

    def log_artifacts(self, folder: Path, artifact_path: str | None = None) -> None:
        """Take a folder of artifacts."""

    def set_tag(self, key: str, value: str) -> None:
        """Take a fact about the run."""


def _ignore(step: int, metrics: Mapping[str, float]) -> None:
    """Take a validation result that nobody waits for."""


@dataclass(frozen=True)
class Outputs:
    """Receivers of what a trial makes; `keep_adapters` adds the generated adapters to its artifacts."""

    tracker: TrialLog
    checkpoints: TrialCheckpoints
    on_evaluation: Callable[[int, Mapping[str, float]], Any] = _ignore
    keep_adapters: bool = False


def run_trial(
    trial: TrialSpec, world: World, outputs: Outputs, config: TrainingConfig | None = None
) -> dict[str, float]:
    """Train from the newest checkpoint, evaluate and log one trial; return its final metrics.

    Final metrics are logged at the step after the last, since they are of the best generator, not of the last.
    `config` is the trial's own unless one with memory savers stands in for it.
    """
    tracker, checkpoints = outputs.tracker, outputs.checkpoints

    def report(step: int, metrics: Mapping[str, float]) -> bool:
        tracker.log(step, metrics)
        if "val/accuracy" in metrics:
            outputs.on_evaluation(step, metrics)
        return True

    def keep(state: State) -> None:
        if tracker.is_flushed():
            checkpoints.write(state)

    started, state = time.perf_counter(), checkpoints.newest()
    before = state["seconds"] if state else 0.0
    training = Trial(config or trial.config, world.data, world.lora_model)
    world = replace(world, data=training.data)  # training tasks are those that were trained on
    if state:
        training.restore(state)
    outcome = training.run(report, keep, CHECKPOINT_SECONDS)
    results = {
        p: evaluate_generator(outcome.generator, world.data, world.lora_model, p)
        for p in ("test", "val", "train")
    }
    levels = evaluate_levels(outcome.generator, world.lora_model, world.data.levels)
    metrics = final_metrics(outcome, results)
    metrics |= {level_metric(name): fmean(own.values()) for name, own in levels.items()}
    metrics["time/seconds"] = before + time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        write_artifacts(Path(folder), trial, world, outcome, results)
        if outputs.keep_adapters:
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
        THREADS_TAG: str(setting.threads),
        DEVICE_TAG: world.data.device.type,
    }
    tags |= note_tags(trial_note(trial, trial.note))
    return TrialTracker.open(setting.target, trial.id, trial.name, trial_params(trial), tags)


def trial_params(trial: TrialSpec) -> dict[str, Any]:
    """Return the parameters of a run: the configuration, the seed of the world, and what terms supervise by.

    Of a term without a field the report could not tell the last where the package of the term is not installed.
    """
    params = {**trial.config.as_dict(), WORLD_PARAM: trial.world.seed}
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

    def report(step: int, metrics: Mapping[str, float]) -> None:
        """Send what a scheduler decides on before it hears of it: the driver may end this process then."""
        if setting.scheduler != NO_SCHEDULER:
            tracker.is_flushed()
        on_evaluation(step, metrics)

    try:
        tracker.show_first("heldout/accuracy")
        check_restarts(tracker, checkpoints, setting.session)
        log_datasets(tracker.client, tracker.run_id, [world])
        freeze_gc()
        with system_metrics(setting.target.tracking_uri, tracker.run_id):
            outputs = Outputs(tracker, checkpoints, report, setting.keep_adapters)
            return run_in_memory(trial, world, outputs, setting.retry_oom)
    finally:
        tracker.close()


def run_in_memory(
    trial: TrialSpec, world: World, outputs: Outputs, retry_oom: bool
) -> dict[str, float]:
    """Run a trial; if that is asked for, try one that runs out of memory again with more and more memory savers."""
    for config in savers(trial.config, retry_oom):
        try:
            return run_trial(trial, world, outputs, config)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            last = error
        logger.warning("trial %s ran out of memory with %s", trial.id, saver_name(config))
        outputs.tracker.set_tag(OOM_TAG, saver_name(config))
        release_device_memory()
    raise last


def savers(config: TrainingConfig, retry_oom: bool) -> Iterator[TrainingConfig]:
    """Yield a configuration as it is and, if asked for, in forms that need less memory for the same gradients."""
    yield config
    if not retry_oom or not set(config.weights) - {"weight"}:
        return
    saving = replace(config, activation_checkpointing=True)
    if saving != config:
        yield saving
    chunk = min(config.probe_chunk or config.n_probes, config.n_probes)
    while chunk > 1:
        chunk = (chunk + 1) // 2
        yield replace(saving, probe_chunk=chunk)


def saver_name(config: TrainingConfig) -> str:
    """Name the memory savers of a configuration, for people."""
    names = []
    if config.activation_checkpointing:
        names.append("activation checkpointing")
    if config.probe_chunk:
        names.append(f"{config.probe_chunk} probes at once")
    return " and ".join(names) or "no memory saver"


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

    os.environ.update(setting.environment)
    take_share(setting.threads, setting.gpus)
    trial: TrialSpec = params["trial"]
    world = worlds[trial.world.hash].to(pick_device() if setting.gpus else "cpu")
    tune.report(
        attempt(trial, world, setting, lambda step, found: tune.report({"step": step, **found}))
    )
