"""Which trials are run: what finished counts wherever it ran, what is resumed is what was begun."""

from __future__ import annotations

import multiprocessing
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llgbm.runtime import UserError
from llgbm.training import TrainingConfig
from llgbm.world import WorldConfig
from tuning.arguments import parse_arguments
from tuning.run_ablation import main
from tuning.studies import Study, StudyOptions
from tuning.studies import spec as space
from tuning.studies.from_file import make_study
from tuning.studies.spec import TrialSpec
from tuning.sweep.asha import scheduler_key
from tuning.sweep.checkpoints import (
    KEPT,
    TrialCheckpoints,
    join,
    open_storage,
    trial_lock,
)
from tuning.sweep.resume import (
    ARGUMENTS_TAG,
    adopt_finished,
    begin_anew,
    check_same_study,
    recorded_options,
    trials_to_run,
)
from tuning.tracking.ownership import own_study
from tuning.tracking.runs import SCHEDULER_TAG, STOPPED_BY_TAG, STOPPED_TAG, read_trials
from tuning.tracking.study import StudyTracker
from tuning.tracking.trial import TrialTracker, finished_result

SMOKE = make_study("phase_4_5", StudyOptions(smoke=True, seeds=(0,)))


def trial(seed: int, name: str = "multitask") -> TrialSpec:
    return TrialSpec(name, TrainingConfig(seed=seed), WorldConfig())


@pytest.fixture
def root(tmp_path: Path, empty_store: Path) -> Path:
    """A folder with a store that holds nothing."""
    shutil.copytree(empty_store, tmp_path / "mlruns")
    return tmp_path


def begun(root: Path, study: Study, arguments: str = "{}") -> StudyTracker:
    tracker = StudyTracker.open(None, root, "ablation")
    tracker.begin(study.name, study.id, {}, {ARGUMENTS_TAG: arguments})
    return tracker


def ran(tracker: StudyTracker, spec: TrialSpec, status: str) -> str:
    assert tracker.target is not None
    run = TrialTracker.open(tracker.target, spec.id, spec.name, {"seed": spec.config.seed}, {})
    run.log(1, {"val/accuracy": 0.5})
    run.close()
    tracker.finish_trial(spec.id, status)
    return run.run_id


def test_only_what_did_not_finish_is_run_again(root: Path) -> None:
    study = Study("study", tuple(trial(seed) for seed in range(4)))
    tracker = begun(root, study)
    for spec, status in zip(study.trials, ("FINISHED", "FAILED", "KILLED"), strict=False):
        ran(tracker, spec, status)
    runs = tracker.live_runs()

    def seeds(resume: bool, retry_failed: bool) -> list[int]:
        return [t.config.seed for t in trials_to_run(study.trials, runs, resume, retry_failed)]

    assert seeds(resume=False, retry_failed=False) == [1, 2, 3]
    assert seeds(resume=True, retry_failed=False) == [2, 3]
    assert seeds(resume=True, retry_failed=True) == seeds(resume=False, retry_failed=True) == [1]


def test_a_trial_that_another_study_finished_counts_under_the_name_it_has_here(root: Path) -> None:
    first = begun(root, Study("first", (trial(0),)))
    run_id = ran(first, trial(0), "FINISHED")
    second = Study("second", (trial(0, "here"), trial(1, "here")))
    tracker = begun(root, second)
    assert [t.config.seed for t in adopt_finished(second.trials, tracker.live_runs(), tracker)] == [
        0
    ]
    ran(tracker, second.trials[1], "FINISHED")
    found = {
        t.seed: (t.config, t.status)
        for t in read_trials(tracker.tracking_uri, tracker.parent_run_id)
    }
    assert found == {0: ("here", "FINISHED"), 1: ("here", "FINISHED")}
    (own,) = read_trials(first.tracking_uri, first.parent_run_id)
    assert (own.run_id, own.config) == (run_id, "multitask")
    assert tracker.target is not None
    found_there = finished_result(tracker.target, trial(0).id)
    assert found_there is not None and found_there.metrics == {"val/accuracy": 0.5}
    assert finished_result(tracker.target, "unknown") is None


def test_an_unfinished_trial_moves_to_the_study_that_goes_on_with_it(root: Path) -> None:
    run_id = ran(begun(root, Study("first", (trial(0),))), trial(0), "KILLED")
    tracker = begun(root, Study("second", (trial(0), trial(1))))
    assert ran(tracker, trial(0), "FINISHED") == run_id
    (moved,) = read_trials(tracker.tracking_uri, tracker.parent_run_id)
    assert moved.curves["val/accuracy"] == [(1, 0.5)]


