"""Several worlds in one study, worlds that missed a gate, levels of novelty, and sealed tasks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from llgbm.runtime import UserError
from llgbm.tasks.synthetic import SyntheticSuite
from llgbm.teachers.bank import BankSource
from llgbm.world import World, WorldConfig
from tuning.report import StudyRecord, summary
from tuning.report.__main__ import main as report
from tuning.report.groups import compare, group_trials
from tuning.report.record import OPENED_TAG, collect_baselines, read_study
from tuning.report.sealed import open_sealed
from tuning.report.tables import novelty_table, sealed_table
from tuning.report.words import headlines
from tuning.studies.builtin import StudyOptions, phase_4_5, worlds
from tuning.studies.spec import Study
from tuning.tracking.runs import TrialResult, find_study
from tuning.tracking.store import connect, local_tracking_uri

# Accuracy by configuration, world and seed: worlds move it more than seeds.
VALUES = {
    "delta-only": [[0.80, 0.82, 0.78], [0.60, 0.61, 0.59], [0.70, 0.72, 0.71]],
    "weight-only": [[0.50, 0.52, 0.48], [0.42, 0.40, 0.41], [0.44, 0.45, 0.43]],
}


def trials(**more: float) -> list[TrialResult]:
    found = []
    for config, by_world in VALUES.items():
        for world, seeds in enumerate(by_world):
            for seed, accuracy in enumerate(seeds):
                params = {"model_size": "nano", "world_seed": str(world)}
                key = f"{config}{world}{seed}"
                metrics = {"heldout/accuracy": accuracy, "val/accuracy": accuracy, **more}
                found.append(TrialResult(key, config, seed, "FINISHED", metrics, {}, params, key))
    return found


def test_worlds_count_as_what_is_drawn_and_seeds_within_them_do_not() -> None:
    groups = {group.config: group for group in group_trials(trials())}
    cell = groups["delta-only"].cell("heldout/accuracy")
    means = [float(np.mean(seeds)) for seeds in VALUES["delta-only"]]
    assert cell is not None and (cell.n, cell.unit) == (3, "world")
    assert cell.mean == pytest.approx(np.mean(means)) and cell.sd == pytest.approx(
        np.std(means, ddof=1)
    )
    (comparison,) = compare(list(groups.values()))
    differences = np.array(VALUES["delta-only"]).mean(1) - np.array(VALUES["weight-only"]).mean(1)
    assert comparison.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    assert (comparison.n, comparison.unit, comparison.tasks) == (3, "world", 0)
    said = headlines(StudyRecord("worlds", tuple(trials()), {}))[0]
    assert "mean ± sd over 3 worlds" in said and "seeds" not in said


def test_one_world_is_told_by_its_seeds_whatever_its_own_seed() -> None:
    own = [trial for trial in trials() if trial.params["world_seed"] == "2"]
    cell = group_trials(own)[0].cell("heldout/accuracy")
    assert cell is not None and (cell.n, cell.unit) == (3, "seed")


def test_baselines_of_several_worlds_are_averaged() -> None:
    metrics = {
        "baseline/teacher_nano/accuracy": 0.98,
        "baseline/teacher_nano world 1/accuracy": 0.90,
        "baseline/ridge_nano world 1/accuracy": 0.40,
    }
    found = collect_baselines(metrics, ["nano", "nano world 1"])
    assert found == {"teacher": {"accuracy": pytest.approx(0.94)}, "ridge": {"accuracy": 0.40}}


def test_a_world_below_its_gate_is_the_first_thing_said() -> None:
    missed = {"nano": [], "nano world 1": ["3 of 157 teachers stayed below 0.97"]}
    record = StudyRecord("worlds", tuple(trials()), {}, gates=missed)
    first = summary(record).splitlines()[0]
    assert first.startswith("**The world nano world 1 missed its gate")
    assert "3 of 157 teachers stayed below 0.97" in first
    whole = replace(record, gates={"nano": [], "nano world 1": []})
    assert "gate" not in summary(whole)


def test_a_world_says_which_gates_it_missed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert world.ability is not None and not world.missed_gates
    task, share = world.ability.worst
    asked_more = replace(world.config.pretrain, target=1.0)
    strict = replace(world, config=replace(world.config, pretrain=asked_more))
    assert strict.missed_gates == [f"the base, told {task}, is right in {share:.2f}, below 1"]
    facts = {**world.bank.facts, "teachers_below_target": 3.0}
    monkeypatch.setattr(type(world.bank), "facts", facts)
    of = f"3 of {len(world.bank.adapters)} teachers"
    assert world.missed_gates == [f"{of} stayed below 0"]


def test_levels_stand_apart_from_recombination() -> None:
    table = novelty_table(group_trials(trials(**{"novelty/unseen_format": 0.25})))
    assert "recombination" in table and "unseen format" in table and "0.250" in table
    assert novelty_table(group_trials(trials())) == sealed_table(group_trials(trials())) == ""


def test_the_study_of_worlds_crosses_them_with_seeds_and_configurations() -> None:
    study = worlds(StudyOptions(world_seeds=(0, 4), seeds=(0, 1)))
    assert len(study.trials) == 2 * 3 * 2 and len(study.worlds) == 2
    first, second = study.worlds
    assert first == WorldConfig() and second.seed == 4
    assert second.pretrain.seed == second.teachers.seed == 4
    assert isinstance(second.suite, SyntheticSuite) and second.suite.split_seed == 4
    assert len({world.hash for world in study.worlds}) == 2
    assert "world 4" in study.trials[-1].label and "world" not in study.trials[0].label
    shared = {trial.id for trial in phase_4_5(StudyOptions(seeds=(0, 1))).trials}
    assert shared <= {trial.id for trial in study.trials}


def test_a_world_of_given_teachers_has_no_seed() -> None:
    given = WorldConfig(bank=BankSource("bank", "hash"))
    with pytest.raises(UserError, match="leave --world-seed or --bank out"):
        given.with_seed(1)


@pytest.mark.whole
def test_sealed_tasks_are_opened_once_and_that_is_recorded(
    finished: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A copy: other tests hold their own sweeps against the numbers of this one.
    folder = tmp_path / "opened"
    shutil.copytree(finished[0], folder, symlinks=True)
    monkeypatch.chdir(folder)
    uri = local_tracking_uri(folder)
    parent = find_study(uri, "latest", None)
    before = read_study(uri, parent.info.run_id)
    assert not before.openings and not any("sealed" in m for t in before.trials for m in t.metrics)

    assert report(["latest", "--open-sealed", "--out", "opened", "--debug"]) == 0
    after = read_study(uri, parent.info.run_id)
    for trial in after.trials:
        assert {"sealed/operation", "sealed/format", "sealed/accuracy"} <= trial.metrics.keys()
    (opening,) = json.loads(connect(uri).get_run(parent.info.run_id).data.tags[OPENED_TAG])
    assert set(opening["trials"]) == {trial.trial_id for trial in after.trials}
    assert opening["by"] and opening["at"]
    text = (folder / "opened" / "report.md").read_text()
    assert (
        "## Sealed tasks" in text
        and f"Opened for {len(after.trials)} trials by {opening['by']}" in text
    )

    assert report(["latest", "--open-sealed", "--out", "opened", "--debug"]) == 0
    assert "0 trials measured now" in capsys.readouterr().err
    assert read_study(uri, parent.info.run_id).openings == after.openings


@pytest.mark.whole
def test_a_suite_without_sealed_tasks_has_nothing_to_open(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    uri = local_tracking_uri(folder)
    suite = SyntheticSuite(5, 4, n_val=2, n_test=4, n_sealed=0, n_unseen=0)
    (trial, *_) = phase_4_5(StudyOptions(seeds=(0,))).trials
    study = Study("closed", (replace(trial, world=WorldConfig(suite=suite)),))
    with pytest.raises(UserError, match="nothing to open"):
        open_sealed(uri, find_study(uri, "latest", None), study, folder / ".llgbm")
