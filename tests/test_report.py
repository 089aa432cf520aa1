"""The report: its numbers against scipy, its words against its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tuning.report import DeltaMap, collect_baselines, result_json, write_report
from tuning.tracking import TrialResult

VALUES = {
    "multitask": (0.60, 0.70, 0.65),
    "weight-only": (0.40, 0.52, 0.43),
    "delta-only": (0.61, 0.66, 0.68),
}
BASELINES = {"base": {"accuracy": 0.0, "delta_cosine": 0.0}, "teacher": {"accuracy": 0.97, "delta_cosine": 1.0}}


def trial(config: str, seed: int, accuracy: float, status: str = "FINISHED") -> TrialResult:
    metrics = {"heldout/accuracy": accuracy, "heldout/delta_cosine": 0.9, "train/accuracy": 0.95, "time/seconds": 60.0}
    metrics |= {"heldout/accuracy_shuffled_prompts": 0.0}
    curves = {"val/accuracy": [(10, accuracy / 2), (20, accuracy)], "loss/total": [(1, 2.0), (2, 1.0)]}
    params = {"model_size": "nano", "seed": str(seed)}
    return TrialResult(f"{config}{seed}", config, seed, status, metrics, curves, params, f"run{config}{seed}")


def trials() -> list[TrialResult]:
    return [trial(config, seed, value) for config, values in VALUES.items() for seed, value in enumerate(values)]


def delta_map() -> DeltaMap:
    rng = np.random.default_rng(0)
    names = tuple(f"{op}/{op}-{form}" for op in ("reverse", "copy") for form in ("stars", "dashes"))
    return DeltaMap(rng.normal(size=(4, 16)), rng.normal(size=(4, 16)), names, "multitask")


def test_the_table_holds_mean_and_sample_deviation(tmp_path: Path) -> None:
    table = write_report(tmp_path, "study", trials(), BASELINES, delta_map())
    for config, values in VALUES.items():
        row = next(line for line in table.splitlines() if line.startswith(f"| {config}"))
        assert f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" in row
    for name in BASELINES:
        assert any(line.startswith(f"| {name}") for line in table.splitlines())


def test_the_file_has_pictures_that_are_there(tmp_path: Path) -> None:
    write_report(tmp_path, "study", trials(), BASELINES, delta_map())
    text = (tmp_path / "report.md").read_text()
    pictures = [part.split(")")[0] for part in text.split("](")[1:]]
    assert len(pictures) >= 3
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_interval_of_the_difference_is_scipys(tmp_path: Path) -> None:
    found = {c["config"]: c for c in result_json("study", trials(), BASELINES)["comparisons"]}
    difference = np.subtract(VALUES["multitask"], VALUES["weight-only"])
    interval = stats.ttest_1samp(difference, 0).confidence_interval(0.95)
    assert found["multitask"]["difference"] == pytest.approx(difference.mean())
    assert found["multitask"]["interval"] == pytest.approx((interval.low, interval.high))
    assert found["multitask"]["p"] == pytest.approx(stats.ttest_1samp(difference, 0).pvalue)


def test_a_failed_trial_is_said_and_not_counted(tmp_path: Path) -> None:
    every = [*trials(), trial("multitask", 3, 0.0, "FAILED")]
    table = write_report(tmp_path, "study", every, BASELINES, None)
    row = next(line for line in table.splitlines() if line.startswith("| multitask"))
    assert f"{np.mean(VALUES['multitask']):.3f}" in row
    assert "fail" in table.lower()


def test_a_worse_method_is_called_worse(tmp_path: Path) -> None:
    flipped = [trial("multitask", s, 0.2) for s in range(3)] + [trial("weight-only", s, 0.5) for s in range(3)]
    top = write_report(tmp_path, "study", flipped, BASELINES, None).splitlines()[0]
    assert top.index("weight-only") < top.index("multitask")


def test_one_seed_claims_no_spread(tmp_path: Path) -> None:
    table = write_report(tmp_path, "study", [trial("multitask", 0, 0.5)], BASELINES, None)
    row = next(line for line in table.splitlines() if line.startswith("| multitask"))
    assert "±" not in row


def test_no_finished_trial_still_makes_a_report(tmp_path: Path) -> None:
    assert write_report(tmp_path, "study", [trial("multitask", 0, float("nan"), "FAILED")], BASELINES, None)
    json.dumps(result_json("study", [trial("multitask", 0, float("nan"), "FAILED")], BASELINES), allow_nan=False)


def test_baselines_are_found_again_in_the_parents_metrics() -> None:
    logged = {"baseline/ridge/accuracy": 0.4, "baseline/ridge/delta_cosine": 0.8, "world/nano/base_accuracy": 0.0}
    assert collect_baselines(logged) == {"ridge": {"accuracy": 0.4, "delta_cosine": 0.8}}
