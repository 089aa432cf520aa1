"""Workers, drivers and machines that are killed in a sweep: nothing is lost, nothing is done or told twice."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import Sweep, check_registry, check_whole, kill_a_worker, kill_driver
from mlflow import MlflowClient
from mlflow.entities import Run

from llgbm.world import World

Reference = tuple[dict[str, Run], MlflowClient]


@pytest.fixture
def reference(finished: tuple[Path, str], cache: Path) -> Reference:
    """The undisturbed sweep with the same seeds."""
    sweep = Sweep(finished[0], cache)
    return sweep.trials(), sweep.client()


def test_a_killed_worker_and_a_killed_driver_leave_no_trace(tmp_path: Path, cache: Path, reference: Reference) -> None:
    sweep = Sweep(tmp_path, cache)
    process = sweep.start()
    sweep.wait_for_checkpoint()
    assert kill_a_worker(process.pid, random.Random(0))
    sweep.wait_for_checkpoint(besides=sweep.checkpoints())
    kill_driver(process)
    assert {run.info.status for run in sweep.parents()} == {"RUNNING"}
    assert sweep.finish() == 0, sweep.log()
    check_whole(sweep, *reference)
    check_registry(sweep)
    attempts = [int(run.data.tags["llgbm.attempts"]) for run in sweep.trials().values()]
    assert sum(attempts) > len(attempts)


@pytest.fixture
def cluster() -> Iterator[object]:
    """A head that runs no trial, and two machines of one CPU each, all on this one."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def test_a_machine_that_dies_costs_nothing_but_time(
    tmp_path: Path, cache: Path, reference: Reference, cluster, world: World
) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    sweep = Sweep(tmp_path, cache)
    process = sweep.start("--address", cluster.address)
    sweep.wait_for_checkpoint()
    cluster.remove_node(nodes[0], allow_graceful=False)
    assert process.wait(280) == 0, sweep.log()
    check_whole(sweep, *reference)
    assert "on 2 machines" in sweep.log()
