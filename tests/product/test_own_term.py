"""Parts of another package in a whole sweep: planned, trained, reported under their names."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from own_package import write_package

from llgbm.world import World
from tuning.report.document import write_report
from tuning.report.record import read_study
from tuning.tracking.runs import read_trials
from tuning.tracking.store import connect

COMMAND = (
    "--smoke --steps 4 --term own_terms:Small=0.1 kl=1 --term-option own_terms:Small.power=1 "
    "--generator straight --encoder letters --suite repeats --max-concurrent 1"
)


@pytest.mark.whole
@pytest.mark.timeout(900)  # A busy machine is slow, not wrong.
def test_parts_from_outside_are_swept_and_reported(
    tmp_path: Path, cache: Path, world: World
) -> None:
    write_package(tmp_path / "package")
    path = os.pathsep.join([str(tmp_path / "package"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "tuning" / "run_ablation.py"), *COMMAND.split()]
        + ["--cache", str(cache)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert [c["config"] for c in summary["configurations"]] == ["kl=1 small=0.1"]
    # The report is made here, where nobody can import the term.
    uri = f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}"
    parent = connect(uri).search_runs(["1"], "tags.`llgbm.study` = 'phase_4_5'")[-1]
    parent_id = parent.data.tags.get("mlflow.parentRunId", parent.info.run_id)
    trial = read_trials(uri, parent_id)[0]
    assert {"loss/kl", "loss/small", "loss/total"} <= set(trial.metrics)
    assert trial.params["generator.name"] == "straight"
    assert trial.weights == {"own_terms:Small": 0.1, "kl": 1.0}
    write_report(tmp_path / "report", read_study(uri, parent_id))
    with (tmp_path / "report" / "results.csv").open() as file:
        row = next(iter(csv.DictReader(file)))
    assert (row["terms.own_terms:Small"], row["terms.kl"]) == ("0.1", "1.0")
