"""Decoder of `dnd` beside a straightforward implementation of the same layers: same weights, same outputs, one run.

    python benchmarks/bench_decoder.py                          # embedded and reduced sizes, on the CPU
    python benchmarks/bench_decoder.py --device cuda --shapes paper-0.5B --dtype bfloat16

The two are timed in turn, forward and forward with backward: on the CPU one thread in seconds of CPU time, which
other work on the machine moves least; on a GPU in seconds by the clock. Medians and their ratio are printed, and the
last line of standard output is one JSON object. It is written to `benchmarks/results/decoder_<device>_<yyyymm>.json`,
or, where the working tree differs from its commit, to the ignored folder `scratch/` there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from dnd.model import HyperConvDecoder
from dnd.recipes import COMMON_SENSE
from record import environment, save
from torch import Tensor, nn
from torch.nn import functional as F

PAPER = ((128, 384, 384), *COMMON_SENSE.features, (4296, 10, 130))
# (features, kernel size, batch). The embedded sizes are those of LLGBM's generator `hyperconv`. `paper-0.5B` holds
# 1.11 G weights, for a GPU; the one of an eighth has an eighth of its widths and rows, the same depth and kernel.
SHAPES: dict[str, tuple[tuple[tuple[int, int, int], ...], int, int]] = {
    "nano": (((32, 6, 66), (128, 6, 66)), 3, 16),
    "micro": (((66, 6, 66), (265, 6, 66)), 3, 16),
    "paper-0.5B/8": (
        tuple((n // 8, max(10, length // 8), max(16, c // 8)) for n, length, c in PAPER),
        9,
        1,
    ),
    "paper-0.5B": (PAPER, 9, 1),
}


def plain_layer(layer: nn.Module, x_BNLC: Tensor) -> Tensor:
    """One layer as the formulas say: each convolution gets its channels second, in memory of its own."""
    mix = layer.linear1
    x = mix.norm(x_BNLC)
    first = over_height(mix.conv1h, over_width(mix.conv1w, x))
    second = over_width(mix.conv2w, over_height(mix.conv2h, x))
    return layer.linear2((first + second.tanh() + mix.bias) / 3)


def over_width(conv: nn.Conv2d, x_BNLC: Tensor) -> Tensor:
    x_BCLN = x_BNLC.permute(0, 3, 2, 1).contiguous()
    return F.conv2d(x_BCLN, conv.weight, padding="same").permute(0, 3, 2, 1).contiguous()


def over_height(conv: nn.Conv2d, x_BNLC: Tensor) -> Tensor:
    x_BLNC = x_BNLC.permute(0, 2, 1, 3).contiguous()
    return F.conv2d(x_BLNC, conv.weight, padding="same").permute(0, 2, 1, 3).contiguous()


def plain_decoder(model: HyperConvDecoder, x_BNLC: Tensor) -> Tensor:
    for layer in model.decoder.module_list:
        y = plain_layer(layer, x_BNLC)
        x_BNLC = x_BNLC + y if x_BNLC.shape == y.shape else y
    return x_BNLC


def seconds(run: Callable[[], Tensor], backward: bool, device: str) -> float:
    """Time of one pass."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    started = clock()
    with torch.set_grad_enabled(backward):
        out = run()
        if backward:
            out.square().mean().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def compare(
    shapes: str, device: str, dtype: torch.dtype, repeats: int, batch: int | None
) -> dict[str, object]:
    """Both implementations on one set of shapes. Raises RuntimeError where their outputs differ."""
    features, kernel_size, usual = SHAPES[shapes]
    torch.manual_seed(0)
    model = HyperConvDecoder(features, features[0], kernel_size).to(device, dtype)
    x = torch.randn(batch or usual, *features[0], device=device, dtype=dtype)
    runs = {"ours": lambda: model(x), "plain": lambda: plain_decoder(model, x)}
    with torch.no_grad():
        ours, plain = runs["ours"]().float(), runs["plain"]().float()
    error = ((ours - plain).abs().max() / plain.abs().max()).item()
    if error > (1e-4 if dtype == torch.float32 else 3e-2):
        raise RuntimeError(
            f"{shapes}: the outputs differ by {error:.1e} of the largest value: nothing to compare"
        )
    result: dict[str, object] = {
        "shapes": shapes,
        "batch": len(x),
        "parameters": sum(p.numel() for p in model.parameters()),
        "largest_relative_difference": error,
    }
    for name, backward in (("forward", False), ("forward_backward", True)):
        times: dict[str, list[float]] = {"ours": [], "plain": []}
        for repeat in range(repeats + 1):
            for key in sorted(times, reverse=bool(repeat % 2)):
                model.zero_grad(set_to_none=True)
                times[key].append(seconds(runs[key], backward, device))
        mid = {
            key: median(found[1:]) for key, found in times.items()
        }  # the first pass of each warms up
        result[name] = {
            **{f"{k}_s": v for k, v in mid.items()},
            "plain_over_ours": mid["plain"] / mid["ours"],
        }
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--shapes", nargs="+", choices=tuple(SHAPES), default=["nano", "micro", "paper-0.5B/8"]
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch", type=int, help="adapters at once (default: by the shapes)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, options.dtype)
    facts: dict[str, Any] = {
        **environment("torch"),
        "clock": "wall" if options.device == "cuda" else "CPU time of one thread",
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
    }
    rows = []
    for shapes in options.shapes:
        rows.append(compare(shapes, options.device, dtype, options.repeats, options.batch))
        print(f"{shapes}: {json.dumps(rows[-1])}", file=sys.stderr)
    result = {
        "benchmark": "decoder",
        "config": vars(options),
        "environment": facts,
        "results": rows,
    }
    save(f"decoder_{options.device}", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
