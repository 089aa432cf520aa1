"""What a Ray Tune worker runs: one trial, from shared tensors to artifacts. Ray is the few lines at the end."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llgbm.bundle import GeneratorBundle
from llgbm.evaluation import REPORTED_PARTS, PartResult, evaluate_generator
from llgbm.lora import adapter_config, write_adapter_files
from llgbm.training import Outcome, train
from llgbm.world import World
from tuning.studies import TrialSpec
from tuning.tracking import TrackingTarget, TrialTracker


def run_trial(trial: TrialSpec, world: World, tracker: TrialTracker, on_evaluation: Any) -> dict[str, float]:
    """Train, evaluate and log one trial; return its final metrics.

    `on_evaluation(step, metrics)` is called whenever a validation accuracy is known.
    """

    def report(step: int, metrics: Mapping[str, float]) -> bool:
        tracker.log(step, metrics)
        if "val/accuracy" in metrics:
            on_evaluation(step, metrics)
        return True

    started = time.perf_counter()
    outcome = train(trial.config, world.data, world.flora, report)
    results = {p: evaluate_generator(outcome.generator, world.data, world.flora, p) for p in ("test", "val", "train")}
    metrics = {
        **{
            f"{name}/{key}": value
            for name, part in REPORTED_PARTS.items()
            for key, value in results[part].metrics.items()
        },
        "best_step": float(outcome.best_step),
        "time/steps_per_second": outcome.steps_run / outcome.seconds,
        "time/seconds": time.perf_counter() - started,
        "time/peak_memory_mb": peak_memory_mb(),
    }
    tracker.log(outcome.steps_run, metrics)
    with tempfile.TemporaryDirectory() as folder:
        write_artifacts(Path(folder), trial, world, outcome, results)
        tracker.log_artifacts(Path(folder), "")
    return metrics


def write_artifacts(
    folder: Path, trial: TrialSpec, world: World, outcome: Outcome, results: Mapping[str, PartResult]
) -> None:
    """Deltas, per-task numbers, generated adapters of validation and test tasks, and the generator, into a folder."""
    (folder / "generator").mkdir()
    GeneratorBundle.save(folder / "generator", outcome.generator, trial.config.generator, bundle_facts(trial, world))
    for part in ("val", "test"):
        result, tasks = results[part], list(results[part].accuracy_by_task)
        _write_adapters(folder / "adapters" / part, world, tasks, result)
        (folder / "deltas").mkdir(exist_ok=True)
        tensors = {"predicted": result.delta_AD.cpu(), "teacher": result.teacher_delta_AD.cpu()}
        save_file(tensors, folder / "deltas" / f"{part}.safetensors", {"tasks": json.dumps(tasks)})
    per_task = {
        part: {"accuracy": result.accuracy_by_task, "delta_cosine": result.cosine_by_task}
        for part, result in results.items()
    }
    (folder / "per_task.json").write_text(json.dumps(per_task, indent=1))
    (folder / "config.json").write_text(json.dumps(trial.config.as_dict(), indent=1))


def _write_adapters(folder: Path, world: World, tasks: Sequence[str], result: PartResult) -> None:
    config = adapter_config(world.bank.spec, world.base.path)
    for task, state in zip(tasks, result.adapters.to_state_dicts(), strict=True):
        (folder / task).mkdir(parents=True)
        write_adapter_files(folder / task, state, config)


def bundle_facts(trial: TrialSpec, world: World) -> dict[str, Any]:
    """Where a generator comes from."""
    return {
        "size": world.config.size,
        "base_path": world.base.path,
        "base_hash": world.base.hash,
        "bank_hash": world.bank.hash,
        "encoder": world.data.encoder,
        "trial_id": trial.id,
        "config": trial.name,
    }


def peak_memory_mb() -> float:
    """Peak memory so far: of the GPU where there is one, else of this process, in MB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def ray_trainable(
    params: Mapping[str, Any],
    worlds: Mapping[str, World],
    target: TrackingTarget,
    threads: int,
) -> None:
    """The function that Ray Tune calls; `params["trial"]` is the trial."""
    from ray import tune

    torch.set_num_threads(threads)
    trial: TrialSpec = params["trial"]
    world = worlds[trial.world.hash]
    tags = {"llgbm.bank": world.bank.hash, "llgbm.base": world.base.hash, "llgbm.world": trial.world.hash}
    tracker = TrialTracker.open(target, trial.id, trial.name, trial.config.as_dict(), tags)
    try:
        metrics = run_trial(trial, world, tracker, lambda step, found: tune.report({"step": step, **found}))
    finally:
        tracker.close()
    tune.report({"step": trial.config.steps, "finished": True, **metrics})
