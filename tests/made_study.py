"""A study made of numbers, kept in a real store by the real trackers: what a report reads, without any training."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tuning.tracking.study import StudyTracker
from tuning.tracking.trial import TrialTracker

OPERATIONS, FORMATS = ("reverse", "copy", "first", "tail"), ("stars", "dashes", "quotes")
TASKS = [f"{operation}-{form}" for operation in OPERATIONS for form in FORMATS]
VALIDATION_TASKS = [f"task-{index}" for index in range(8)]
LAMBDAS = {"multitask": (0.3, 1.0), "delta-only": (0.0, 1.0), "weight-only": (1.0, 0.0)}
BASELINES = {
    "base": {"accuracy": 0.0, "delta_cosine": 0.0},
    "teacher": {"accuracy": 0.97, "delta_cosine": 1.0},
    "ridge": {"accuracy": 0.39, "delta_cosine": 0.8},
}
WIDTH = 16


def accuracies(mean: float) -> dict[str, float]:
    """Validation tasks with a spread of their own, around a mean."""
    return {task: mean + 0.01 * (index % 3 - 1) for index, task in enumerate(VALIDATION_TASKS)}


def make_study(
    folder: Path,
    effects: Mapping[str, float],
    seeds: int = 3,
    lambdas: Mapping[str, tuple[float, float]] = LAMBDAS,
    study_id: str = "made0001",
) -> StudyTracker:
    """A finished study in `folder`'s store: held-out accuracy is 0.4 + effect + task + seed + noise, every seed."""
    tracker = StudyTracker.open(None, folder, "llgbm")
    tracker.begin("made", study_id, {"study": "made"}, {})
    tracker.log_metrics(
        {
            f"baseline/{n}/{key}": value
            for n, found in BASELINES.items()
            for key, value in found.items()
        }
    )
    rng = np.random.default_rng(0)
    task_T = rng.normal(0, 0.15, len(TASKS))
    for config, effect in effects.items():
        for seed in range(seeds):
            noise_T = rng.normal(0, 0.01) + rng.normal(0, 0.03, len(TASKS))
            accuracy_T = np.clip(0.4 + effect + task_T + noise_T, 0, 1)
            log_trial(
                tracker,
                config,
                seed,
                dict(zip(TASKS, accuracy_T.tolist(), strict=True)),
                lambdas[config],
            )
    tracker.finish("FINISHED")
    return tracker


def log_trial(
    tracker: StudyTracker,
    config: str,
    seed: int,
    accuracy: Mapping[str, float],
    lambdas: tuple[float, float],
) -> str:
    """One finished trial with curves, final metrics and artifacts; return its run id."""
    assert tracker.target is not None
    params = {
        "lambda_weight": lambdas[0],
        "lambda_delta": lambdas[1],
        "seed": seed,
        "model_size": "nano",
    }
    trial_id = f"{config.replace(' ', '')}{seed}"
    trial = TrialTracker.open(tracker.target, trial_id, config, params, {})
    mean = float(np.mean(list(accuracy.values())))
    for step in (10, 20, 30):
        trial.log(step, {"loss/total": 3.0 / step + 0.01 * seed, "val/accuracy": mean * step / 30})
    trial.log(30, _metrics(mean))
    with tempfile.TemporaryDirectory() as made:
        _write_artifacts(Path(made), accuracy, seed)
        trial.log_artifacts(Path(made), "")
    trial.close()
    tracker.finish_trial(trial_id, "FINISHED")
    return trial.run_id


def _metrics(accuracy: float) -> dict[str, float]:
    held = {
        "accuracy": accuracy,
        "delta_cosine": 0.9,
        "delta_norm_ratio": 1.0,
        "delta_w_error": 0.95,
        "accuracy_shuffled_prompts": 0.0,
        "accuracy_nonsense_prompts": 0.01,
        "nearest_teacher_distance": 0.8,
        "diversity": 0.7,
    }
    time = {"time/seconds": 60.0, "time/steps_per_second": 9.0, "time/peak_memory_mb": 900.0}
    return {
        **{f"heldout/{key}": value for key, value in held.items()},
        "train/accuracy": accuracy + 0.1,
        **time,
    }


def _write_artifacts(folder: Path, accuracy: Mapping[str, float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    operations = dict.fromkeys([*OPERATIONS, *(task.split("-")[0] for task in accuracy)])
    by_operation = {operation: rng.normal(0, 2, WIDTH) for operation in operations}
    teacher_JD = np.stack(
        [by_operation[task.split("-")[0]] + rng.normal(0, 0.5, WIDTH) for task in accuracy]
    )
    generated_JD = teacher_JD + rng.normal(0, 0.4, teacher_JD.shape)
    (folder / "deltas").mkdir()
    tensors = {
        "teacher": teacher_JD.astype(np.float32),
        "predicted": generated_JD.astype(np.float32),
    }
    save_file(
        tensors, folder / "deltas" / "test.safetensors", {"tasks": json.dumps(list(accuracy))}
    )
    (folder / "per_task.json").write_text(json.dumps({"test": {"accuracy": accuracy}}))
