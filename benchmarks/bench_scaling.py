"""Growth of costs: exponents of seconds in adapters, probes, tokens and rank, and of an evaluation in its tasks.

    python benchmarks/bench_scaling.py

Each axis is doubled from a middle setting, all its points being timed in turn; an exponent of 1 is linear, below 1
something is shared. Exponents are fitted to processor seconds. `tasks` is an evaluation (exact match and deltas) of so
many adapters; the exponent of its peak memory says whether it goes in chunks. The last line of standard output is one
JSON object; see `record.py` for where it goes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peers import SETTINGS, Ours, make_model, make_problem
from record import environment, save
from timing import Timing, interleave, slope
from transformers import PreTrainedModel

from llgbm.delta import EncodedProbes, measure_deltas
from llgbm.lora import LoraBatch, LoraSpec
from llgbm.models.encoding import EncodedPairs

MIDDLE = {"adapters": 16, "probes": 8, "tokens": 24, "rank": 4}
POINTS = {
    "adapters": [8, 16, 32, 64],
    "probes": [4, 8, 16, 32],
    "tokens": [16, 32, 64, 128],
    "rank": [4, 8, 16, 32],
    "tasks": [64, 128, 256, 512],
}
QUICK = {"adapters": [1, 2], "probes": [1, 2], "tokens": [4, 8], "rank": [1, 2], "tasks": [2, 4]}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(SETTINGS), default="nano")
    parser.add_argument("--axes", nargs="+", choices=tuple(POINTS), default=list(POINTS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--quick", action="store_true", help="a toy size; says nothing but that it runs"
    )
    options = parser.parse_args(argv)
    if options.quick:
        options.size, options.repeats = "toy", 2
    return options


def training_pass(model: PreTrainedModel, axis: str, value: int) -> Callable[[], Any]:
    """States and gradients with one number of the middle setting changed."""
    problem = make_problem(model, **{**MIDDLE, axis: value})
    return partial(Ours(problem).run, True)


def evaluation(model: PreTrainedModel, adapters: int) -> Callable[[], Any]:
    """Deltas of so many adapters on shared probes, then their exact match on texts of their own."""
    from llgbm.lora.apply import adapters_applied, chunks
    from llgbm.models.scoring import right_answers

    spec = LoraSpec.from_model(model, MIDDLE["rank"], 8.0)
    generator = torch.Generator().manual_seed(2)
    batch = LoraBatch.unflatten(
        spec, 0.05 * torch.randn(adapters, spec.n_values, generator=generator)
    )
    ids = torch.randint(
        model.config.vocab_size, (MIDDLE["probes"], MIDDLE["tokens"]), generator=generator
    )
    shared = ids.expand(adapters, *ids.shape)
    last = torch.full((*shared.shape[:2], 1), shared.shape[2] - 1)
    probes = EncodedProbes(shared, last, torch.ones_like(last, dtype=torch.bool))
    targets = torch.full_like(ids, -100)
    targets[:, -4:] = 1
    texts = EncodedPairs(ids, targets)

    def run() -> None:
        measure_deltas(model, spec, batch, probes, shared=True)
        for rows in chunks(adapters, ids.numel(), 24):
            count = len(range(adapters)[rows])
            own = EncodedPairs(
                texts.input_ids_ST.repeat(count, 1), texts.targets_ST.repeat(count, 1)
            )
            with torch.no_grad(), adapters_applied(model, batch.select(rows), spec.scaling):
                right_answers(model, own)

    return run


def measure(model: PreTrainedModel, axis: str, points: list[int], repeats: int) -> dict[str, Any]:
    """Seconds and peak memory at each point of an axis, and the exponents fitted to them."""
    make = partial(evaluation, model) if axis == "tasks" else partial(training_pass, model, axis)
    timings: dict[str, Timing] = interleave({str(point): make(point) for point in points}, repeats)
    seconds = [statistics.median(timings[str(point)].cpu_s) for point in points]
    peaks = [float(max(1, timings[str(point)].peak_bytes)) for point in points]
    return {
        "axis": axis,
        "exponent": slope(points, seconds),
        "memory_exponent": slope(points, peaks),
        "points": {point: timing.as_dict() for point, timing in timings.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    torch.set_num_threads(options.threads)
    model = make_model(options.size)
    points = QUICK if options.quick else POINTS
    results = [measure(model, axis, points[axis], options.repeats) for axis in options.axes]
    for row in results:
        print(f"{row['axis']}: seconds ~ n^{row['exponent']:.2f}", file=sys.stderr)
    result = {
        "benchmark": "scaling",
        "config": {**vars(options), "middle": MIDDLE},
        "environment": environment("torch", "transformers"),
        "exponents": {row["axis"]: row["exponent"] for row in results},
        "results": results,
    }
    save("scaling_cpu", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
