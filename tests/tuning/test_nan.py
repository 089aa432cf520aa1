"""A value that is not a number never wins: not in a search, not as the best trial, champion or baseline."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
from mlflow.entities import Metric, Run, RunData, RunInfo
from test_champions import measured
from test_points import BOTH, SPACE, finish, fresh, score

from llgbm.evaluation import baselines
from tuning.registry.best import best_baseline, read_candidates, register_best
from tuning.registry.champions import Measured, Rivals, decide_alias
from tuning.report.groups import Group, compare, ranked
from tuning.report.record import collect_baselines
from tuning.search.points import describe_best
from tuning.studies.spec import TrialSpec
from tuning.sweep.artifacts import best_trials
from tuning.tracking.runs import TrialResult
from tuning.tracking.runs import measured as metrics_of

ODD = [math.nan, math.inf, -math.inf]
ACCURACY = "val/accuracy"


def trial(name: str, value: float, seed: int = 0, **more: Any) -> TrialResult:
    metrics = {ACCURACY: value, "heldout/accuracy": value}
    given: dict[str, Any] = {"params": {"model_size": "nano"}, "run_id": f"run-{name}", **more}
    return TrialResult(f"{name}-{seed}", name, seed, "FINISHED", metrics, **given)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("objectives", [BOTH[:1], BOTH])
def test_a_point_of_a_search_fails(odd: float, objectives: tuple[str, ...]) -> None:
    search = fresh(replace(SPACE, objectives=objectives), 3)

    def result(spec: TrialSpec) -> dict[str, Any]:
        one = spec.config.seed == 1 and len(search.study.trials) == 2
        return {**score(spec), **({objectives[-1]: odd} if one else {})}

    finish(search, result)
    states = [point.state for point in search.study.trials]
    assert states == [optuna.trial.TrialState[s] for s in ("COMPLETE", "FAIL", "COMPLETE")]
    assert "best of 2 points" in describe_best(search.space, search.study)
    assert search.retry_failed() == 1


@pytest.mark.parametrize("odd", ODD)
def test_a_run_has_only_metrics_that_are_finite(odd: float) -> None:
    info = RunInfo("run", "1", "me", "FINISHED", 0, 1, "active")
    run = Run(info, RunData([Metric(ACCURACY, odd, 0, 0), Metric("best_step", 7, 0, 0)], [], []))
    assert metrics_of(run) == TrialResult.of(run, "a").metrics == {"best_step": 7}
    curves = {ACCURACY: [(0, 0.5), (1, odd)], "best_step": [(0, 7.0)]}
    assert TrialResult.of(run, "a", curves).metrics == {"best_step": 7}


@pytest.mark.parametrize("odd", ODD)
def test_it_is_not_among_the_best_trials(odd: float) -> None:
    order = [trial("a", 0.2), trial("b", odd), trial("c", 0.4), trial("d", odd), trial("e", 0.3)]
    for results in (order, order[::-1], order[1:] + order[:1]):
        assert [r.config for r in best_trials(results, ACCURACY, 9)] == ["c", "e", "a"]


@pytest.mark.parametrize("odd", ODD)
def test_it_is_not_registered(odd: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a trial without a score, nor one with a task without one."""
    taken: list[str] = []

    class Tracker:
        def download_artifacts(self, run_id: str, path: str, folder: str) -> str:
            figures = {"one": 0.5, "two": odd if run_id == "run-c" else 0.5}
            written = Path(folder) / "file"
            written.write_text(json.dumps({"val": {"accuracy": figures}}))
            return str(written)

    results = [trial("a", odd), trial("b", 0.4), trial("c", 0.9)]
    assert [t.config for t, _ in read_candidates(Tracker(), results[1:], ACCURACY)] == ["b"]  # type: ignore[arg-type]

    def register(study: Any, spec: Any, world: Any, tracker: Any, run_id: str, score: Any) -> Any:
        taken.append(run_id)
        return SimpleNamespace(name="x", version=1, alias="champion")

    monkeypatch.setattr("tuning.registry.best.register", register)
    world = SimpleNamespace(size="nano", hash="w", config=SimpleNamespace(smoke=True))
    config = SimpleNamespace(seed=0)
    specs = [SimpleNamespace(id=r.trial_id, world=world, name="x", config=config) for r in results]
    study = SimpleNamespace(trials=specs, metric=ACCURACY)
    register_best(study, {"w": world}, results, Tracker(), Path())  # type: ignore[arg-type, dict-item]
    assert taken == ["run-b"]


@pytest.mark.parametrize("odd", ODD)
def test_it_is_no_champion(odd: float) -> None:
    assert decide_alias(None, measured(odd, per_task={})).alias == "challenger"
    assert decide_alias(measured(0.1), measured(odd)).alias == "challenger"
    tags = {"llgbm.val_score": "0.5", "llgbm.val_per_task": json.dumps({"one": odd, "two": 0.5})}
    assert Measured.from_tags("1", tags).per_task == {"two": 0.5}


@pytest.mark.parametrize("odd", ODD)
def test_it_is_no_best_baseline(odd: float, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"ridge": odd, "best_single": 0.3, "mean_adapter": 0.1}
    found = {name: {"accuracy": value} for name, value in values.items()}
    monkeypatch.setattr(baselines, "known_baselines", lambda *_: found)
    world: Any = SimpleNamespace(config=SimpleNamespace(smoke=False), data=None, lora_model=None)
    assert best_baseline(Path(), world, ACCURACY) == ("best_single", 0.3)
    del found["best_single"], found["mean_adapter"]
    assert best_baseline(Path(), world, ACCURACY) is None
    assert decide_alias(None, measured(0.5), Rivals(baseline=None)).alias == "champion"


@pytest.mark.parametrize("odd", ODD)
def test_it_is_not_what_a_report_calls_best(odd: float) -> None:
    values = {"a": [0.5, 0.4, 0.6], "b": [odd, odd, odd], "c": [0.3, odd, 0.3]}
    groups = []
    for name, own in values.items():
        trials = tuple(trial(name, value, seed) for seed, value in enumerate(own))
        tasks = {f"run-{name}": {"one": own[0], "two": 0.5}}
        groups.append(Group(name, "nano", name, trials, tasks))
    assert [group.label for group in ranked(groups, "nano")] == ["a", "c"]
    assert all(np.isfinite(c.difference) for c in compare(groups))
    assert max(groups[2].by_seed(ACCURACY).values()) == 0.3


@pytest.mark.parametrize("odd", ODD)
def test_a_reports_baselines_are_finite(odd: float) -> None:
    info = RunInfo("run", "1", "me", "FINISHED", 0, 1, "active")
    kept = [Metric("baseline/ridge/accuracy", odd, 0, 0), Metric("baseline/base/accuracy", 0, 0, 0)]
    found = collect_baselines(metrics_of(Run(info, RunData(kept, [], []))))
    assert found == {"base": {"accuracy": 0.0}}
