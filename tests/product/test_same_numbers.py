"""Compare the numbers of two stores bit by bit, and refuse what cannot be compared."""

from __future__ import annotations

import importlib
import math
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from helpers import ROOT
from made_study import make_study


@pytest.fixture
def same_numbers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the script from its folder."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("same_numbers")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> dict[str, str]:
    """Three stores of one study: the third has another accuracy in one configuration."""
    effects = {"multitask": 0.1, "weight-only": 0.0}
    made = {"base": effects, "here": effects, "changed": {**effects, "multitask": 0.1 + 1e-12}}
    folders = {name: tmp_path_factory.mktemp(name) for name in made}
    for folder in folders.values():
        shutil.copytree(empty_store, folder / "mlruns")
    trackers = {name: make_study(folders[name], effect, seeds=1) for name, effect in made.items()}
    return {name: tracker.tracking_uri for name, tracker in trackers.items()}


def test_equal_stores_have_the_same_numbers(
    same_numbers: ModuleType, stores: dict[str, str]
) -> None:
    base, here = (same_numbers.read_store(stores[name]) for name in ("base", "here"))
    assert list(same_numbers.compare(base, here, with_ids=True)) == []
    assert set(base) == {"made", "multitask, seed 0 nano", "weight-only, seed 0 nano"}
    metrics = base["multitask, seed 0 nano"].metrics
    assert list(metrics["val/accuracy"]) == [10, 20, 30] and "heldout/accuracy" in metrics
    assert not any(key.startswith("time/") for key in metrics)
    assert "baseline/ridge/accuracy" in base["made"].metrics


def test_the_smallest_change_is_named_by_its_first_step(
    same_numbers: ModuleType, stores: dict[str, str]
) -> None:
    base, here = (same_numbers.read_store(stores[name]) for name in ("base", "changed"))
    found = list(same_numbers.compare(base, here, with_ids=True))
    assert {d.run for d in found} == {"multitask, seed 0 nano"}
    assert {(d.what, d.step) for d in found} == {
        ("val/accuracy", "10"),
        ("heldout/accuracy", "30"),
        ("train/accuracy", "30"),
    }
    assert all(
        d.base != d.here and math.isclose(float(d.base), float(d.here), rel_tol=1e-9) for d in found
    )
    assert "heldout/accuracy" in same_numbers.table(found)


def test_ids_runs_metrics_and_steps_are_compared(same_numbers: ModuleType) -> None:
    def record(trial_id: str = "a", **metrics: dict[int, float]) -> object:
        curves = {
            key: {step: value.hex() for step, value in curve.items()}
            for key, curve in metrics.items()
        }
        return same_numbers.RunRecord(trial_id, curves)

    def found(base: dict, here: dict, with_ids: bool = True) -> list[tuple[str, ...]]:
        return [
            (d.run, d.what, d.step, d.base, d.here)
            for d in same_numbers.compare(base, here, with_ids)
        ]

    one = {"t": record(loss={1: 0.5, 2: math.nan})}
    assert found(one, {"t": record(loss={1: 0.5, 2: math.nan})}) == []
    assert found(one, {"t": record("b", loss={1: 0.5, 2: math.nan})}) == [
        ("t", "trial id", "-", "a", "b")
    ]
    assert found(one, {"t": record("b", loss={1: 0.5, 2: math.nan})}, with_ids=False) == []
    assert found(one, {"t": record(loss={1: 0.5})}) == [("t", "loss", "2", "nan", "missing")]
    assert found(one, {"t": record(other={1: 0.5})}) == [
        ("t", "loss", "-", "there", "missing"),
        ("t", "other", "-", "missing", "there"),
    ]
    assert found(one, {}) == [("t", "run", "-", "there", "missing")]
    assert found({"t": record(loss={1: 0.0})}, {"t": record(loss={1: -0.0})}) == [
        ("t", "loss", "1", "0.0", "-0.0")
    ]


def test_what_cannot_be_compared_ends_with_status_2(
    same_numbers: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        same_numbers.unpack_commit("no-such-commit", tmp_path)
    assert ended.value.code == 2 and "'no-such-commit'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        same_numbers.run_side(tmp_path, tmp_path / "side", ["--smoke"])
    assert ended.value.code == 2 and "cannot be imported from there" in capsys.readouterr().err


@pytest.mark.whole
def test_a_sweep_that_fails_is_told_in_its_own_words(
    same_numbers: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        same_numbers.run_side(ROOT, tmp_path / "side", ["--steps", "0"])
    said = capsys.readouterr().err
    assert (
        ended.value.code == 2
        and f"the sweep of {ROOT} ended with status 2" in said
        and "steps is 0" in said
    )
