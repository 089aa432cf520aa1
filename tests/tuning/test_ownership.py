"""Two drivers on one store: what one holds, the other leaves alone, until its process is gone."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from faults import Sweep

from llgbm.runtime import UserError
from llgbm.training import TrainingConfig
from llgbm.world import World, WorldConfig
from tuning.arguments import parse_arguments, study_of
from tuning.search.queue import ListQueue
from tuning.studies import Study
from tuning.studies.spec import TrialSpec
from tuning.sweep.checkpoints import TrialCheckpoints
from tuning.sweep.resume import begin_anew
from tuning.sweep.shared import SharedQueue
from tuning.tracking import ownership as own
from tuning.tracking.ownership import Driver, Liveness, Ownership, check_not_run, own_study, reap
from tuning.tracking.runs import read_trials
from tuning.tracking.study import StudyTracker
from tuning.tracking.trial import TrialTracker


def trial(seed: int) -> TrialSpec:
    return TrialSpec("multitask", TrainingConfig(seed=seed), WorldConfig())


def begun(study: StudyTracker, name: str) -> StudyTracker:
    """Another study in the same store."""
    tracker = StudyTracker(study.client, study.tracking_uri, study.experiment_id)
    tracker.begin(name, f"id of {name}", {}, {})
    return tracker


def owner(tracker: StudyTracker) -> Ownership:
    return Ownership(tracker.tracking_uri, tracker.experiment_id, tracker.parent_run_id)


def ran(tracker: StudyTracker, spec: TrialSpec, status: str = "") -> str:
    assert tracker.target is not None
    run = TrialTracker.open(tracker.target, spec.id, spec.name, {"seed": spec.config.seed}, {})
    run.log(1, {"val/accuracy": 0.5})
    run.close()
    if status:
        tracker.finish_trial(spec.id, status, run_id=run.run_id)
    return run.run_id


def _drive(uri: str, root: Path, name: str, held: threading.Event, end: threading.Event) -> None:
    tracker = StudyTracker.open(uri, root, "ablation")
    tracker.begin(name, f"id of {name}", {}, {})
    with own_study(tracker, f"id of {name}") as ownership:
        assert ownership.take(trial(0).id)
        ran(tracker, trial(0))
        held.set()
        end.wait(120)


@contextmanager
def driver_of(
    study: StudyTracker, root: Path, name: str
) -> Iterator[tuple[multiprocessing.process.BaseProcess, threading.Event]]:
    """A process that runs a study and holds trial 0, and what ends it."""
    context = multiprocessing.get_context("spawn")
    held, end = context.Event(), context.Event()
    process = context.Process(target=_drive, args=(study.tracking_uri, root, name, held, end))
    process.start()
    try:
        assert held.wait(120)
        yield process, end
    finally:
        process.kill()
        process.join()


def test_a_study_and_its_trials_belong_to_one_living_driver(
    study: StudyTracker, tmp_path: Path
) -> None:
    mine = owner(study)
    mine.claim("id")
    with driver_of(study, tmp_path, "other") as (process, _):
        with pytest.raises(UserError, match=f"id of other is being run by process {process.pid} "):
            check_not_run(study.tracking_uri, study.experiment_id, "id of other")
        same = begun(study, "other")
        with pytest.raises(UserError, match="is being run by"), own_study(same, "id of other"):
            pass
        assert not mine.take(trial(0).id) and mine.take(trial(1).id)
        assert reap(study.tracking_uri, study.experiment_id) == []
        process.kill()
        process.join()
        check_not_run(study.tracking_uri, study.experiment_id, "id of other")
        (dead,) = reap(study.tracking_uri, study.experiment_id)
        assert dead.info.run_id == same.parent_run_id
        (left,) = read_trials(study.tracking_uri, same.parent_run_id)
        assert left.status == study.client.get_run(dead.info.run_id).info.status == "KILLED"
        assert mine.take(trial(0).id)
    mine.close()
    assert not {
        key
        for key in study.client.get_run(study.parent_run_id).data.tags
        if key.startswith(("llgbm.driver", "llgbm.hold"))
    }


def test_two_that_take_one_trial_at_once_never_both_hold_it(study: StudyTracker) -> None:
    drivers = [owner(study), owner(begun(study, "second"))]
    for number, one in enumerate(drivers):
        one.claim(("id", "id of second")[number])
    both, start = threading.Barrier(2), []

    def take(one: Ownership, trial_id: str, found: list[bool]) -> None:
        both.wait()
        found.append(one.take(trial_id))

    for number in range(8):
        found: list[bool] = []
        threads = [
            threading.Thread(target=take, args=(one, f"t{number}", found)) for one in drivers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        start.append(sum(found))
    assert max(start) <= 1 and len(start) == 8
    for one in drivers:
        one.close()


def test_a_heartbeat_elsewhere_is_alive_until_it_stops() -> None:
    now = [0.0]
    live = Liveness(lambda: now[0])
    there = replace(Driver.of_this_process(), place="elsewhere", pid=1)
    assert live.is_alive(there)
    now[0] = 59.0
    assert live.is_alive(there)
    beaten = replace(there, beat=there.beat + 15)
    assert live.is_alive(beaten)
    now[0] = 118.0
    assert live.is_alive(beaten)
    now[0] = 120.0
    assert not live.is_alive(beaten)
    assert not Liveness().is_alive(replace(there, beat=time.time() - 3600))
    here = Driver.of_this_process()
    assert live.is_alive(replace(here, beat=0.0))
    assert not live.is_alive(replace(here, started=here.started - 60))


def test_a_driver_elsewhere_that_is_silent_loses_its_study(
    study: StudyTracker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = owner(study)
    first._driver = replace(first._driver, place="elsewhere")
    first.claim("id")
    assert first._stop is not None
    first._stop.set()
    monkeypatch.setattr(own, "SILENT_SECONDS", 2.0)
    second = owner(study)
    second.claim("id")
    assert "waiting up to 2 s" in capsys.readouterr().err
    assert second.take("t")
    second.close()


def test_a_queue_hands_out_what_others_hold_when_they_are_done(study: StudyTracker) -> None:
    other = owner(begun(study, "other"))
    other.claim("id of other")
    mine = owner(study)
    mine.claim("id")
    trials = [trial(seed) for seed in range(2)]
    assert other.take(trials[0].id)
    now = [0.0]
    queue = SharedQueue(ListQueue(trials, trials, 2), mine, lambda: now[0])
    assert queue.ask() == trials[1]
    assert queue.ask() is None and not queue.is_done()
    other.release(trials[0].id)
    now[0] = 10.0
    assert queue.ask() == trials[0] and queue.is_done()
    for one in (mine, other):
        one.close()


def test_a_fresh_start_leaves_other_studies_what_they_have(
    study: StudyTracker, tmp_path: Path
) -> None:
    """Trial 1 is another's finished one, trial 0 is being run by another process."""
    other = begun(study, "finished")
    old = ran(other, trial(1), "FINISHED")
    again = Study("again", (trial(0), trial(1)))
    for spec in again.trials:
        TrialCheckpoints(str(tmp_path), spec.id).write({"step": 3})
    with driver_of(study, tmp_path, "running"):
        study.supersede_study("id")
        mine = begun(study, "again")
        with own_study(mine, "id of again") as ownership:
            begin_anew(again.trials, mine, str(tmp_path), ownership)
            new = ran(mine, trial(1), "FINISHED")
        assert new != old
        (kept,) = read_trials(study.tracking_uri, other.parent_run_id)
        assert (kept.run_id, kept.is_complete) == (old, True)
        assert trial(0).id in mine.live_runs()
        newest = TrialCheckpoints(str(tmp_path), trial(0).id).newest()
        assert newest is not None and newest["step"] == 3
        assert TrialCheckpoints(str(tmp_path), trial(1).id).newest() is None


