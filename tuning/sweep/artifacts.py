"""Write the artifacts of a trial: adapters, deltas, predictions and the generator."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.torch import save_file

from llgbm.evaluation.metrics import PartResult
from llgbm.generator.bundle import GeneratorBundle
from llgbm.generator.conditioning import describe
from llgbm.lora.adapters import LoraBatch, write_adapter_files
from llgbm.system.documents import check_format
from llgbm.system.lineage import license_of
from llgbm.training import Outcome
from llgbm.world import World
from tuning.significance import SHARES, student_interval
from tuning.studies.spec import TrialSpec
from tuning.tracking.runs import TrialResult
from tuning.tracking.store import store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Format of what a trial keeps: `per_task.json`, which names it, `config.json` and `deltas`. Version 1 did not name it.
FORMAT_VERSION = 2
PER_TASK = "per_task.json"
ADAPTER_PARTS = ("val", "test")


def write_adapters(
    folder: Path, world: World, part: str, adapters: LoraBatch, bundle: GeneratorBundle
) -> None:
    """Write each adapter of a part as a PEFT folder with its lineage and card, `adapters/<part>/<task>/`."""
    config, data = bundle.adapter_config(), world.data
    for row, state in zip(data.rows[part], adapters.to_state_dicts(), strict=True):
        own = folder / "adapters" / part / data.tasks[row]
        own.mkdir(parents=True)
        write_adapter_files(own, state, config, bundle.lineage(**asked_of(world, row)))


def asked_of(world: World, row: int) -> dict[str, Any]:
    """Return the texts that the adapter of a row of the data is generated from in evaluation."""
    how, data = world.config.conditioning, world.data
    prompts = world.bank.prompts(data.adapter_ids[row])["evaluation"]
    told = describe(world.config.suite, data.tasks[row]) if how.has_description else ""
    return {"prompts": prompts if how.has_prompts else (), "description": told}


def write_trial_adapters(folder: Path, world: World, results: Mapping[str, PartResult]) -> None:
    """Write the adapters that a trial generated for validation and test tasks beside its `generator`."""
    bundle = GeneratorBundle.load(folder / "generator")
    for part in ADAPTER_PARTS:
        write_adapters(folder, world, part, results[part].adapters, bundle)


def best_trials(results: Sequence[TrialResult], metric: str, best: int) -> list[TrialResult]:
    """Return the `best` finished trials of each size by a metric; trials without the metric do not count."""
    done = [result for result in results if result.is_complete and metric in result.metrics]
    by_size: dict[str, list[TrialResult]] = {
        result.params.get("model_size", ""): [] for result in done
    }
    for result in sorted(done, key=lambda result: -result.metrics[metric]):
        by_size[result.params.get("model_size", "")].append(result)
    return [result for ranked in by_size.values() for result in ranked[:best]]


def keep_best_adapters(
    client: MlflowClient, worlds: Mapping[str, World], results: Sequence[TrialResult]
) -> None:
    """Generate the adapters of these trials again, from the generators that they kept, and log them.

    `worlds` by trial id. A second call writes the same adapters. Raises UserError if the store fails.
    """
    for result in results:
        with store_errors(client.tracking_uri), tempfile.TemporaryDirectory() as folder:
            _generate_adapters(client, worlds[result.trial_id], result.run_id, Path(folder))
            client.log_artifacts(result.run_id, str(Path(folder) / "adapters"), "adapters")


def _generate_adapters(client: MlflowClient, world: World, run_id: str, folder: Path) -> None:
    bundle = GeneratorBundle.load(Path(client.download_artifacts(run_id, "generator", str(folder))))
    device = world.data.device
    for part in ADAPTER_PARTS:
        rows = list(world.data.rows[part])
        generator = bundle.generator.to(device)
        adapters = generator.generate(world.data.conditions.evaluation_ANC[rows])
        write_adapters(folder, world, part, adapters, bundle)


def write_artifacts(
    folder: Path,
    trial: TrialSpec,
    world: World,
    outcome: Outcome,
    results: Mapping[str, PartResult],
) -> None:
    """Write the generator, deltas, per-task numbers and settings into a folder."""
    (folder / "generator").mkdir()
    GeneratorBundle.save(
        folder / "generator",
        outcome.generator,
        trial.config.generator,
        {
            **bundle_facts(trial, world),
            "heldout": heldout_facts(results["test"].accuracy_by_task),
        },
    )
    for part in ("val", "test"):
        result, tasks = results[part], list(results[part].accuracy_by_task)
        (folder / "deltas").mkdir(exist_ok=True)
        tensors = {"predicted": result.delta_AD.cpu(), "teacher": result.teacher_delta_AD.cpu()}
        save_file(tensors, folder / "deltas" / f"{part}.safetensors", {"tasks": json.dumps(tasks)})
    per_task: dict[str, Any] = {"version": FORMAT_VERSION}
    per_task |= {
        part: {"accuracy": result.accuracy_by_task, "delta_cosine": result.cosine_by_task}
        for part, result in results.items()
    }
    (folder / PER_TASK).write_text(json.dumps(per_task, indent=1))
    (folder / "config.json").write_text(json.dumps(trial.config.as_dict(), indent=1))


def read_per_task(path: Path) -> dict[str, Any]:
    """Read numbers by task. Raises UserError for a file of a newer format, ValueError for one that is torn."""
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no table")
    check_format(found.get("version", 1), FORMAT_VERSION, path.name)
    return found


def bundle_facts(trial: TrialSpec, world: World) -> dict[str, Any]:
    """Return the origin of a generator, for its bundle."""
    return {
        "size": world.config.size,
        "base_path": world.base.path,
        "base_hash": world.base.hash,
        "bank_hash": world.bank.hash,
        "encoder": world.data.encoder,
        "encoder_hash": world.data.encoder_hash,
        **world.config.conditioning.facts,
        "base_license": license_of(world.base.folder),
        "trial_id": trial.id,
        "config": trial.name,
    }


def heldout_facts(accuracy_by_task: Mapping[str, float]) -> dict[str, Any]:
    """Return the mean accuracy over held-out tasks with its 95 % interval, None where there is no spread."""
    values = np.array(list(accuracy_by_task.values()))
    return {
        "accuracy": float(values.mean()),
        "interval": student_interval(values, SHARES),
        "tasks": len(values),
    }
