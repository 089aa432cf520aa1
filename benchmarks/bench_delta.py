"""States of a base under K adapters on P probes, forward and with backward, beside the other ways of getting them.

    python benchmarks/bench_delta.py                                          # all sizes; about half an hour
    python benchmarks/bench_delta.py --sizes nano --adapters 32 --peers peft_in_turn functional_call

All sides give the same states and gradients (1e-5 of their norm), which is checked first. They are timed in turn.
`over_ours` is another side's median seconds over ours; `cpu_over_ours` the same of processor seconds, for a busy
machine. `share` is our rate over that of the machine's matrix products in the same run, counting 4 * linear
parameters * tokens for a pass forward and back (2 forward): no weight of the base has a gradient, and attention, the
adapters' own products and the head are not counted. A side that would need more than `--memory` GB is left out and said
so. The last line of standard output is one JSON object; see `record.py` for where it goes.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peers import PEERS, SETTINGS, Peer, Problem, make_model, make_problem
from record import environment, save
from timing import check_same, interleave, matrix_rate

PASSES = {"forward": False, "forward_backward": True}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", nargs="+", choices=tuple(SETTINGS), default=["nano", "micro", "wide"]
    )
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--peers", nargs="+", choices=tuple(PEERS)[1:], default=list(PEERS)[1:])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--memory", type=float, default=8.0, help="GB that one side may take (default: 8)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a toy size; says nothing but that it runs"
    )
    options = parser.parse_args(argv)
    if options.quick:
        options.sizes, options.adapters, options.repeats, options.probes, options.tokens = (
            ["toy"],
            [1, 3],
            2,
            2,
            6,
        )
    return options


def check_peers(peers: dict[str, Peer]) -> dict[str, float]:
    """The largest relative difference of each side's states and gradients from ours. Raises RuntimeError above 1e-5."""
    states, gradients = peers["ours"].run(True), peers["ours"].gradients()
    found = {}
    for name, peer in peers.items():
        of_states = check_same(f"the states of ours and {name}", peer.run(True), states)
        found[name] = max(
            of_states, check_same(f"the gradients of ours and {name}", peer.gradients(), gradients)
        )
    return found


def needed_bytes(name: str, problem: Problem) -> float:
    """About what a side takes: `vmap` holds each adapter's own weights with their gradients."""
    return 8.0 * problem.linear_parameters * problem.n_adapters if name == "vmap" else 0.0


def measure(problem: Problem, options: argparse.Namespace, rate: float) -> dict[str, Any]:
    """All sides on one problem."""
    names = ["ours", *options.peers]
    left_out = [name for name in names if needed_bytes(name, problem) > options.memory * 1e9]
    peers = {name: PEERS[name](problem) for name in names if name not in left_out}
    row: dict[str, Any] = {"left_out": left_out, "relative_difference": check_peers(peers)}
    for label, backward in PASSES.items():
        timings = interleave(
            {name: partial(peer.run, backward) for name, peer in peers.items()}, options.repeats
        )
        ours = timings["ours"].as_dict()
        flops = problem.flops(backward)
        row[label] = {
            "sides": {name: timing.as_dict() for name, timing in timings.items()},
            "over_ours": {
                n: t.median_s / timings["ours"].median_s for n, t in timings.items() if n != "ours"
            },
            "cpu_over_ours": {
                n: t.as_dict()["cpu_s"] / ours["cpu_s"] for n, t in timings.items() if n != "ours"
            },
            "gflops": flops / timings["ours"].median_s / 1e9,
            "share": flops / timings["ours"].median_s / rate,
        }
    return row


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings(
        "ignore", "There is a performance drop"
    )  # vmap runs torch's CPU attention in a loop
    rows, ratios, rates = [], {}, []
    for size in options.sizes:
        model, rank = make_model(size), SETTINGS[size][1]
        for adapters in options.adapters:
            rates.append(matrix_rate(size=256 if options.quick else 2048))
            problem = make_problem(model, rank, adapters, options.probes, options.tokens)
            row = {
                "size": size,
                "adapters": adapters,
                "rank": rank,
                **measure(problem, options, max(rates)),
            }
            rows.append(row)
            for peer, ratio in row["forward_backward"]["over_ours"].items():
                ratios[f"{size} K={adapters} {peer}"] = ratio
            print(json.dumps(row), file=sys.stderr)
    result = {
        "benchmark": "delta",
        "config": vars(options),
        "environment": environment("torch", "transformers", "peft"),
        "matrix_gflops": max(rates) / 1e9,
        "ratios": ratios,
        "results": rows,
    }
    save("delta_cpu", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
