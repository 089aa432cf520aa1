"""What trials are given, and how Ray places them: real Ray, pretended GPUs."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faults import UNDISTURBED
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from llgbm.runtime import UserError
from llgbm.training import TrainingConfig
from llgbm.world import World, WorldConfig
from tuning.search.queue import ListQueue
from tuning.studies import Study
from tuning.studies.options import Options
from tuning.studies.spec import TrialSpec
from tuning.sweep.checkpoints import TrialCheckpoints
from tuning.sweep.cluster import (
    START_ATTEMPTS,
    Node,
    Resources,
    check_resources,
    memory_fraction,
    start_ray,
)
from tuning.sweep.run import Job
from tuning.sweep.worker import (
    MAX_RESTARTS,
    TrialSetting,
    attempt,
    cause_of,
    check_restarts,
    is_of_the_process,
)
from tuning.tracking.ownership import Ownership, own_study
from tuning.tracking.runs import read_trials
from tuning.tracking.study import StudyTracker
from tuning.tracking.trial import TrialTracker


def trial(seed: int, **changes: Any) -> TrialSpec:
    return TrialSpec("multitask", TrainingConfig(seed=seed, **changes), WorldConfig())


@pytest.fixture
def tracker(tmp_path: Path, empty_store: Path) -> StudyTracker:
    shutil.copytree(empty_store, tmp_path / "mlruns")
    tracker = StudyTracker.open(None, tmp_path, "ablation")
    tracker.begin("study", "id", {}, {})
    return tracker


def setting_of(tracker: StudyTracker, storage: Path, gpus: float = 0.0) -> TrialSetting:
    assert tracker.target is not None
    return TrialSetting(tracker.target, str(storage), "session", 1, gpus, keep_adapters=False)


def waiting_for_four(folder: Path) -> Callable[[dict, dict, TrialSetting], None]:
    """A stand-in for a trial: it ends when four of its kind are there at once, or tells how few there were."""

    def trainable(params: dict, worlds: dict, setting: TrialSetting) -> None:
        from ray import tune

        spec, deadline = params["trial"], time.monotonic() + 120
        (folder / spec.id).touch()
        while (n := len(list(folder.iterdir()))) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        if spec.config.seed == 3:
            tune.report({"step": 0, "failed": f"{n} were there, {setting.gpus:g} of a GPU each"})
        elif spec.config.seed == 2:
            tune.report({"step": 40, "val/accuracy": 0.1})
        else:
            tune.report({"step": 1, "finished": n == 4})

    return trainable


@pytest.mark.whole
def test_four_quarters_of_one_gpu_are_placed_together_and_end_as_they_say(
    tmp_path: Path, tracker: StudyTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from tuning.sweep import ray_tune as sweep

    (tmp_path / "there").mkdir()
    specs = tuple(trial(seed) for seed in range(4))
    assert tracker.target is not None
    for spec in specs:
        TrialTracker.open(tracker.target, spec.id, spec.name, {"seed": spec.config.seed}, {})
    for name, value in UNDISTURBED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(
        "RAY_ADDRESS", "127.0.0.1:1"
    )  # of a cluster that has nothing to do with this sweep
    monkeypatch.setattr(sweep, "ray_trainable", waiting_for_four(tmp_path / "there"))
    resources = check_resources(0.25, 0.25, None, [Node(1, 1)])
    try:
        start_ray(resources)
        storage = str(tmp_path / "state")
        TrialCheckpoints(storage, specs[0].id).write({"step": 1})
        job = Job(Study("s", specs), Options(), {}, tracker, storage, resources)
        with own_study(tracker, "id") as ownership:
            sweep.run_sweep(job, ListQueue(specs, specs, 4), ownership)
    finally:
        ray.shutdown()
    found = {
        t.seed: (t.status, t.stopped_at)
        for t in read_trials(tracker.tracking_uri, tracker.parent_run_id)
    }
    assert found == {
        0: ("FINISHED", None),
        1: ("FINISHED", None),
        2: ("FINISHED", 40),
        3: ("FAILED", None),
    }
    error = tracker.live_runs()[specs[3].id].data.tags["llgbm.error"]
    assert error == "4 were there, 0.25 of a GPU each"
    assert not list(Path(storage).rglob("*.pt")) and not list(Path(storage).glob("ray/*"))


def test_four_quarters_of_a_gpu_run_side_by_side_on_each_machine() -> None:
    found = check_resources(1, 0.25, None, [Node(8, 1), Node(2, 1)])
    assert (
        found.concurrent == 6
        and found.describe() == "6 at a time on 2 machines, 1 CPUs and 0.25 GPUs each"
    )
    assert check_resources(1, 0.25, None, [Node(16, 1)]).concurrent == 4
    assert check_resources(None, None, None, [Node(16, 1)]).gpus == 0.25
    with pytest.raises(UserError, match="the largest of 2 machines has 1"):
        check_resources(1, 2, None, [Node(8, 1), Node(2, 1)])
    with pytest.raises(UserError, match="no machine has 4 CPUs and 1 GPUs together"):
        check_resources(4, 1, None, [Node(8, 0), Node(2, 1)])


@given(parts=st.integers(2, 16), gigabytes=st.integers(16, 192))
def test_neighbours_fit_into_a_gpu_together_with_what_cuda_takes(
    parts: int, gigabytes: int
) -> None:
    total = gigabytes * 2**30
    each = memory_fraction(1 / parts, total)
    assert 0 < each < 1 / parts
    assert parts * (each * total + 600 * 2**20) <= total or each == 0.01
    assert (
        memory_fraction(1.0, total)
        == memory_fraction(0.0, total)
        == memory_fraction(2.0, total)
        == 1.0
    )


def test_what_watches_trials_can_travel_to_the_head_of_a_cluster(
    tmp_path: Path, tracker: StudyTracker
) -> None:
    from ray import cloudpickle

    from tuning.sweep.ray_tune import Watcher

    assert tracker.target is not None
    TrialTracker.open(tracker.target, trial(0).id, "multitask", {}, {})
    ownership = Ownership(tracker.tracking_uri, tracker.experiment_id, tracker.parent_run_id)
    assert ownership.take(trial(0).id)
    watcher = Watcher(tracker, ownership, str(tmp_path), 10)
    watcher._bar = tqdm(total=10, file=sys.__stderr__)
    watcher = cloudpickle.loads(cloudpickle.dumps(watcher))
    there = SimpleNamespace(config={"trial": trial(0)}, last_result={"step": 7, "finished": True})
    watcher.on_trial_result(1, [], there, {"step": 7})
    watcher.on_trial_complete(1, [], there)
    watcher.close()
    assert tracker.live_runs()[trial(0).id].info.status == "FINISHED"


def test_a_death_is_told_in_one_line(tmp_path: Path) -> None:
    from tuning.sweep.ray_tune import death_of

    file = tmp_path / "error.txt"
    assert death_of(SimpleNamespace(error_file=None)) == "no cause known"
    file.write_text(
        "Failure # 1 (occurred at noon)\nolder\nFailure # 2 (occurred at night)\nThe actor died.\n\tpid: 3\n"
        "Its memory was needed.\n"
    )
    assert (
        death_of(SimpleNamespace(error_file=str(file))) == "The actor died. Its memory was needed."
    )


def test_an_error_that_would_come_again_is_told_and_not_raised(
    tmp_path: Path, tracker: StudyTracker, world: World, config: TrainingConfig
) -> None:
    spec = TrialSpec(
        "weight-only", TrainingConfig(**{**vars(config), "lambda_weight": 1e39}), world.config
    )
    told = attempt(spec, world, setting_of(tracker, tmp_path), lambda step, found: None)
    assert told["failed"].startswith("the loss is inf at step 0") and "finished" not in told


def test_what_a_scheduler_hears_of_is_in_the_store_already(
    tmp_path: Path, tracker: StudyTracker, world: World, config: TrainingConfig
) -> None:
    """A scheduler may stop the trial on that result, and its process may end before it sends anything."""
    spec = TrialSpec("weight-only", config, world.config)
    heard: dict[int, dict[str, float]] = {}
    stored: dict[int, dict[str, float]] = {}

    def hear(step: int, metrics: Mapping[str, Any]) -> None:
        run = tracker.client.get_run(metrics["run_id"]).data.metrics
        heard[step] = {key: value for key, value in metrics.items() if key.startswith("val/")}
        stored[step] = {key: run.get(key) for key in heard[step]}

    setting = replace(setting_of(tracker, tmp_path), scheduler="asha")
    assert attempt(spec, world, setting, hear).get("finished")
    assert heard and all(heard.values()) and stored == heard


def test_starts_that_lead_nowhere_come_to_an_end(tmp_path: Path, tracker: StudyTracker) -> None:
    assert tracker.target is not None
    checkpoints = TrialCheckpoints(str(tmp_path), "t")

    def start(session: str = "first") -> TrialTracker:
        assert tracker.target is not None
        run = TrialTracker.open(tracker.target, "t", "multitask", {}, {})
        check_restarts(run, checkpoints, session)
        return run

    for _ in range(MAX_RESTARTS):
        start()
    tracker.tag_trial("t", {"llgbm.last_death": "killed by the test"})
    with pytest.raises(
        UserError, match=rf"died {MAX_RESTARTS} times in a row .*killed by the test"
    ):
        start()
    start("second")
    checkpoints.write({"step": 5})
    assert start().attempts == MAX_RESTARTS + 3


def test_causes_are_one_sentence_and_a_broken_process_alone_is_tried_again(
    tracker: StudyTracker, tmp_path: Path
) -> None:
    setting = setting_of(tracker, tmp_path, gpus=0.25)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
        MemoryError(),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
    ):
        assert not is_of_the_process(error)
        cause = cause_of(error, setting)
        assert (
            cause.startswith("out of memory (")
            and "more than 0.25 of a GPU" in cause
            and "\n" not in cause
        )
    assert is_of_the_process(
        RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
    )
    assert cause_of(UserError("no such thing"), setting) == "no such thing"
    assert cause_of(KeyError("x"), setting) == "KeyError: 'x'"


@pytest.mark.parametrize("misses", [2, 99])
def test_a_busy_machine_gets_more_attempts_at_ray_and_then_one_sentence(
    misses: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray gives a start half a minute, whatever the load; only its answer is put in here."""
    import ray

    starts = []

    def init(**_: Any) -> None:
        starts.append(1)
        if len(starts) <= misses:
            raise Exception("The current node timed out during startup. This could happen because")

    for name, function in (("init", init), ("shutdown", lambda: None)):
        monkeypatch.setattr(ray, name, function)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr("tuning.sweep.cluster.terminate_as_interrupt", lambda: None)
    resources = Resources(1.0, 0.0, 1, (Node(2.0, 0.0),))
    if misses > START_ATTEMPTS:
        with pytest.raises(UserError, match="too busy: end other work"):
            start_ray(resources)
        assert len(starts) == START_ATTEMPTS
    else:
        start_ray(resources)
        assert len(starts) == misses + 1 and "attempt 2 of 4" in capsys.readouterr().err
