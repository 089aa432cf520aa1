"""What a run says beside its metrics: a note on what it changes, its data, the machine under it, its adapters.

Everything is attached by explicit run id. Which trials keep the adapters that they generated is a policy: `all` trials
write their own; for `best` the driver writes those of the best trials of each size afterwards; `none` writes none. The
generator itself, deltas and per-task numbers are kept always, so an adapter can be made again at any time.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llgbm.evaluation import PartResult
from llgbm.lora import LoraBatch, adapter_config, write_adapter_files
from llgbm.runtime import UserError
from llgbm.training import TrainingConfig
from llgbm.world import World
from tuning.runs import TrialResult
from tuning.store import explained
from tuning.studies import TrialSpec

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

NOTE_TAG = "mlflow.note.content"
NOTE_LENGTH = 8000
KEEP_ARTIFACTS = ("all", "best", "none")
ADAPTER_PARTS = ("val", "test")
ROLE_OF_PART = {"train": "training", "val": "validation", "test": "evaluation"}
SYSTEM_SECONDS = 10


def trial_note(trial: TrialSpec, why: str = "") -> str:
    """Markdown for the run's page: why it is run, and each setting in which it differs from the default."""
    config = trial.config
    changes = _changes(config.as_dict(), TrainingConfig(seed=config.seed).as_dict())
    lines = [f"**{trial.name}**, size {trial.world.size}, seed {config.seed}: {_meaning(config)}"]
    lines += [f"Why: {why}"] if why else []
    lines += ["Changed against the default training:" if changes else "All settings are the default training's."]
    return "\n\n".join(lines) + "".join(f"\n* `{key}`: {new} (default {old})" for key, new, old in changes)


def study_note(name: str, trials: Sequence[TrialSpec], why: str = "") -> str:
    """Markdown for the parent run's page: what is compared, on how many seeds, in which worlds."""
    configurations = dict.fromkeys(trial.name for trial in trials)
    seeds = sorted({trial.config.seed for trial in trials})
    worlds = {f"{trial.world.size} ({len(trial.world.suite.split.test)} held-out tasks)" for trial in trials}
    lines = [f"**{name}**: {len(trials)} trials over seeds {', '.join(map(str, seeds))}."]
    lines += [f"Why: {why}"] if why else []
    lines += [f"Worlds: {', '.join(sorted(worlds))}.", "Configurations:"]
    return "\n\n".join(lines) + "".join(f"\n* {configuration}" for configuration in configurations)


def note_tags(text: str) -> dict[str, str]:
    """The tag under which MLflow shows a note, cut to the length that it takes."""
    return {NOTE_TAG: text if len(text) <= NOTE_LENGTH else text[: NOTE_LENGTH - 1] + "…"}


def _meaning(config: TrainingConfig) -> str:
    weight, delta = config.lambda_weight, config.lambda_delta
    terms = f"λ_w = {weight:g}, λ_d = {delta:g}, "
    if not delta:
        return terms + "matches the teachers' weights alone."
    probes = f"on {config.delta_probes} probes"
    if not weight:
        return terms + f"matches the teachers' behaviour alone, {probes}; no teacher weight is looked at."
    return terms + f"matches the teachers' weights and their behaviour {probes}."


