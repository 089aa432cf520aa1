"""`python -m tuning.runs`: what killed drivers left is marked, and a trial is run again, bit for bit."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llgbm.training import TrainingConfig
from llgbm.world import World, WorldConfig
from tuning.report.__main__ import main as report
from tuning.runs import main
from tuning.studies.spec import TrialSpec
from tuning.sweep import worker
from tuning.sweep.checkpoints import TrialCheckpoints
from tuning.sweep.rerun import Recorder
from tuning.sweep.worker import OOM_TAG, Outputs, run_in_memory, savers
from tuning.tracking.ownership import DRIVER_TAG, Driver
from tuning.tracking.study import StudyTracker
from tuning.tracking.trial import TrialTracker


def dead_study(study: StudyTracker, name: str) -> str:
    """A study whose driver is gone, with one finished and one running trial; return its run id."""
    study.begin(name, f"id-{name}", {"trials": 9}, {})
    assert study.target is not None
    for number in range(2):
        TrialTracker.open(study.target, f"{name}{number}", "one", {"seed": number}, {})
    study.finish_trial(f"{name}0", "FINISHED")
    driver = Driver.of_this_process()
    gone = {"place": driver.place, "host": driver.host, "pid": driver.pid}
    content = json.dumps({**gone, "started": 1.0, "beat": 1000.0})
    study.set_tags({DRIVER_TAG + "dead": content})
    return study.parent_run_id


def status(study: StudyTracker, run_id: str) -> str:
    return str(study.client.get_run(run_id).info.status)


def test_dead_runs_are_reaped_by_the_command_and_by_any_other(
    study: StudyTracker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    study.finish("FINISHED")
    first = dead_study(study, "first")
    assert main(["reap"]) == 0
    assert json.loads(capsys.readouterr().out) == {"killed": ["id-first"]}
    assert status(study, first) == "KILLED"
    ends = {key: run.info.status for key, run in study.live_runs().items()}
    assert ends == {"first0": "FINISHED", "first1": "KILLED"}
    second = dead_study(study, "second")
    assert report(["id-second"]) == 0
    assert status(study, second) == "KILLED"
    assert "1 of 9 trials, study killed" in capsys.readouterr().out


def test_the_environment_names_the_store_and_the_experiment(
    study: StudyTracker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tuning.arguments import parse_arguments

    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", study.tracking_uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ablation")
    stores = parse_arguments([]).stores
    assert (stores.tracking_uri, stores.experiment) == (study.tracking_uri, "ablation")
    given = parse_arguments(["--experiment", "mine"]).stores
    assert (given.tracking_uri, given.experiment) == (study.tracking_uri, "mine")
    assert main(["reap"]) == 0
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "elsewhere")
    assert main(["export", "latest", "--out", str(tmp_path / "x.zip")]) == 2
    assert "no experiment 'elsewhere'" in capsys.readouterr().err


@pytest.mark.whole
def test_a_trial_is_run_again_bit_for_bit(
    finished: tuple[Path, str],
    cache: Path,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(finished[0] / "mlruns", tmp_path / "mlruns")
    monkeypatch.chdir(tmp_path)
    tracker = StudyTracker.open(None, tmp_path, "llgbm")
    (trial_id,) = [
        key for key, run in tracker.live_runs().items() if run.info.run_name.startswith("multitask")
    ]
    threads = torch.get_num_threads()
    try:
        assert main(["rerun", trial_id, "--cache", str(cache)]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["different"] == 0 and answer["same"] > 60
        run_id = answer["run"]
        with closing(sqlite3.connect(tmp_path / "mlruns" / "mlflow.db")) as database, database:
            database.execute(
                "UPDATE metrics SET value = value + 1e-9 "
                "WHERE run_uuid = ? AND key = 'loss/total' AND step = 3",
                (run_id,),
            )
        assert main(["rerun", trial_id, "--cache", str(cache)]) == 1
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr()
    assert json.loads(printed.out)["different"] == 1
    assert "loss/total at step 3: " in printed.err
    assert main(["rerun", "unknown", "--cache", str(cache)]) == 2
    assert "no finished run of trial 'unknown'" in capsys.readouterr().err


class Tagged(Recorder):
    """A recorder that keeps tags, too."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: dict[str, str] = {}

    def set_tag(self, key: str, value: str) -> None:
        self.tags[key] = value


def test_memory_savers_get_stronger_and_are_used_only_if_asked_for() -> None:
    config = TrainingConfig(n_probes=8)
    forms = [(c.activation_checkpointing, c.probe_chunk) for c in savers(config, retry_oom=True)]
    assert forms == [(False, 0), (True, 0), (True, 4), (True, 2), (True, 1)]
    assert list(savers(config, retry_oom=False)) == [config]
    weights = replace(config, lambda_delta=0.0)
    assert list(savers(weights, retry_oom=True)) == [weights]
    small = replace(config, activation_checkpointing=True, probe_chunk=2)
    assert [c.probe_chunk for c in savers(small, retry_oom=True)] == [2, 1]


@pytest.mark.whole
def test_a_trial_out_of_memory_is_tried_again_with_the_same_numbers(
    world: World, config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory ends within a step of the real training, until one probe is read at a time."""
    trial = TrialSpec("one", replace(config, steps=4, eval_every=2), WorldConfig())

    def run(name: str, retry_oom: bool) -> Tagged:
        log = Tagged()
        outputs = Outputs(log, TrialCheckpoints(str(tmp_path / name), trial.id))
        run_in_memory(trial, world, outputs, retry_oom)
        return log

    whole = run("whole", False)
    train = worker.Trial.compute_loss

    def short_of_memory(self: Any, batch: Any) -> Any:
        if self.config.probe_chunk != 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train(self, batch)

    monkeypatch.setattr(worker.Trial, "compute_loss", short_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        run("refused", False)
    saved = run("saved", True)
    assert saved.tags == {OOM_TAG: "activation checkpointing"} and not whole.tags
    assert saved.points.keys() == whole.points.keys()
    for key, value in whole.points.items():
        assert float(saved.points[key]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), key
