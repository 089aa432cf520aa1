"""All that a GPU can show, in under nine minutes: parity, many adapters at once, training steps, processes on one card.

    PYTHONPATH=.:dnd_repo/workspace python benchmarks/bench_gpu.py
    PYTHONPATH=.:dnd_repo/workspace python benchmarks/bench_gpu.py --cpu       # the same code at toy sizes

It needs torch, transformers, peft and accelerate; nothing is downloaded, all weights are random. Parts run in this
order, and one that would start after `--minutes` is left out and said so:

1. `parity`: states and gradients of 0.5B on the card, float32 and bfloat16, beside the CPU's float32.
2. `delta`: 0.5B, K = 16, P = 5, 64 tokens, in bfloat16, forward and back, beside PEFT in turn, PEFT's `adapter_names`,
   functional_call and hooks.
3. `large`: ours at larger K x P and at 1.5B, with the share of the card's matrix rate (4 * linear parameters * tokens).
4. `step`: a training step of both sizes, its peak memory beside the estimate.
5. `processes`: steps a second of four trainings on one card at once over those of one.

After each part its result goes to stderr. The last line of standard output is one JSON object; see `record.py`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bench_step
import torch
from peers import PEERS, SETTINGS, Ours, make_model, make_problem
from record import environment, save
from timing import check_same, interleave, matrix_rate, relative_difference
from torch import Tensor, nn

from llgbm.runtime import UserError, exit_status, say

# Relative differences allowed: another order of sums in float32; 8 bits of mantissa through all layers in bfloat16.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
SIDES = ("peft_in_turn", "peft_adapter_names", "functional_call", "hooks")


@dataclass(frozen=True)
class Plan:
    """Sizes and repeats of one form of this benchmark. `large` holds (setting, adapters, probes, tokens)."""

    device: str
    small: str
    delta: tuple[int, int, int]
    large: tuple[tuple[str, int, int, int], ...]
    steps: tuple[str, ...]
    processes: int
    process_size: str
    process_steps: int
    repeats: int
    matrix_size: int


HALF, LARGER = "qwen2.5-0.5b", "qwen2.5-1.5b"
GPU = Plan(
    device="cuda",
    small=HALF,
    delta=(16, 5, 64),
    large=(
        (HALF, 32, 8, 64),
        (HALF, 64, 8, 64),
        (HALF, 128, 8, 64),
        (LARGER, 16, 5, 64),
        (LARGER, 32, 8, 64),
        (LARGER, 64, 8, 64),
    ),
    steps=(HALF, LARGER),
    processes=4,
    process_size="nano",
    process_steps=200,
    repeats=5,
    matrix_size=8192,
)
TOY = Plan(
    device="cpu",
    small="toy",
    delta=(2, 2, 6),
    large=(("toy", 3, 2, 6),),
    steps=("toy",),
    processes=2,
    process_size="toy",
    process_steps=2,
    repeats=2,
    matrix_size=128,
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cpu", action="store_true", help="toy sizes on the CPU: shows that all of it runs"
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="after these no part is started (default: 8)"
    )
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def parity(plan: Plan) -> dict[str, Any]:
    """Relative differences of states and gradients from those of the CPU in float32, by dtype."""
    on_cpu = make_model(plan.small)
    size = (SETTINGS[plan.small][1], 2, 2, min(16, plan.delta[2]))
    reference = Ours(make_problem(on_cpu, *size))
    states = reference.run(True)
    found: dict[str, Any] = {}
    for dtype, allowed in ALLOWED.items():
        model = nn.Module.to(copy.deepcopy(on_cpu), plan.device, dtype)
        ours = Ours(make_problem(model, *size))
        got = ours.run(True)
        found[str(dtype).removeprefix("torch.")] = {
            "states": check_same("states of CPU and device", got.cpu(), states, allowed),
            "gradients": check_same(
                "gradients", ours.gradients().cpu(), reference.gradients(), allowed
            ),
        }
    return found


def delta(plan: Plan) -> dict[str, Any]:
    """All sides at the usual size, forward and back. They agree as far as the dtype lets them."""
    dtype = torch.bfloat16
    model = make_model(plan.small, plan.device, dtype)
    problem = make_problem(model, SETTINGS[plan.small][1], *plan.delta)
    peers = {name: PEERS[name](problem) for name in ("ours", *SIDES)}
    states, gradients = peers["ours"].run(True), peers["ours"].gradients()
    differences = {}
    for name in SIDES:
        of_states = check_same(
            f"the states of {name}", peers[name].run(True), states, ALLOWED[dtype]
        )
        of_gradients = check_same(
            f"the gradients of {name}", peers[name].gradients(), gradients, ALLOWED[dtype]
        )
        differences[name] = max(of_states, of_gradients)
    timings = interleave(
        {name: partial(peer.run, True) for name, peer in peers.items()}, plan.repeats, plan.device
    )
    rate = matrix_rate(plan.device, dtype, plan.matrix_size)
    ours = timings["ours"].median_s
    return {
        "relative_difference": differences,
        "sides": {name: timing.as_dict() for name, timing in timings.items()},
        "over_ours": {
            name: timing.median_s / ours for name, timing in timings.items() if name != "ours"
        },
        "tflops": problem.flops(True) / ours / 1e12,
        "matrix_tflops": rate / 1e12,
        "share": problem.flops(True) / ours / rate,
    }


def large(plan: Plan) -> list[dict[str, Any]]:
    """Ours at large K x P; a size that does not fit the card says so."""
    rate = matrix_rate(plan.device, torch.bfloat16, plan.matrix_size)
    rows = []
    for setting, *size in plan.large:
        row = {"size": setting} | dict(zip(("adapters", "probes", "tokens"), size, strict=True))
        try:
            rows.append(row | at_size(plan, setting, size, rate))
        except torch.cuda.OutOfMemoryError as error:
            rows.append(row | {"left_out": f"out of memory: {str(error).splitlines()[0]}"})
        release(plan)
    return rows


def at_size(plan: Plan, setting: str, size: Sequence[int], rate: float) -> dict[str, Any]:
    """Time ours at one size, forward and back."""
    model = make_model(setting, plan.device, torch.bfloat16)
    problem = make_problem(model, SETTINGS[setting][1], *size)
    ours = Ours(problem)
    timing = interleave({"ours": partial(ours.run, True)}, plan.repeats, plan.device)["ours"]
    return {
        **timing.as_dict(),
        "tflops": problem.flops(True) / timing.median_s / 1e12,
        "share": problem.flops(True) / timing.median_s / rate,
        "repeat_difference": repeat_difference(ours),
    }


def repeat_difference(ours: Ours) -> float:
    """Relative difference of the gradients of two equal runs: 0 where the kernels are deterministic."""

    def gradients() -> Tensor:
        ours.run(True)
        return ours.gradients().clone()

    return relative_difference(gradients(), gradients())


def step(plan: Plan) -> list[dict[str, Any]]:
    """A training step of each size, with its peak memory beside the estimate."""
    quick = ["--quick"] if plan.device == "cpu" else []
    rows = []
    for name in plan.steps:
        options = bench_step.parse_arguments(["--device", plan.device, "--sizes", name, *quick])
        row = bench_step.measure(name, options, plan.device)
        rows.append(
            row | {"peak_over_estimate": row["peak_gb"] / max(1e-9, row["estimated_peak_gb"])}
        )
        release(plan)
    return rows


def processes(plan: Plan) -> dict[str, Any]:
    """Steps a second of several trainings at once, each in a process of its own, over those of one."""
    alone = run_workers(plan, 1)
    together = run_workers(plan, plan.processes)
    return {
        "one": alone,
        "together": together,
        "processes": plan.processes,
        "throughput_gain": together / alone,
    }


def run_workers(plan: Plan, count: int) -> float:
    """Steps a second of `count` workers from a common start to the end of the last."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(Path(__file__)),
        "--worker",
        *(["--cpu"] * (plan.device == "cpu")),
    ]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    try:
        for worker in workers:
            assert worker.stdout and worker.stdout.readline().strip() == "ready"
        started = time.perf_counter()
        for worker in workers:
            assert worker.stdin
            worker.stdin.close()
        if any(worker.wait() for worker in workers):
            raise RuntimeError("a training beside others failed: see above")
        return count * plan.process_steps / (time.perf_counter() - started)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            assert worker.stdout
            worker.stdout.close()


