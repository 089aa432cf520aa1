"""What a run says beside its metrics, in a real store: notes, data sets, the machine, adapters by policy."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llgbm.commands.show import show
from llgbm.evaluation.metrics import evaluate_generator
from llgbm.generator import make_generator
from llgbm.generator.bundle import GeneratorBundle
from llgbm.generator.networks import Standardiser
from llgbm.lora.adapters import load_adapter
from llgbm.system.lineage import prompts_facts
from llgbm.teachers.bank import Bank
from llgbm.training import TrainingConfig
from llgbm.world import World
from tuning.studies import StudyOptions, TrialSpec, phase_4_5
from tuning.studies.spec import TRAINING
from tuning.sweep.artifacts import (
    best_trials,
    bundle_facts,
    keep_best_adapters,
    write_trial_adapters,
)
from tuning.tracking import notes as run_notes
from tuning.tracking.runs import TrialResult, read_trials
from tuning.tracking.study import StudyTracker
from tuning.tracking.trial import TrialTracker


def open_trial(study: StudyTracker, trial_id: str = "t1", **tags: str) -> TrialTracker:
    assert study.target is not None
    return TrialTracker.open(
        study.target, trial_id, "multitask", {"seed": 0, "model_size": "nano"}, tags
    )


def test_a_note_says_what_is_changed_and_why() -> None:
    trials = phase_4_5(StudyOptions(steps=50)).trials
    notes = {
        trial.name: run_notes.trial_note(trial, "because")
        for trial in trials
        if trial.config.seed == 0
    }
    assert "λ_w = 1, λ_d = 0" in notes["weight-only"] and "weights alone" in notes["weight-only"]
    assert "* `lambda_delta`: 0.0 (default 1.0)" in notes["weight-only"]
    assert "no teacher weight is looked at" in notes["delta-only"]
    assert all(
        "Why: because" in note and "* `steps`: 50 (default 400)" in note for note in notes.values()
    )
    assert "seed" not in notes["multitask"].split("Changed")[1]
    plain = TrialSpec("plain", TRAINING, trials[0].world)
    assert "All settings are the default training's." in run_notes.trial_note(plain)
    other = replace(
        plain, config=replace(plain.config, generator=replace(plain.config.generator, hidden=8))
    )
    assert "* `generator.hidden`: 8 (default 320)" in run_notes.trial_note(other)


def test_the_note_is_where_mlflow_shows_it_and_fits(study: StudyTracker) -> None:
    trial = open_trial(study, **run_notes.note_tags("ä" * 9000))
    note = study.client.get_run(trial.run_id).data.tags["mlflow.note.content"]
    assert len(note) == 8000 and note.endswith("ä…")


def test_a_studys_note_counts_trials_seeds_and_configurations() -> None:
    study = phase_4_5(StudyOptions(seeds=(3, 1)))
    note = run_notes.study_note(study.name, study.trials, "Does it help?")
    assert (
        "6 trials over seeds 1, 3" in note
        and "24 held-out tasks" in note
        and "Why: Does it help?" in note
    )
    assert [line for line in note.splitlines() if line.startswith("*")][1:] == [
        "* multitask",
        "* delta-only",
        "* weight-only",
    ]


def test_the_data_of_a_run_are_named_by_hash_once(study: StudyTracker, world: World) -> None:
    for _ in range(2):
        run_notes.log_datasets(study.client, study.parent_run_id, [world])
    inputs = study.client.get_run(study.parent_run_id).inputs.dataset_inputs
    roles = {one.tags[0].value: one.dataset for one in inputs}
    assert len(inputs) == 3 and set(roles) == {"training", "validation", "evaluation"}
    for part, role in run_notes.ROLE_OF_PART.items():
        tasks = json.loads(roles[role].schema)["tasks"]
        assert sorted(tasks) == sorted(getattr(world.config.suite.split, part))
        assert (
            json.loads(roles[role].source)["bank"] == world.bank.hash
            and roles[role].digest == world.data.hash
        )


def test_the_machine_is_watched_while_a_trial_runs_and_a_resumed_run_goes_on(
    study: StudyTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_notes, "SYSTEM_SECONDS", 0.2)
    trial = open_trial(study)
    key = "system/cpu_utilization_percentage"
    counts = [0]
    for _ in range(2):
        with run_notes.system_metrics(study.tracking_uri, trial.run_id):
            while len(study.client.get_metric_history(trial.run_id, key)) < counts[-1] + 2:
                time.sleep(0.1)
        counts.append(len(study.client.get_metric_history(trial.run_id, key)))
    steps = [metric.step for metric in study.client.get_metric_history(trial.run_id, key)]
    assert steps == list(range(counts[-1]))
    assert "system/system_memory_usage_megabytes" in study.client.get_run(trial.run_id).data.metrics


def test_a_store_that_is_gone_costs_no_trial(study: StudyTracker, tmp_path: Path) -> None:
    trial = open_trial(study)
    with (
        run_notes.system_metrics(f"sqlite:///{tmp_path}/mlruns/mlflow.db", "0" * 32),
        pytest.raises(KeyError),
    ):
        raise KeyError(trial.run_id)


def result(
    name: str, size: str, value: float | None, status: str = "FINISHED", **more: object
) -> TrialResult:
    metrics = {} if value is None else {"val/accuracy": value}
    given: dict = {"curves": {}, "params": {"model_size": size}, "run_id": f"run-{name}", **more}
    return TrialResult(name, name, 0, status, metrics, **given)


def test_the_best_are_the_best_of_each_size_among_the_whole() -> None:
    results = [
        result("a", "nano", 0.1),
        result("b", "nano", 0.3),
        result("c", "nano", 0.2),
        result("d", "nano", 0.9, "FAILED"),
        result("e", "nano", None),
        result("f", "nano", 0.9, stopped_at=100),
        result("g", "micro", 0.0),
    ]
    assert [r.trial_id for r in best_trials(results, "val/accuracy", 2)] == [
        "b",
        "c",
        "g",
    ]


def files_below(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


@pytest.mark.whole
def test_adapters_of_the_best_are_made_again_from_the_generator_that_a_trial_kept(
    study: StudyTracker, world: World, tmp_path: Path
) -> None:
    spec = TrialSpec("multitask", TrainingConfig(), world.config)
    width = world.data.conditions.train_ANC.shape[-1]
    standardiser = Standardiser.fit(world.data.values_AV)
    generator = make_generator(spec.config.generator, world.bank.spec, width, standardiser, seed=0)
    (tmp_path / "kept" / "generator").mkdir(parents=True)
    GeneratorBundle.save(
        tmp_path / "kept" / "generator", generator, spec.config.generator, bundle_facts(spec, world)
    )
    trial = open_trial(study)
    trial.log_artifacts(tmp_path / "kept", "")
    (found,) = read_trials(study.tracking_uri, study.parent_run_id)
    for _ in range(2):
        keep_best_adapters(study.client, {"t1": world}, [found])
    results = {
        part: evaluate_generator(generator, world.data, world.lora_model, part)
        for part in ("val", "test")
    }
    write_trial_adapters(tmp_path / "kept", world, results)
    saved = Path(study.client.download_artifacts(trial.run_id, "adapters", str(tmp_path)))
    own = files_below(tmp_path / "kept" / "adapters")
    assert own == files_below(saved) and len(own) == 3 * sum(
        len(world.data.rows[part]) for part in ("val", "test")
    )
    for folder in {path.parent for path in own}:
        states = [
            load_adapter(root / folder, world.bank.spec)
            for root in (saved, tmp_path / "kept/adapters")
        ]
        assert all(states[0][key].equal(states[1][key]) for key in states[1])
        for root in (saved, tmp_path / "kept/adapters"):
            check_says_what_it_is(root / folder, world, spec, tmp_path / "kept" / "generator")


def check_says_what_it_is(folder: Path, world: World, spec: TrialSpec, generator: Path) -> None:
    """`show` reads lineage and base back from an adapter that a trial kept, and verifies both."""
    found = show(argparse.Namespace(adapter=folder, base=world.base.path, json=True))
    assert found["files"] == "weights and config are those that the lineage names"
    assert found["base_files"].endswith("are the ones that the adapter was made for")
    bundle, row = GeneratorBundle.load(generator), world.data.tasks.index(folder.name)
    prompts = world.bank.prompts(world.data.adapter_ids[row])["evaluation"]
    told = found["lineage"]
    assert told["prompts"] == prompts_facts(prompts)
    assert told["generator"]["hash"] == bundle.facts["generator_hash"]
    assert told["generator"]["trial_id"] == spec.id
    assert (folder / "README.md").read_text().startswith("---\n")
    # From these prompts the generator that was kept writes the same again.
    for key, values in load_adapter(folder, world.bank.spec).items():
        torch.testing.assert_close(bundle.generate(prompts)[key], values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [0, 5])
def test_answers_that_are_cut_are_said_of_a_world(world: World, tmp_path: Path, count: int) -> None:
    folder = Path(shutil.copytree(world.bank.folder, tmp_path / "bank"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["measured"]["cut_answers"] = count
    (folder / "manifest.json").write_text(json.dumps(manifest))
    own = replace(world, bank=Bank.cached(folder, world.bank.spec))
    said = run_notes.describe_facts(own)
    assert ("5 answers of teachers are cut" in said) == bool(count) and "cut" not in said[:60]
