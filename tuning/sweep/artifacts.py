"""Write the artifacts of a trial: adapters, deltas, predictions and the generator."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from llgbm.evaluation.metrics import PartResult
from llgbm.generator.bundle import GeneratorBundle
from llgbm.lora.adapters import LoraBatch, adapter_config, write_adapter_files
from llgbm.runtime import UserError
from llgbm.training import Outcome
from llgbm.world import World
from tuning.studies.spec import TrialSpec
from tuning.tracking.runs import TrialResult
from tuning.tracking.store import explained

if TYPE_CHECKING:
    from mlflow import MlflowClient

KEEP_ARTIFACTS = ("all", "best", "none")
ADAPTER_PARTS = ("val", "test")


def check_policy(policy: str, best: int) -> None:
    """Raise UserError unless the policy exists and at least one trial is to be kept."""
    if policy not in KEEP_ARTIFACTS:
        raise UserError(
            f"unknown policy {policy!r} for artifacts; there are: {', '.join(KEEP_ARTIFACTS)}"
        )
    if best < 1:
        raise UserError(f"the best {best} trials are to keep their adapters; it must be at least 1")


def write_adapters(
    folder: Path, world: World, part: str, adapters: LoraBatch, tasks: Sequence[str]
) -> None:
    """Write `adapters/<part>/<task>/` below a folder, each a PEFT adapter."""
    config = adapter_config(world.bank.spec, world.base.path)
    for task, state in zip(tasks, adapters.to_state_dicts(), strict=True):
        own = folder / "adapters" / part / task
        own.mkdir(parents=True)
        write_adapter_files(own, state, config)


def write_trial_adapters(folder: Path, world: World, results: Mapping[str, PartResult]) -> None:
    """Write what a trial generated for the tasks of validation and test."""
    for part in ADAPTER_PARTS:
        write_adapters(
            folder, world, part, results[part].adapters, list(results[part].accuracy_by_task)
        )


def best_trials(results: Sequence[TrialResult], metric: str, best: int) -> list[TrialResult]:
    """The `best` finished trials of each size by a metric; those that never reported it do not count."""
    done = [r for r in results if r.whole and metric in r.metrics]
    sizes = dict.fromkeys(r.params.get("model_size", "") for r in done)
    ranked = sorted(done, key=lambda r: -r.metrics[metric])
    return [
        r
        for size in sizes
        for r in [r for r in ranked if r.params.get("model_size", "") == size][:best]
    ]


def keep_best_adapters(
    client: MlflowClient, worlds: Mapping[str, World], results: Sequence[TrialResult]
) -> None:
    """Generate again, from the generator that a trial kept, the adapters of each of these trials; log them there.

    `worlds` by trial id. A second call writes the same files again. Raises UserError if the store fails.
    """
    for result in results:
        with explained(client.tracking_uri), tempfile.TemporaryDirectory() as folder:
            _generate_adapters(client, worlds[result.trial_id], result.run_id, Path(folder))
            client.log_artifacts(result.run_id, str(Path(folder) / "adapters"), "adapters")


def _generate_adapters(client: MlflowClient, world: World, run_id: str, folder: Path) -> None:
    from llgbm.generator.bundle import GeneratorBundle

    generator = GeneratorBundle.load(
        Path(client.download_artifacts(run_id, "generator", str(folder)))
    ).generator
    device = world.data.values_AV.device
    for part in ADAPTER_PARTS:
        rows = list(world.data.rows[part])
        adapters = generator.to(device).generate(world.data.conditions.evaluation_ANC[rows])
        write_adapters(folder, world, part, adapters, [world.data.tasks[row] for row in rows])


def write_artifacts(
    folder: Path,
    trial: TrialSpec,
    world: World,
    outcome: Outcome,
    results: Mapping[str, PartResult],
) -> None:
    """Deltas, per-task numbers, settings and the generator, into a folder."""
    (folder / "generator").mkdir()
    GeneratorBundle.save(
        folder / "generator", outcome.generator, trial.config.generator, bundle_facts(trial, world)
    )
    for part in ("val", "test"):
        result, tasks = results[part], list(results[part].accuracy_by_task)
        (folder / "deltas").mkdir(exist_ok=True)
        tensors = {"predicted": result.delta_AD.cpu(), "teacher": result.teacher_delta_AD.cpu()}
        save_file(tensors, folder / "deltas" / f"{part}.safetensors", {"tasks": json.dumps(tasks)})
    per_task = {
        part: {"accuracy": result.accuracy_by_task, "delta_cosine": result.cosine_by_task}
        for part, result in results.items()
    }
    (folder / "per_task.json").write_text(json.dumps(per_task, indent=1))
    (folder / "config.json").write_text(json.dumps(trial.config.as_dict(), indent=1))


def bundle_facts(trial: TrialSpec, world: World) -> dict[str, Any]:
    """Where a generator comes from."""
    return {
        "size": world.config.size,
        "base_path": world.base.path,
        "base_hash": world.base.hash,
        "bank_hash": world.bank.hash,
        "encoder": world.data.encoder,
        "encoder_hash": world.data.encoder_hash,
        "trial_id": trial.id,
        "config": trial.name,
    }