def work(plan: Plan) -> None:
    """Train one generator: warm up, say so, wait for the start, take the steps."""
    from llgbm.functional import FunctionalLoRA
    from llgbm.training import TrainingConfig, Trial

    torch.set_num_threads(1)
    rank = SETTINGS[plan.process_size][1]
    lora_model = FunctionalLoRA(make_model(plan.process_size, plan.device), rank, 2.0 * rank)
    config = TrainingConfig(steps=plan.process_steps + 5, n_probes=4)
    data = bench_step.make_data(lora_model, 32, 8, 24, plan.device)
    trial = Trial(config, data, lora_model)
    batches = iter(trial.batches())
    for _ in range(5):
        trial.advance(next(batches))
    print("ready", flush=True)
    sys.stdin.read()
    for batch in batches:
        trial.advance(batch)


def release(plan: Plan) -> None:
    gc.collect()
    if plan.device == "cuda":
        torch.cuda.empty_cache()


PARTS: dict[str, Callable[[Plan], Any]] = {
    "parity": parity,
    "delta": delta,
    "large": large,
    "step": step,
    "processes": processes,
}


def run_parts(plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    """The results of the parts, their seconds, and those left out for want of time or memory."""
    started, found = time.perf_counter(), {}
    for name in options.parts:
        begun = time.perf_counter()
        if begun - started > 60 * options.minutes:
            found[name] = {"left_out": f"{options.minutes:g} minutes were over"}
            continue
        try:
            found[name] = {"result": PARTS[name](plan)}
        except torch.cuda.OutOfMemoryError as error:
            found[name] = {"left_out": f"out of memory: {str(error).splitlines()[0]}"}
        found[name]["seconds"] = round(time.perf_counter() - begun, 1)
        release(plan)
        say(f"{name}: {json.dumps(found[name])}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    plan = TOY if options.cpu else GPU
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "torch sees no GPU here: run this where there is one, or with --cpu at toy sizes"
        )
    if options.worker:
        work(plan)
        return 0
    torch.backends.cuda.matmul.allow_tf32 = False
    card = torch.cuda.get_device_name() if plan.device == "cuda" else "cpu"
    result = {
        "benchmark": "gpu",
        "config": {"quick": options.cpu, "minutes": options.minutes, "parts": options.parts},
        "environment": {
            **environment("torch", "transformers", "peft", "accelerate"),
            "device": card,
        },
        **run_parts(plan, options),
    }
    save("gpu_toy" if options.cpu else "gpu", result)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, debug=False))