def together(tmp_path: Path, cache: Path, seeds: tuple[str, str]) -> list[Sweep]:
    """Two studies on one store that share trials, each with a folder of its own for their state."""
    what = (
        "--lambda-weight",
        "0.3",
        "--lambda-delta",
        "1",
        "--steps",
        "40",
        "--max-concurrent",
        "1",
    )
    uri = f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}"
    sweeps = []
    for number, chosen in enumerate(seeds):
        folder = tmp_path / f"driver{number}"
        folder.mkdir()
        sweep = Sweep(folder, cache, *what, "--seeds", *chosen.split())
        sweep.how += ["--tracking-uri", uri]
        sweeps.append(sweep)
    return sweeps


def check_together(tracker: StudyTracker, uri: str, wanted: dict[str, set[int]]) -> None:
    """One finished run a trial, one value a step, and each study has its trials."""
    runs = list(tracker.client.search_runs([tracker.experiment_id]))
    trials = [run for run in runs if "llgbm.trial_id" in run.data.tags]
    assert len({run.data.tags["llgbm.trial_id"] for run in trials}) == len(trials)
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in trials:
        steps = [m.step for m in tracker.client.get_metric_history(run.info.run_id, "loss/total")]
        assert steps == list(range(1, 41))
    for parent in tracker.studies():
        found = read_trials(uri, parent.info.run_id)
        assert {one.seed for one in found} == wanted[parent.data.tags["llgbm.study_id"]]
        assert all(one.is_complete for one in found)


@pytest.mark.whole
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("interrupted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_studies_share_a_trial_and_none_ends_the_others(
    interrupted: bool, tmp_path: Path, cache: Path, world: World
) -> None:
    """Real Ray and one real store: both start at once; one may be interrupted and gone on with."""
    seeds = ("0 1", "1 2")
    sweeps = together(tmp_path, cache, seeds)
    wanted = {
        study_of(parse_arguments(sweep.what)).id: {int(seed) for seed in chosen.split()}
        for sweep, chosen in zip(sweeps, seeds, strict=True)
    }
    processes = [sweep.start() for sweep in sweeps]
    if interrupted:
        sweeps[0].wait_for_checkpoint()
        processes[0].send_signal(signal.SIGTERM)
        assert processes[0].wait(120) == 130, sweeps[0].log()
        assert processes[1].poll() is None, sweeps[1].log()
        processes[0] = sweeps[0].start()
    for sweep, process in zip(sweeps, processes, strict=True):
        assert process.wait(1200) == 0, sweep.log()
    tracker = StudyTracker.open(f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}", tmp_path, "llgbm")
    check_together(tracker, tracker.tracking_uri, wanted)
