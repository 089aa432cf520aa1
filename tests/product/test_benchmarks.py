"""Each benchmark runs at its smallest setting and says what it must; no time is asserted."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from torch import Tensor

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a benchmark in this process, its results going to a folder of the test's own; give its JSON line."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()
    monkeypatch.setattr(importlib.import_module("record"), "RESULTS", tmp_path)

    def once(name: str, *options: str) -> dict[str, Any]:
        assert importlib.import_module(f"bench_{name}").main(["--quick", *options]) == 0
        printed = json.loads(capsys.readouterr().out.splitlines()[-1])
        (written,) = tmp_path.rglob("*.json")
        assert written.parent.name == "scratch", "a quick run is no result"
        assert json.loads(written.read_text()) == printed
        assert printed["environment"].keys() >= {
            "commit",
            "clean",
            "python",
            "torch",
            "machine",
            "cpus",
            "load",
        }
        return printed

    yield once
    torch.set_num_threads(threads)


def check_side(side: dict[str, Any]) -> None:
    assert side["median_s"] > 0 and side["cpu_s"] >= 0 and side["spread"] >= 0
    assert side["repeats"] >= 2 and side["peak_mb"] >= 0


@pytest.mark.whole
def test_delta(run: Run) -> None:
    found = run("delta", "--threads", "1")
    sides = {"ours", "peft_in_turn", "peft_adapter_names", "functional_call", "vmap", "hooks"}
    assert found["matrix_gflops"] > 0 and len(found["ratios"]) == 2 * (len(sides) - 1)
    for row in found["results"]:
        assert row["left_out"] == [] and row["relative_difference"].keys() == sides
        assert max(row["relative_difference"].values()) <= 1e-5
        for label in ("forward", "forward_backward"):
            assert row[label]["sides"].keys() == sides and row[label][
                "over_ours"
            ].keys() == sides - {"ours"}
            assert 0 < row[label]["share"]
            for side in row[label]["sides"].values():
                check_side(side)


@pytest.mark.whole
def test_teachers(run: Run) -> None:
    found = run("teachers", "--threads", "1")
    assert (
        found["relative_difference"]["start"] <= 1e-5
        and found["relative_difference"]["final_losses"] <= 1e-3
    )
    assert found["sides"].keys() == {"ours", "peft_in_turn"} and list(found["ratios"]) == [
        "toy K=2 peft_in_turn"
    ]
    for side in found["sides"].values():
        check_side(side)


@pytest.mark.whole
def test_scaling(run: Run) -> None:
    found = run("scaling", "--threads", "1")
    assert found["exponents"].keys() == {"adapters", "probes", "tokens", "rank", "tasks"}
    assert all("memory_exponent" in row and len(row["points"]) == 2 for row in found["results"])


@pytest.mark.whole
def test_train_step(run: Run) -> None:
    found = run("train_step")
    assert max(found["relative_difference"].values()) <= 1e-5 and 0 < found["padding"] < 1
    parts = {
        "step_cpu_s",
        "step_wall_s",
        "draw_cpu_s",
        "generator_cpu_s",
        "optimiser_cpu_s",
        "delta_cpu_s",
        "products_s",
        "step_gflop",
        "matrix_gflops",
    }
    for side in found["sides"].values():
        assert side.keys() == parts | {"spread", "peak_mb"} and all(
            side[name] > 0 for name in parts
        )
        rate = side["step_gflop"] / side["products_s"]
        assert rate == pytest.approx(side["matrix_gflops"])


def test_generate(run: Run, cache: Path) -> None:
    found = run("generate", "--threads", "1", "--cache", str(cache))
    assert found["seconds"] > 0 and found["peak_mb"] >= 0 and len(found["results"]) == 2
    for task in found["results"]:
        assert task["teacher"]["reached"] == (
            task["teacher"]["accuracy"] >= task["generated_accuracy"]
        )


def test_step(run: Run) -> None:
    (row,) = run("step", "--device", "cpu")["results"]
    assert row["seconds"] > 0 and row["peak_gb"] >= 0 and row["estimated_peak_gb"] > 0


@pytest.mark.slow
def test_sweep(run: Run, cache: Path) -> None:
    found = run("sweep", "--cache", str(cache), "--seeds", "0", "--steps", "4")
    assert found["over_ideal"] > 0 and found["over_own"] > 0 and found["spread"] == 0


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("timing")


def test_sides_that_differ_are_not_compared(timing: Any) -> None:
    right = torch.ones(4)
    assert timing.check_same("sums", right, right) == 0
    for wrong in (right + 1e-4, right * float("nan")):
        with pytest.raises(RuntimeError, match="sums differ by"):
            timing.check_same("sums", wrong, right)


def test_repeats_are_interleaved_in_both_orders(timing: Any) -> None:
    order: list[str] = []
    found = timing.interleave(
        {name: lambda name=name: order.append(name) for name in "ab"}, repeats=2
    )
    assert order[-4:] == ["a", "b", "b", "a"] and len(order) == 8
    assert [len(found[name].wall_s) for name in "ab"] == [2, 2]


def test_all_matrix_products_of_a_run_are_counted(timing: Any) -> None:
    left, right = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 5, 6)
    out, weight = torch.zeros(3, 4, 6), torch.randn(7, 5, requires_grad=True)
    product = 2 * 3 * 4 * 5 * 6
    assert timing.matrix_flops(lambda: torch.bmm(left, right).sum().backward()) == 2 * product
    assert timing.matrix_flops(lambda: out.baddbmm_(left.detach(), right)) == product
    assert timing.matrix_flops(lambda: out[0].addmm_(left.detach()[0], right[0])) == product // 3
    both = timing.matrix_flops(lambda: torch.nn.functional.linear(left, weight).sum().backward())
    assert both == 3 * 2 * 12 * 5 * 7  # forward, and the gradients of input and weight
    assert timing.matrix_flops(lambda: left.softmax(-1) * 2) == 0


def test_exponents_are_those_of_the_law(timing: Any) -> None:
    assert timing.slope([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
    assert timing.slope([1, 2, 4], [5.0, 5.0, 5.0]) == pytest.approx(0)


def test_the_spread_is_the_interquartile_range_over_the_median(timing: Any) -> None:
    assert (
        timing.spread((1.0, 2.0, 3.0, 4.0, 5.0)) == pytest.approx(2 / 3)
        and timing.spread((1.0,)) == 0
    )


def test_peak_memory_counts_what_a_run_takes(timing: Any) -> None:
    def take() -> Tensor:
        return torch.ones(16 * 2**20)

    if timing.reset_resident_peak() == 0:
        pytest.skip("this system does not tell the peak memory of a process")
    assert 60e6 < timing.peak_memory(take) < 90e6


def test_flops_are_4_a_linear_weight_and_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    peers = importlib.import_module("peers")
    problem = peers.make_problem(peers.make_model("toy"), rank=2, adapters=3, probes=2, tokens=5)
    linear = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)
    assert (
        problem.flops(backward=True) == 4 * linear * 3 * 2 * 5 == 2 * problem.flops(backward=False)
    )


def test_a_ratio_below_80_percent_of_the_committed_one_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    check = importlib.import_module("check")
    assert check.committed("delta", tmp_path) == {}
    for month, ratio in (("202601", 1.0), ("202602", 5.0)):
        (tmp_path / f"delta_cpu_{month}.json").write_text(
            json.dumps({"ratios": {"nano K=8 hooks": ratio}})
        )
    before = check.committed("delta", tmp_path)
    assert before == {"nano K=8 hooks": 5.0}
    assert check.fallen(before, {"nano K=8 hooks": 4.01}) == []
    (fell,) = check.fallen(before, {"nano K=8 hooks": 3.99, "other": 0.1})
    assert "3.99" in fell and "5.00" in fell
    with pytest.raises(ValueError, match="no ratio in common"):
        check.fallen(before, {"other": 1.0})


@pytest.mark.parametrize("name", ["delta", "teachers", "train_step"])
def test_bench_check_asks_for_options_that_exist(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    options: Sequence[str] = importlib.import_module("check").QUICK[name]
    assert isinstance(
        importlib.import_module(f"bench_{name}").parse_arguments(options), argparse.Namespace
    )


@pytest.mark.whole
def test_main_job(run: Run) -> None:
    found = run("main_job")
    cold, warm = found["cold"], found["warm"]
    assert {"bases", "banks", "deltas", "sweep"} <= cold["parts_s"].keys()
    assert warm["parts_s"].keys() == {"sweep"} and warm["world"] == cold["world"] is not None
    assert min(cold["wall_s"], warm["wall_s"]) > 0 < warm["processor_s"]
