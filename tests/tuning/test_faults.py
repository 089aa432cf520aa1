"""Workers, drivers and machines that are killed in a sweep: nothing is lost, nothing is done or told twice."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from faults import (
    Sweep,
    check_registry,
    check_whole,
    found_in,
    kill_a_worker,
    kill_driver,
    ray_client_server,
    s3_server,
    two_machines,
)
from mlflow import MlflowClient
from mlflow.entities import Run

from tuning.sweep.checkpoints import open_storage

pytestmark = pytest.mark.timeout(900)  # A busy machine is slow, not wrong.
Reference = tuple[dict[str, Run], MlflowClient]


@pytest.fixture
def reference(finished: tuple[Path, str], cache: Path) -> Reference:
    """The undisturbed sweep with the same seeds."""
    sweep = Sweep(finished[0], cache)
    return sweep.trials(), sweep.client()


@pytest.mark.whole
def test_a_killed_worker_and_a_killed_driver_leave_no_trace(
    tmp_path: Path, cache: Path, reference: Reference
) -> None:
    sweep = Sweep(tmp_path, cache)
    process = sweep.start()
    sweep.wait_for_checkpoint()
    assert kill_a_worker(process.pid, random.Random(0))
    wait_for_a_death(sweep)  # The driver tells of it, and is killed next.
    sweep.wait_for_checkpoint(besides=sweep.checkpoints())
    kill_driver(process)
    assert {run.info.status for run in sweep.parents()} == {"RUNNING"}
    assert sweep.finish() == 0, sweep.log()
    check_whole(sweep, *reference)
    check_registry(sweep)
    attempts = [int(run.data.tags["llgbm.attempts"]) for run in sweep.trials().values()]
    assert sum(attempts) > len(attempts)
    assert has_died(sweep)


def has_died(sweep: Sweep) -> bool:
    """Say if a run tells of the death of its worker."""
    deaths = [run.data.tags.get("llgbm.last_death", "") for run in sweep.trials().values()]
    return any("died" in death for death in deaths)


def wait_for_a_death(sweep: Sweep) -> None:
    """Return when the driver has told of a worker's death."""
    deadline = time.monotonic() + 60
    while not has_died(sweep):
        assert time.monotonic() < deadline, sweep.log()
        time.sleep(0.1)


@pytest.mark.slow
def test_a_sweep_through_rays_client_is_the_same_sweep(
    tmp_path: Path, cache: Path, reference: Reference
) -> None:
    sweep = Sweep(tmp_path, cache)
    with ray_client_server(tmp_path) as address:
        assert sweep.finish("--address", address) == 0, sweep.log()
    check_whole(sweep, *reference)
    check_registry(sweep)


@pytest.mark.slow
def test_the_state_in_an_object_store_outlives_the_driver(
    tmp_path: Path, cache: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("moto", reason="no stand-in for S3 (pip install 'moto[s3,server]')")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.setenv(name, "true")
    sweep = Sweep(tmp_path, cache)
    with s3_server(tmp_path) as settings:
        files, root = open_storage(f"s3://bucket/state?{settings}")
        files.create_dir("bucket")
        sweep.how[-1] = f"s3://bucket/state?{settings}"
        process = sweep.start()
        deadline = time.monotonic() + 400
        while not (kept := found_in(files, root)) and time.monotonic() < deadline:
            assert process.poll() is None, sweep.log()
            time.sleep(0.1)
        assert kept
        kill_driver(process)
        assert sweep.finish() == 0, sweep.log()
        assert not found_in(files, root)
    check_whole(sweep, *reference)


@pytest.mark.slow
def test_a_machine_that_dies_costs_nothing_but_time(
    tmp_path: Path, cache: Path, reference: Reference
) -> None:
    sweep = Sweep(tmp_path, cache)
    with two_machines() as (cluster, nodes):
        process = sweep.start("--address", cluster.address)
        sweep.wait_for_checkpoint()
        cluster.remove_node(nodes[0], allow_graceful=False)
        assert process.wait(600) == 0, sweep.log()
    check_whole(sweep, *reference)
    assert "on 2 machines" in (tmp_path / "log.txt").read_text()
