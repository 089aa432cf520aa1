"""Sweeps that are killed on purpose, and what must hold of their store when they end."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from helpers import ROOT, free_port, serving
from mlflow import MlflowClient
from mlflow.entities import Run

# Ray kills workers when the whole machine is short of memory, gives a busy machine up,
# and lets workers wait for other programs (nice 15); here only the test kills, and time counts.
UNDISTURBED = {
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_worker_niceness": "0",
}


class Sweep:
    """`run_ablation.py --smoke` in a folder of its own, started and resumed as often as it is killed."""

    def __init__(self, folder: Path, cache: Path, *arguments: str) -> None:
        self.folder, self.storage = folder, folder / "state"
        self.how = ["--cache", str(cache), "--storage-path", str(self.storage)]
        self.what = ["--smoke", *arguments]
        self.process: subprocess.Popen[str] | None = None

    def start(self, *how: str, anew: bool = False) -> subprocess.Popen[str]:
        """Start the study, or go on with it when the store knows it, unless it is to be run `anew`."""
        known = (self.folder / "mlruns" / "mlflow.db").exists() and bool(self.parents())
        known = known and not anew
        arguments = ["--resume", "latest"] if known else self.what
        command = [
            sys.executable,
            str(ROOT / "tuning" / "run_ablation.py"),
            *arguments,
            *self.how,
            *how,
        ]
        log = (self.folder / "log.txt").open("a")
        env = {**os.environ, **UNDISTURBED}
        self.process = subprocess.Popen(
            command, cwd=self.folder, stdout=log, stderr=log, text=True, env=env
        )
        return self.process

    def finish(self, *how: str, timeout: float = 600, anew: bool = False) -> int:
        """Start it and wait for its end; its exit status."""
        return self.start(*how, anew=anew).wait(timeout)

    def log(self) -> str:
        return (self.folder / "log.txt").read_text()[-4000:]

    def checkpoints(self) -> set[str]:
        return {str(path.relative_to(self.storage)) for path in self.storage.glob("*/step_*.pt")}

    def wait_for_checkpoint(self, besides: Collection[str] = (), seconds: float = 400) -> None:
        """Return when a trial has kept its state at a step that is not among `besides`."""
        deadline = time.monotonic() + seconds
        while not self.checkpoints() - set(besides):
            assert self.process is not None and self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.folder / 'mlruns' / 'mlflow.db'}")

    def runs(self) -> list[Run]:
        client = self.client()
        experiment = client.get_experiment_by_name("llgbm")
        return list(client.search_runs([experiment.experiment_id])) if experiment else []

    def parents(self) -> list[Run]:
        return [run for run in self.runs() if "mlflow.parentRunId" not in run.data.tags]

    def trials(self) -> dict[str, Run]:
        """Runs by trial id. Fails if two have one id."""
        runs = [run for run in self.runs() if "mlflow.parentRunId" in run.data.tags]
        assert max(Counter(run.data.tags["llgbm.trial_id"] for run in runs).values()) == 1
        return {run.data.tags["llgbm.trial_id"]: run for run in runs}


@contextmanager
def two_machines() -> Iterator[tuple[Any, list[Any]]]:
    """A Ray cluster whose head runs no trial, and its two machines of one CPU each, all on this one."""
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    os.environ.update(UNDISTURBED)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        yield cluster, [cluster.add_node(num_cpus=1) for _ in range(2)]
    finally:
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def ray_client_server(folder: Path) -> Iterator[str]:
    """A Ray head with two CPUs that clients reach by `ray://`; yields its address."""
    # Ray gives ports from 10002 on to workers.
    port, own = next(p for p in range(9901, 10002) if _is_free(p)), free_port()
    command = [
        str(Path(sys.executable).parent / "ray"),
        "start",
        "--head",
        "--block",
        "--num-cpus",
        "2",
    ]
    ports = ["--port", str(own), "--ray-client-server-port", str(port)]
    with (folder / "ray.txt").open("w") as log:
        quiet = ["--include-dashboard", "false", "--disable-usage-stats"]
        head = subprocess.Popen(
            [*command, *ports, *quiet], stdout=log, stderr=log, env={**os.environ, **UNDISTURBED}
        )
    try:
        deadline = time.monotonic() + 120
        while _is_free(port) and head.poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
        yield f"ray://127.0.0.1:{port}"
    finally:
        head.terminate()
        head.wait(60)


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """A stand-in for S3 on this machine; yields what comes behind the question mark of an address there."""
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1"]
    with serving(command, folder / "s3.txt", "moto-api/") as url:
        yield f"endpoint_override={url.removeprefix('http://')}&scheme=http&region=us-east-1&allow_bucket_creation=true"


def found_in(files: Any, folder: str) -> list[str]:
    """Checkpoints below a folder of an object store."""
    from pyarrow.fs import FileSelector

    found = files.get_file_info(FileSelector(folder, recursive=True, allow_not_found=True))
    return [info.path for info in found if info.path.endswith(".pt")]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def workers_of(pid: int) -> list[psutil.Process]:
    """The Ray workers below a process, busy or idle; Ray's agents, whose death ends their whole node, are none."""
    try:
        below = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [
        process
        for process in below
        if _command(process).startswith(("ray::ImplicitFunc", "ray::IDLE"))
    ]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill_a_worker(pid: int, rng: random.Random) -> bool:
    """Kill one Ray worker below a process that holds an actor; say whether there was one."""
    busy = [process for process in workers_of(pid) if "IDLE" not in _command(process)]
    if not busy:
        return False
    rng.choice(busy).kill()
    return True