def test_a_fresh_start_takes_new_runs_and_forgets_checkpoints(root: Path) -> None:
    study = Study("study", (trial(0),))
    tracker = begun(root, study)
    old, parent = ran(tracker, trial(0), "FINISHED"), tracker.parent_run_id
    checkpoints = TrialCheckpoints(str(root), trial(0).id)
    checkpoints.write({"step": 3})
    tracker.supersede_study(study.id)
    assert not tracker.live_runs()
    tracker = begun(root, study)
    with own_study(tracker, study.id) as ownership:
        begin_anew(study.trials, tracker, str(root), ownership)
    assert checkpoints.newest() is None
    assert tracker.parent_run_id != parent and ran(tracker, trial(0), "FINISHED") != old
    assert [run.info.run_id for run in tracker.studies()] == [tracker.parent_run_id]


ASHA = scheduler_key("asha", Study("study", (trial(0),)))


def test_a_stopped_trial_is_done_for_studies_under_that_scheduler_alone(root: Path) -> None:
    study = Study("study", (trial(0),))
    tracker = begun(root, study)
    assert tracker.target is not None
    tracker.set_tags({SCHEDULER_TAG: ASHA})
    ran(tracker, trial(0), "FINISHED")
    stop = {STOPPED_TAG: "40", STOPPED_BY_TAG: ASHA}
    tracker.finish_trial(trial(0).id, "FINISHED", stop)
    other = scheduler_key("asha", replace(study, metric="val/delta_cosine"))

    def left(scheduler: str) -> bool:
        return bool(trials_to_run([trial(0)], tracker.live_runs(), True, False, scheduler))

    def in_study(study: StudyTracker) -> tuple[str, int | None]:
        (result,) = read_trials(study.tracking_uri, study.parent_run_id)
        return result.status, result.stopped_at

    assert (left(ASHA), left(other), left("none")) == (False, True, True)
    assert finished_result(tracker.target, trial(0).id, ASHA) is not None
    assert finished_result(tracker.target, trial(0).id) is None
    # Another study goes on with it, and is killed: the first one has it as it was.
    second = begun(root, Study("second", (trial(0), trial(1))))
    adopted = adopt_finished([trial(0)], tracker.live_runs(), tracker, ASHA)
    assert not adopted and in_study(tracker) == ("FINISHED", 40)
    ran(second, trial(0), "KILLED")
    assert (in_study(tracker), in_study(second)) == (("FINISHED", 40), ("KILLED", None))
    assert not left(ASHA) and left("none")
    # At its end it is whole for both.
    ran(second, trial(0), "FINISHED")
    assert in_study(tracker) == in_study(second) == ("FINISHED", None)
    assert not left(ASHA) and not left("none")


def test_a_study_is_found_and_made_again_from_what_it_recorded(root: Path) -> None:
    tracker = begun(root, SMOKE, '{"smoke": true, "seeds": [0]}')
    begun(root, Study("later", (trial(0),)))
    given = parse_arguments(["--resume", SMOKE.id, "--max-concurrent", "1"])
    options, recorded = recorded_options(given, tracker)
    assert (options.study.smoke, options.study.seeds) == (True, (0,))
    assert options.run.max_concurrent == 1
    assert recorded == SMOKE.id
    assert tracker.find_study("latest").info.run_name == "later"
    with pytest.raises(
        UserError, match=f"no study 'x': it has .* \\(later\\), {SMOKE.id} \\(phase_4_5\\)"
    ):
        tracker.find_study("x")


