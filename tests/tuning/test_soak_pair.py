"""Two drivers of two studies that share trials in one store, killed at random (`make soak`).

Nothing may be lost, doubled or ended by the wrong hand, and all numbers are those of an undisturbed sweep, bit for bit.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from databases import DATABASES, missing
from faults import Sweep, final_metrics, kill_a_worker, kill_driver
from helpers import mlflow_server, serving
from mlflow import MlflowClient
from mlflow.entities import Run

from llgbm.world import World
from tuning.tracking.runs import read_trials
from tuning.tracking.store import connect
from tuning.tracking.study import StudyTracker

KILLS = int(os.environ.get("LLGBM_SOAK_KILLS", "100"))
KILLS_PER_ROUND = 12
SEEDS = (("0", "1", "2"), ("1", "2", "3"))
TRIALS = ("--lambda-weight", "0.3", "--lambda-delta", "1", "--steps", "40")
Reference = tuple[dict[str, Run], MlflowClient]


class Pair:
    """Two sweeps on one store, each with a folder of its own for the state of its trials, and what kills them."""

    def __init__(self, folder: Path, cache: Path, uri: str, rng: random.Random) -> None:
        self.rng, self.done = rng, Counter[str]()
        self.sweeps: list[Sweep] = []
        for number, seeds in enumerate(SEEDS):
            own = folder / f"driver{number}"
            own.mkdir(parents=True)
            sweep = Sweep(own, cache, *TRIALS, "--seeds", *seeds)
            sweep.how += ["--tracking-uri", uri, "--experiment", folder.name]
            sweep.how += ["--max-concurrent", "1"]
            self.sweeps.append(sweep)

    def run(self, kills: int) -> None:
        """Start both, kill either or its worker until no kill is left, and see both end well."""
        for sweep in self.sweeps:
            sweep.start()
        while self._running():
            if self.done.total() < kills:
                self._wait()
                self._kill()
            else:
                time.sleep(0.2)

    def _running(self) -> list[Sweep]:
        running = [sweep for sweep in self.sweeps if sweep.process.poll() is None]  # type: ignore[union-attr]
        for sweep in self.sweeps:
            if sweep not in running:
                assert sweep.process is not None and sweep.process.returncode == 0, sweep.log()
        return running

    def _states(self) -> set[str]:
        return {f"{sweep.folder} {name}" for sweep in self.sweeps for name in sweep.checkpoints()}

    def _wait(self) -> None:
        """For the next checkpoint, mostly, so that the studies get on; else any while."""
        seen, deadline = self._states(), time.monotonic() + self.rng.uniform(0.5, 15)
        until_progress = self.rng.random() < 0.7
        while self._running() and (until_progress or time.monotonic() < deadline):
            if until_progress and self._states() - seen:
                time.sleep(self.rng.uniform(0, 1))
                return
            time.sleep(0.05)

    def _kill(self) -> None:
        running = self._running()
        if not running:
            return
        sweep = self.rng.choice(running)
        assert sweep.process is not None
        if self.rng.random() < 0.5:
            kill_driver(sweep.process)
            if sweep.process.returncode == 0:  # it had just ended by itself
                return
            self.done["driver"] += 1
            sweep.start()
        elif kill_a_worker(sweep.process.pid, self.rng):
            self.done["worker"] += 1


def check(pair: Pair, uri: str, experiment: str, reference: Reference) -> None:
    """One finished run a trial with the reference's values, each once; each study whole; nothing held or left over."""
    tracker = StudyTracker.open(uri, Path("/nowhere"), experiment)
    found = tracker.client.search_runs([tracker.experiment_id], max_results=1000)
    assert {run.info.status for run in found} == {"FINISHED"}
    trials = [run for run in found if "llgbm.trial_id" in run.data.tags]
    assert len(found) - len(trials) == len(SEEDS)
    known, known_client = reference
    assert sorted(run.data.tags["llgbm.trial_id"] for run in trials) == sorted(known)
    for run in trials:
        _check_trial(run, tracker.client, known[run.data.tags["llgbm.trial_id"]], known_client)
    for study in tracker.studies():
        results = read_trials(tracker.tracking_uri, study.info.run_id)
        assert len(results) == len(SEEDS[0]) and all(one.is_complete for one in results)
        left = [key for key in study.data.tags if key.startswith(("llgbm.driver.", "llgbm.hold."))]
        assert not left
    for sweep in pair.sweeps:
        shared = [path for path in sweep.storage.glob("*/*.pt") if path.parent.name not in known]
        assert not shared


def _check_trial(run: Run, client: MlflowClient, known: Run, known_client: MlflowClient) -> None:
    assert final_metrics(run) == final_metrics(known)
    for key in final_metrics(run):
        own, other = (
            sorted(
                (metric.step, repr(metric.value))
                for metric in one.get_metric_history(r.info.run_id, key)
            )
            for one, r in ((client, run), (known_client, known))
        )
        assert own == other, f"{key} of {run.info.run_name}"
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"generator", "deltas", "per_task.json"} <= names


@pytest.fixture(params=["sqlite", "server"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An SQLite file, or an MLflow server over PostgreSQL."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}"
        return
    if reason := missing("postgresql"):
        pytest.skip(reason)
    with ExitStack() as stack:
        backend = stack.enter_context(DATABASES["postgresql"]())
        command = mlflow_server(
            sys.executable, backend.replace("postgresql:", "postgresql+psycopg2:"), tmp_path
        )
        yield stack.enter_context(serving(command, tmp_path / "server.txt", "health"))


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_kills_of_two_drivers_that_share_trials_change_no_number(
    store: str, tmp_path: Path, cache: Path, world: World
) -> None:
    (tmp_path / "undisturbed").mkdir()
    undisturbed = Sweep(tmp_path / "undisturbed", cache, *TRIALS, "--seeds", "0", "1", "2", "3")
    assert undisturbed.finish(timeout=1800) == 0, undisturbed.log()
    reference = undisturbed.trials(), undisturbed.client()
    total: Counter[str] = Counter()
    for number in itertools.count():
        left = KILLS - total.total()
        if left <= 0:
            break
        pair = Pair(tmp_path / f"round{number}", cache, store, random.Random(number))
        pair.run(min(KILLS_PER_ROUND, left))
        check(pair, store, f"round{number}", reference)
        total += pair.done
        print(
            json.dumps({"store": store.partition(":")[0], "rounds": number + 1, **total}),
            flush=True,
        )
    for model in connect(store).search_registered_models():
        versions = connect(store).search_model_versions(f"name = '{model.name}'")
        assert {version.status for version in versions} == {"READY"}
