"""Many random kills of drivers, workers and machines (`make soak`): every sweep must end as the undisturbed one did."""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from faults import Sweep, check_registry, check_whole, kill_a_worker, kill_driver, two_machines

from llgbm.world import World

KILLS = int(os.environ.get("LLGBM_SOAK_KILLS", "50"))
KILLS_PER_SWEEP = 9
STUDY = ("--seeds", "0", "1", "--steps", "40")


class Chaos:
    """One sweep, on this machine alone or on two machines of a cluster, and the kills that befall it."""

    def __init__(
        self, sweep: Sweep, rng: random.Random, kills: int, cluster: Any = None, nodes: Any = ()
    ) -> None:
        self.sweep, self.rng, self.left = sweep, rng, kills
        self.done: Counter[str] = Counter()
        self.cluster, self.nodes = cluster, list(nodes)
        self.how = ["--address", cluster.address] if cluster else []

    def run(self) -> None:
        """Start the sweep, kill at random until no kill is left, and see it end well."""
        process = self.sweep.start(*self.how)
        while self.left:
            self._wait()
            if process.poll() is not None:
                assert process.returncode == 0, self.sweep.log()
                return
            kind = self.rng.choice(
                ["driver", "worker", "worker", "node" if self.cluster else "worker"]
            )
            if self._kill(kind):
                self.done[kind] += 1
                self.left -= 1
            if process.poll() is not None:
                process = self.sweep.start(*self.how)
        assert process.wait(600) == 0, self.sweep.log()

    def _wait(self) -> None:
        """For the next checkpoint, mostly, so that the sweep gets on; else any while, so that kills fall anywhere."""
        assert self.sweep.process is not None
        seen, deadline = self.sweep.checkpoints(), time.monotonic() + self.rng.uniform(0.5, 20)
        until_progress = self.rng.random() < 0.6
        while self.sweep.process.poll() is None and (until_progress or time.monotonic() < deadline):
            if until_progress and self.sweep.checkpoints() - seen:
                time.sleep(self.rng.uniform(0, 1))
                return
            time.sleep(0.05)

    def _kill(self, kind: str) -> bool:
        assert self.sweep.process is not None
        if kind == "driver":
            kill_driver(self.sweep.process)
            return True
        if kind == "worker":
            return kill_a_worker(os.getpid() if self.cluster else self.sweep.process.pid, self.rng)
        assert self.cluster is not None
        self.cluster.remove_node(self.nodes.pop(self.rng.randrange(2)), allow_graceful=False)
        self.nodes.append(self.cluster.add_node(num_cpus=1))
        return True


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fifty_random_kills_change_no_number(tmp_path: Path, cache: Path, world: World) -> None:
    (tmp_path / "undisturbed").mkdir()
    undisturbed = Sweep(tmp_path / "undisturbed", cache, *STUDY)
    assert undisturbed.finish(timeout=1200) == 0, undisturbed.log()
    reference, client = undisturbed.trials(), undisturbed.client()
    total: Counter[str] = Counter()
    for number in itertools.count():
        left = KILLS - total.total()
        if left <= 0:
            break
        folder = tmp_path / f"sweep_{number}"
        folder.mkdir()
        sweep = Sweep(folder, cache, *STUDY)
        with two_machines() if number % 2 else nullcontext((None, ())) as (cluster, nodes):
            chaos = Chaos(sweep, random.Random(number), min(KILLS_PER_SWEEP, left), cluster, nodes)
            chaos.run()
        check_whole(sweep, reference, client)
        check_registry(sweep)
        total += chaos.done
        print(json.dumps({"sweeps": number + 1, **total}), flush=True)