def test_changed_code_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = SMOKE.id
    check_same_study(SMOKE, before)
    monkeypatch.setattr(space, "TRAINING_VERSION", 99)
    with pytest.raises(UserError, match=f"study {before} cannot be resumed.*changed with the code"):
        check_same_study(SMOKE, before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume", "latest"], ["no study 'latest'", "none at all"]),
        (["--resume", "latest", "--seeds", "1"], ["leave --seeds out"]),
        (["--resume", "latest", "--fresh"], ["--fresh", "leave out --resume"]),
        (["--retry-failed", "--fresh"], ["--fresh"]),
        (["--address", "127.0.0.1:9"], ["no Ray cluster answers at 127.0.0.1:9"]),
        (["--address", "somewhere"], ["'somewhere'", "host:port"]),
        (["--storage-path", "magic://x"], ["'magic://x'", "s3://"]),
    ],
)
def test_what_cannot_be_gone_on_with_is_one_sentence(
    arguments: list[str],
    words: list[str],
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(root)
    assert main(arguments) == 2
    last = [line for line in capsys.readouterr().err.splitlines() if line.strip()][-1]
    assert last.startswith("error: ") and all(word in last for word in words)


@pytest.mark.parametrize("kind", ["folder", "uri"])
def test_checkpoints_come_back_and_a_torn_one_is_passed_over(tmp_path: Path, kind: str) -> None:
    checkpoints = TrialCheckpoints(str(tmp_path) if kind == "folder" else tmp_path.as_uri(), "t")
    assert checkpoints.newest() is None and checkpoints.newest_name() == "start"
    for step in (5, 10, 100):
        checkpoints.write(
            {
                "step": step,
                "best_score": float("-inf"),
                "generator": {"w": torch.full((3,), float(step))},
            }
        )
    names = sorted(path.name for path in (tmp_path / "t").iterdir())
    assert names == ["step_00000010.pt", "step_00000100.pt"] and len(names) == KEPT
    state = checkpoints.newest()
    assert (
        state is not None
        and state["step"] == 100
        and state["generator"]["w"].tolist() == [100.0] * 3
    )
    last = tmp_path / "t" / names[-1]
    for torn in (
        last.read_bytes()[:-1],
        b"",
        last.read_bytes()[:40] + b"x" + last.read_bytes()[41:],
    ):
        last.write_bytes(torn)
        state = checkpoints.newest()
        assert state is not None and state["step"] == 10
    (tmp_path / "t" / "step_00000200.pt.writing").write_bytes(b"half")
    assert checkpoints.newest_name() == "step_00000100.pt"
    checkpoints.remove()
    checkpoints.remove()
    assert checkpoints.newest() is None


def _hold(
    storage: str,
    held: multiprocessing.synchronize.Event,
    release: multiprocessing.synchronize.Event,
) -> None:
    with trial_lock(storage, "t"):
        held.set()
        release.wait(60)


def test_two_processes_never_hold_one_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path), held, release))
    other.start()
    assert held.wait(60)
    monkeypatch.setattr("tuning.sweep.checkpoints.LOCK_SECONDS", 0.1)
    with pytest.raises(UserError, match="trial t is being run"), trial_lock(str(tmp_path), "t"):
        pass
    other.kill()
    other.join()
    with trial_lock(str(tmp_path), "t"):
        pass


_HALF_MADE = """
import os, sys
from pathlib import Path
from tuning.tracking.study import StudyTracker
os.replace = lambda *names: os._exit(9)
StudyTracker.open(None, Path(sys.argv[1]), "ablation")
"""


@pytest.mark.whole
def test_a_driver_that_dies_while_it_makes_the_store_spoils_nothing(tmp_path: Path) -> None:
    assert (
        subprocess.run(
            [sys.executable, "-c", _HALF_MADE, str(tmp_path)], capture_output=True
        ).returncode
        == 9
    )
    assert not begun(tmp_path, Study("study", (trial(0),))).live_runs()
    assert not list((tmp_path / "mlruns").glob("*.making"))


def test_an_unknown_kind_of_store_is_refused() -> None:
    with pytest.raises(UserError, match="magic"):
        open_storage("magic://x")


def test_the_settings_of_an_object_store_stay_at_the_end_of_its_address() -> None:
    assert join("/a/what?/", "ray/x") == "/a/what?/ray/x"
    assert join("s3://bucket/folder", "ray/x") == "s3://bucket/folder/ray/x"
    asked = join("s3://bucket/folder/?region=us-east-1&scheme=http", "ray/x")
    assert asked == "s3://bucket/folder/ray/x?region=us-east-1&scheme=http"
    assert open_storage(asked)[1] == "bucket/folder/ray/x"


def test_a_trial_id_depends_on_all_that_its_numbers_depend_on() -> None:
    spec = trial(0)
    others = [
        trial(1),
        replace(spec, config=replace(spec.config, steps=7)),
        replace(spec, world=WorldConfig("micro")),
    ]
    assert len({spec.id, *(other.id for other in others)}) == 4
    assert replace(spec, name="other").id == spec.id
