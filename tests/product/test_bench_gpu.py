"""The GPU benchmark in its CPU form: all of it runs, without Ray, MLflow and what a rented machine lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

ABSENT = (
    "ray",
    "mlflow",
    "optuna",
    "sentence_transformers",
    "pandas",
    "tuning",
    "datasets",
    "sklearn",
    "matplotlib",
)
CODE = (
    "import sys, runpy, pathlib; sys.modules.update(dict.fromkeys({absent!r}));"
    "sys.argv = ['bench_gpu.py', '--cpu', *{options!r}]; import record; record.RESULTS = pathlib.Path({results!r});"
    "runpy.run_path({script!r}, run_name='__main__')"
)


def run(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a process where the packages of `ABSENT` cannot be imported."""
    script = str(ROOT / "benchmarks" / "bench_gpu.py")
    code = CODE.format(absent=ABSENT, options=options, results=str(tmp_path), script=script)
    folders = (ROOT, ROOT / "dnd_repo" / "workspace", ROOT / "benchmarks")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done = run(tmp_path_factory.mktemp("results"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.whole
def test_every_part_has_a_result(found: dict[str, Any]) -> None:
    assert found["benchmark"] == "gpu" and found["environment"]["device"] == "cpu"
    for part in ("parity", "delta", "large", "step", "processes"):
        assert found[part].keys() == {"result", "seconds"}, part


@pytest.mark.whole
def test_parity_is_exact_where_both_sides_are_the_cpu(found: dict[str, Any]) -> None:
    parity = found["parity"]["result"]
    assert parity["float32"] == {"states": 0.0, "gradients": 0.0}
    assert 0 < parity["bfloat16"]["states"] < 0.05 and 0 < parity["bfloat16"]["gradients"] < 0.1


@pytest.mark.whole
def test_baselines_rates_and_estimates_are_there(found: dict[str, Any]) -> None:
    assert found["delta"]["result"]["over_ours"].keys() == {
        "peft_in_turn",
        "peft_adapter_names",
        "functional_call",
        "hooks",
    }
    assert found["delta"]["result"]["share"] > 0 and all(
        row["share"] > 0 for row in found["large"]["result"]
    )
    assert all(row["peak_over_estimate"] >= 0 for row in found["step"]["result"])
    assert found["processes"]["result"]["throughput_gain"] > 0


@pytest.mark.whole
def test_parts_after_the_last_minute_are_left_out_and_said_so(tmp_path: Path) -> None:
    done = run(tmp_path, "--minutes", "-1", "--parts", "parity")
    assert done.returncode == 0, done.stderr
    assert "left_out" in json.loads(done.stdout.splitlines()[-1])["parity"]


def test_without_a_gpu_one_sentence_says_so(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = str(ROOT / "benchmarks" / "bench_gpu.py")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(
        "error: torch sees no GPU"
    )
    assert "Traceback" not in done.stderr
