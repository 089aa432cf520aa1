"""The main job at toy settings, real Ray, real store: what is left when it ends well, badly, or is killed."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from helpers import ROOT
from mlflow import MlflowClient
from mlflow.entities import Run
from safetensors.numpy import load_file

from llgbm.world import World

METRICS = (
    "accuracy",
    "delta_cosine",
    "delta_norm_ratio",
    "delta_w_error",
    "nearest_teacher_distance",
)
# Of tasks that were not trained on.
CONTROLS = ("accuracy_shuffled_prompts", "accuracy_nonsense_prompts")


def start(folder: Path, cache: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        str(ROOT / "tuning" / "run_ablation.py"),
        "--smoke",
        "--cache",
        str(cache),
        *arguments,
    ]
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )


def store(folder: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{folder / 'mlruns' / 'mlflow.db'}")


def runs(folder: Path) -> tuple[Run, list[Run]]:
    """The parent and its children."""
    client = store(folder)
    experiment = client.get_experiment_by_name("llgbm")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    children = [
        run for run in found if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id
    ]
    assert len(children) == len(found) - 1
    return parents[0], children


@pytest.mark.whole
def test_the_last_line_is_one_json_object_with_the_tables_numbers(
    finished: tuple[Path, str],
) -> None:
    table, last = finished[1].rstrip("\n").rsplit("\n", 1)
    found = json.loads(last)
    assert {c["config"] for c in found["configurations"]} == {
        "multitask",
        "delta-only",
        "weight-only",
    }
    for group in found["configurations"]:
        mean = group["metrics"]["heldout/delta_cosine"]["mean"]
        row = next(line for line in table.splitlines() if line.startswith(f"| {group['config']}"))
        assert f"{mean:.3f}" in row
    assert {"base", "teacher", "mean_adapter", "nearest_teacher", "ridge", "best_single"} <= set(
        found["baselines"]
    )
    assert found["registered"] == [
        {"name": "llgbm-generator-nano-smoke", "version": "1", "alias": "champion"}
    ]


@pytest.mark.whole
def test_one_parent_one_child_a_trial_everything_logged(finished: tuple[Path, str]) -> None:
    parent, children = runs(finished[0])
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["llgbm.study"] == "phase_4_5"
    assert {f"baseline/{name}/accuracy" for name in ("base", "teacher", "ridge")} <= set(
        parent.data.metrics
    )
    assert sorted(run.data.tags["llgbm.config"] for run in children) == [
        "delta-only",
        "multitask",
        "weight-only",
    ]
    client = store(finished[0])
    for run in children:
        assert run.info.status == "FINISHED"
        assert {"llgbm.study", "llgbm.trial_id", "llgbm.bank"} <= set(run.data.tags)
        wanted = {f"{part}/{name}" for part in ("heldout", "val", "train") for name in METRICS}
        wanted |= {f"{part}/{name}" for part in ("heldout", "val") for name in CONTROLS}
        assert wanted <= set(run.data.metrics)
        assert not any(f"train/{name}" in run.data.metrics for name in CONTROLS)
        assert run.data.params["lambda_weight"] and run.data.params["generator.hidden"]
        steps = [m.step for m in client.get_metric_history(run.info.run_id, "loss/total")]
        assert steps == list(range(1, 1 + int(run.data.params["steps"])))
    by_name = {run.data.tags["llgbm.config"]: run.data.metrics for run in children}
    assert "loss/delta" not in by_name["weight-only"] and "loss/weight" not in by_name["delta-only"]


@pytest.mark.whole
def test_artifacts_are_adapters_deltas_and_a_generator(
    finished: tuple[Path, str], world: World
) -> None:
    from llgbm.generator.bundle import GeneratorBundle
    from llgbm.lora.adapters import load_adapter

    folder, _ = finished
    parent, children = runs(folder)
    client = store(folder)
    kept = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"report.md", "answers_1_nano.html"} <= kept
    pages = client.list_artifacts(parent.info.run_id, "answers/nano")
    assert [Path(item.path).name for item in pages] == ["answers.json"]
    saved = Path(client.download_artifacts(children[0].info.run_id, "", str(folder)))
    assert GeneratorBundle.load(saved / "generator").facts["bank_hash"] == world.bank.hash
    for part in ("val", "test"):
        tasks = [world.data.tasks[row] for row in world.data.rows[part]]
        assert sorted(p.name for p in (saved / "adapters" / part).iterdir()) == sorted(tasks)
        for task in tasks:
            load_adapter(saved / "adapters" / part / task, world.bank.spec)
        deltas = load_file(saved / "deltas" / f"{part}.safetensors")
        assert deltas["predicted"].shape == deltas["teacher"].shape == (len(tasks), 128)


@pytest.mark.whole
def test_the_registered_champion_generates_an_adapter_that_plain_peft_runs(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("reverse plainly : apple lemon river =>\n")
    command = [
        sys.executable,
        "-m",
        "llgbm",
        "generate",
        "--model",
        "models:/llgbm-generator-nano-smoke@champion",
    ]
    command += ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "adapter")]
    done = subprocess.run(command, cwd=finished[0], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    script = (
        "import sys; from peft import PeftModel; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "base, adapter = sys.argv[1:]\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)\n"
        "ids = AutoTokenizer.from_pretrained(base)('reverse : apple lemon =>', return_tensors='pt')\n"
        "print(model.generate(**ids, max_new_tokens=2).shape)"
    )
    arguments = [json.loads(done.stdout)["base"], str(tmp_path / "adapter")]
    alone = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr


@pytest.mark.whole
def test_a_failed_trial_is_failed_and_hurts_no_other(
    tmp_path: Path, cache: Path, world: World
) -> None:
    process = start(
        tmp_path, cache, "--steps", "4", "--lambda-weight", "1", "1e39", "--lambda-delta", "0"
    )
    out, err = process.communicate(timeout=280)
    assert process.returncode == 1, err
    parent, children = runs(tmp_path)
    assert sorted(run.info.status for run in children) == ["FAILED", "FINISHED"]
    failed = next(run for run in children if run.info.status == "FAILED")
    assert float(failed.data.params["lambda_weight"]) == 1e39
    assert json.loads(out.splitlines()[-1])["registered"]


@pytest.mark.whole
@pytest.mark.parametrize(
    "sent", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_an_interrupt_ends_within_seconds_and_marks_runs_killed(
    sent: signal.Signals, tmp_path: Path, cache: Path, world: World
) -> None:
    process = start(tmp_path, cache, "--steps", "100000")
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not _some_step_is_logged(tmp_path):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(1)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    parent, children = runs(tmp_path)
    assert children
    assert {run.info.status for run in [parent, *children]} == {"KILLED"}


def _some_step_is_logged(folder: Path) -> bool:
    """Read the file itself: an MLflow client would make the tables too, and get in the way of the one that does."""
    try:
        with closing(
            sqlite3.connect(f"file:{folder / 'mlruns' / 'mlflow.db'}?mode=ro", uri=True)
        ) as database:
            return bool(
                database.execute(
                    "select 1 from metrics where key = 'loss/total' limit 1"
                ).fetchall()
            )
    except sqlite3.OperationalError:
        return False