def kill_driver(process: subprocess.Popen[str]) -> None:
    """SIGKILL the driver alone; what it started must notice."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)


def final_metrics(run: Run) -> dict[str, float]:
    """What must not depend on how often a trial was killed: all last values but times, memory and the machine's."""
    return {
        key: value
        for key, value in run.data.metrics.items()
        if not key.startswith(("time/", "system/"))
    }


def check_whole(sweep: Sweep, reference: dict[str, Run], reference_client: MlflowClient) -> None:
    """One finished run a trial, one value a key and step, and every value as in the undisturbed sweep, bit for bit."""
    trials, client = sweep.trials(), sweep.client()
    (parent,) = sweep.parents()
    assert parent.info.status == "FINISHED"
    assert set(trials) == set(reference)
    for trial_id, run in trials.items():
        assert run.info.status == "FINISHED"
        undisturbed = reference[trial_id]
        own, wanted = final_metrics(run), final_metrics(undisturbed)
        differing = {key: (own.get(key), wanted.get(key)) for key in own.keys() | wanted.keys()}
        assert not {key: pair for key, pair in differing.items() if pair[0] != pair[1]}, differing
        for key in final_metrics(run):
            own, other = (
                [
                    (metric.step, repr(metric.value))
                    for metric in c.get_metric_history(r.info.run_id, key)
                ]
                for c, r in ((client, run), (reference_client, undisturbed))
            )
            assert sorted(own) == sorted(other), f"{key} of {trial_id}"
        assert {"generator", "deltas", "per_task.json"} <= {
            i.path for i in client.list_artifacts(run.info.run_id)
        }
    assert not list(sweep.storage.glob("*/*.pt"))


def check_registry(sweep: Sweep) -> None:
    """Every version of every model is whole: ready, with a generator that can be fetched; one is the champion."""
    from tuning.registry import fetch_bundle

    client = sweep.client()
    for model in client.search_registered_models():
        assert "champion" in client.get_registered_model(model.name).aliases
        for version in client.search_model_versions(f"name = '{model.name}'"):
            assert version.status == "READY"
            assert version.tags["llgbm.trial_id"] in sweep.trials()
            fetch_bundle(f"models:/{model.name}/{version.version}", client.tracking_uri)
