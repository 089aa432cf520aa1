"""Describe a run beside its metrics: a note on its settings, its data sets, use of the machine, lineage tags."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llgbm.training import TrainingConfig
from llgbm.world import World
from tuning.studies.spec import TRAINING, Study, TrialSpec
from tuning.tracking.store import store_errors, with_login

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

NOTE_TAG = "mlflow.note.content"
NOTE_LENGTH = 8000
ROLE_OF_PART = {"train": "training", "val": "validation", "test": "evaluation"}
SYSTEM_SECONDS = 10
GATES_TAG = "llgbm.missed_gates"


def trial_note(trial: TrialSpec, why: str = "") -> str:
    """Return Markdown for the run's page: the reason for the trial, and each setting that is not the default."""
    config = trial.config
    changes = _changes(config.as_dict(), replace(TRAINING, seed=config.seed).as_dict())
    lines = [f"**{trial.name}**, size {trial.world.size}, seed {config.seed}: {_meaning(config)}"]
    if why:
        lines.append(f"Why: {why}")
    if not changes:
        lines.append("All settings are the default training's.")
    else:
        lines.append("Changed against the default training:")
    return "\n\n".join(lines) + "".join(
        f"\n* `{key}`: {new} (default {old})" for key, new, old in changes
    )


def study_note(name: str, trials: Sequence[TrialSpec], why: str = "") -> str:
    """Return Markdown for the parent run's page: configurations, seeds and worlds."""
    configurations = dict.fromkeys(trial.name for trial in trials)
    seeds = sorted({trial.config.seed for trial in trials})
    worlds = {
        f"{trial.world.size} ({len(trial.world.suite.split.test)} held-out tasks)"
        for trial in trials
    }
    lines = [f"**{name}**: {len(trials)} trials over seeds {', '.join(map(str, seeds))}."]
    if why:
        lines.append(f"Why: {why}")
    lines += [f"Worlds: {', '.join(sorted(worlds))}.", "Configurations:"]
    return "\n\n".join(lines) + "".join(f"\n* {configuration}" for configuration in configurations)


def note_tags(text: str) -> dict[str, str]:
    """Return the tag that MLflow shows as a note, cut to its limit."""
    if len(text) > NOTE_LENGTH:
        text = text[: NOTE_LENGTH - 1] + "…"
    return {NOTE_TAG: text}


def _meaning(config: TrainingConfig) -> str:
    weight, delta = config.lambda_weight, config.lambda_delta
    if config.terms:
        return _sum_of_terms(config)
    terms = f"λ_w = {weight:g}, λ_d = {delta:g}, "
    if not delta:
        return terms + "matches the teachers' weights alone."
    probes = f"on {config.delta_probes} probes"
    if not weight:
        return (
            terms
            + f"matches the teachers' behaviour alone, {probes}; no teacher weight is looked at."
        )
    return terms + f"matches the teachers' weights and their behaviour {probes}."


def _sum_of_terms(config: TrainingConfig) -> str:
    """Return the loss as a list of its terms, with a warning where labels are used."""
    parts = [f"{term.name} = {weight:g} ({term.title})" for weight, term in config.objective.parts]
    text = f"the loss is {' + '.join(parts)}, on {config.delta_probes} probes."
    if "labels" in config.objective.matches:
        text += " **True labels are used: this is a reference.**"
    return text


def _changes(
    new: Mapping[str, Any], old: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for key, value in new.items():
        if isinstance(value, Mapping):
            found += _changes(value, old.get(key) or {}, f"{prefix}{key}.")
        elif value != old.get(key):
            found.append((f"{prefix}{key}", value, old.get(key)))
    return found


def log_datasets(client: MlflowClient, run_id: str, worlds: Sequence[World]) -> None:
    """Log the data of a run as MLflow inputs, one per part of each world, identified by hash.

    MLflow creates a data set on first sight. Two drivers that do so at once collide; the second attempt finds it there.
    Calling again changes nothing. Raises UserError if the store fails.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    inputs = [dataset for world in worlds for dataset in world_datasets(world)]
    with store_errors(client.tracking_uri):
        try:
            client.log_inputs(run_id, inputs)
        except (MlflowException, SQLAlchemyError) as error:
            if "datasets" not in str(error):
                raise
            client.log_inputs(run_id, inputs)


def world_datasets(world: World) -> list[DatasetInput]:
    """Return the three parts of a world as MLflow inputs."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    suite, data = world.config.suite, world.data
    source = {
        "world": world.config.hash,
        "base": world.base.hash,
        "bank": world.bank.hash,
        "data": data.hash,
    }
    found = []
    for part, role in ROLE_OF_PART.items():
        tasks = sorted({data.tasks[row] for row in data.rows[part]})
        profile = {
            "tasks": len(tasks),
            "teachers": len(data.rows[part]),
            "examples_per_task": data.n_examples,
        }
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

    MLflow's monitor samples from a thread every ten seconds; a reopened run continues its count. If the store fails,
    these figures are lost, not the trial.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(
        run_id,
        sampling_interval=SYSTEM_SECONDS,
        resume_logging=True,
        tracking_uri=with_login(tracking_uri),
    )
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def read_gates(tags: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the gates that the worlds of a study missed, in clauses by the label of the world."""
    return json.loads(tags.get(GATES_TAG, "{}"))


def describe_facts(world: World) -> str:
    """Return one line on a world: its split, and the accuracy of base and teachers."""
    facts, split = world.bank.facts, world.config.suite.split
    known = (
        "base_accuracy" in facts
        and f"base {facts['base_accuracy']:.3f}, teachers {facts['teacher_accuracy']:.3f}"
    )
    n_cut = world.bank.cut_answers
    cut = f"; {n_cut} answers of teachers are cut, and matched up to there" if n_cut else ""
    return (
        f"world {world.config.hash} ({world.config.size}): {len(split.train)} training, {len(split.val)} validation, "
        f"{len(split.test)} test tasks; accuracy of {known or 'teachers taken over is not known'}{cut}"
    )


def study_params(study: Study) -> dict[str, Any]:
    """Return the parameters of the parent run."""
    trials = "searched" if study.space else len(study.trials)
    return {"study": study.name, "metric": study.metric, "trials": trials}


def note_of(study: Study) -> str:
    """Return Markdown for the parent run's page."""
    if study.space:
        return f"**{study.name}**: {study.space.describe()}\n\nWhy: {study.note}"
    return study_note(study.name, study.trials, study.note)


def study_tags(study: Study, worlds: Mapping[str, World]) -> dict[str, str]:
    """Return lineage tags of the parent run."""
    return {
        "llgbm.bank": ",".join(world.bank.hash for world in worlds.values()),
        "llgbm.base": ",".join(world.base.hash for world in worlds.values()),
        GATES_TAG: json.dumps(
            {world.config.label: world.missed_gates for world in worlds.values()}
        ),
        **note_tags(note_of(study)),
    }