def _changes(new: Mapping[str, Any], old: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for key, value in new.items():
        if isinstance(value, Mapping):
            found += _changes(value, old.get(key) or {}, f"{prefix}{key}.")
        elif value != old.get(key):
            found.append((f"{prefix}{key}", value, old.get(key)))
    return found


def log_datasets(client: MlflowClient, run_id: str, worlds: Sequence[World]) -> None:
    """Name the data of a run by hash, one input a part: bank, base and tasks.

    MLflow creates a data set on first sight and two processes that do so at once collide, so the driver calls this
    for the parent run before any trial does. Calling again changes nothing. Raises UserError if the store fails.
    """
    with explained(client.tracking_uri):
        client.log_inputs(run_id, [dataset for world in worlds for dataset in world_datasets(world)])


def world_datasets(world: World) -> list[DatasetInput]:
    """MLflow's form of the three parts of a world."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    suite, data = world.config.suite, world.data
    source = {"world": world.config.hash, "base": world.base.hash, "bank": world.bank.hash, "data": data.hash}
    found = []
    for part, role in ROLE_OF_PART.items():
        tasks = sorted({data.tasks[row] for row in data.rows[part]})
        profile = {"tasks": len(tasks), "teachers": len(data.rows[part]), "examples_per_task": data.n_examples}
        dataset = Dataset(
            name=f"{suite.name}-{world.config.size}-{part}",
            digest=data.hash,
            source_type="llgbm",
            source=json.dumps(source),
            schema=json.dumps({"tasks": tasks})[:60_000],
            profile=json.dumps({**profile, "encoder": data.encoder}),
        )
        found.append(DatasetInput(dataset, [InputTag("mlflow.data.context", role)]))
    return found


@contextmanager
def system_metrics(tracking_uri: str, run_id: str) -> Iterator[None]:
    """Log CPU, memory, disk, network and GPU use of the machine to a run (`system/…`) while the block runs.

    MLflow's own monitor does it from a thread, every ten seconds; a run that is opened again goes on counting. A
    store that fails costs these figures, never the trial.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(
        run_id, sampling_interval=SYSTEM_SECONDS, resume_logging=True, tracking_uri=tracking_uri
    )
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def check_policy(policy: str, best: int) -> None:
    """Raise UserError unless the policy exists and at least one trial is to be kept."""
    if policy not in KEEP_ARTIFACTS:
        raise UserError(f"unknown policy {policy!r} for artifacts; there are: {', '.join(KEEP_ARTIFACTS)}")
    if best < 1:
        raise UserError(f"the best {best} trials are to keep their adapters; it must be at least 1")


def write_adapters(folder: Path, world: World, part: str, adapters: LoraBatch, tasks: Sequence[str]) -> None:
    """Write `adapters/<part>/<task>/` below a folder, each a PEFT adapter."""
    config = adapter_config(world.bank.spec, world.base.path)
    for task, state in zip(tasks, adapters.to_state_dicts(), strict=True):
        own = folder / "adapters" / part / task
        own.mkdir(parents=True)
        write_adapter_files(own, state, config)


def write_trial_adapters(folder: Path, world: World, results: Mapping[str, PartResult]) -> None:
    """Write what a trial generated for the tasks of validation and test."""
    for part in ADAPTER_PARTS:
        write_adapters(folder, world, part, results[part].adapters, list(results[part].accuracy_by_task))


def best_trials(results: Sequence[TrialResult], metric: str, best: int) -> list[TrialResult]:
    """The `best` finished trials of each size by a metric; those that never reported it do not count."""
    done = [r for r in results if r.whole and metric in r.metrics]
    sizes = dict.fromkeys(r.params.get("model_size", "") for r in done)
    ranked = sorted(done, key=lambda r: -r.metrics[metric])
    return [r for size in sizes for r in [r for r in ranked if r.params.get("model_size", "") == size][:best]]


def keep_best_adapters(client: MlflowClient, worlds: Mapping[str, World], results: Sequence[TrialResult]) -> None:
    """Generate again, from the generator that a trial kept, the adapters of each of these trials; log them there.

    `worlds` by trial id. A second call writes the same files again. Raises UserError if the store fails.
    """
    for result in results:
        with explained(client.tracking_uri), tempfile.TemporaryDirectory() as folder:
            _generate_adapters(client, worlds[result.trial_id], result.run_id, Path(folder))
            client.log_artifacts(result.run_id, str(Path(folder) / "adapters"), "adapters")


def _generate_adapters(client: MlflowClient, world: World, run_id: str, folder: Path) -> None:
    from llgbm.bundle import GeneratorBundle

    generator = GeneratorBundle.load(Path(client.download_artifacts(run_id, "generator", str(folder)))).generator
    device = world.data.values_AV.device
    for part in ADAPTER_PARTS:
        rows = list(world.data.rows[part])
        adapters = generator.to(device).generate(world.data.conditions.evaluation_ANC[rows])
        write_adapters(folder, world, part, adapters, [world.data.tasks[row] for row in rows])
