"""Interleaved timing, spread, peak memory, and the matrix rate of the machine: what all benchmarks share."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llgbm.runtime import release_device_memory

TOLERANCE = 1e-5
Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of every repeat by the clock and of the processor, and the memory that one run takes at its peak."""

    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]
    peak_bytes: int

    @property
    def median_s(self) -> float:
        return statistics.median(self.wall_s)

    def as_dict(self) -> dict[str, Any]:
        """Medians, the interquartile range as a share of the median, and the peak in MB."""
        return {
            "median_s": _digits(self.median_s),
            "spread": _digits(spread(self.wall_s)),
            "cpu_s": _digits(statistics.median(self.cpu_s)),
            "repeats": len(self.wall_s),
            "peak_mb": round(self.peak_bytes / 1e6, 1),
        }


def spread(seconds: tuple[float, ...]) -> float:
    """Interquartile range over the median; 0 for a single value."""
    if len(seconds) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / middle


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def interleave(runs: Mapping[str, Run], repeats: int, device: str = "cpu") -> dict[str, Timing]:
    """Time the runs in turn, each repeat in the opposite order, after two passes of each that are not timed.

    The second pass measures the memory. Interleaving lets a machine that slows down meanwhile treat all runs alike.
    """
    for run in runs.values():
        run()
    peaks = {name: peak_memory(run, device) for name, run in runs.items()}
    wall: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        names = list(runs) if repeat % 2 == 0 else list(reversed(runs))
        for name in names:
            started, cpu_started = time.perf_counter(), time.process_time()
            runs[name]()
            synchronize(device)
            wall[name].append(time.perf_counter() - started)
            processor[name].append(time.process_time() - cpu_started)
    return {name: Timing(tuple(wall[name]), tuple(processor[name]), peaks[name]) for name in runs}


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_memory(run: Run, device: str = "cpu") -> int:
    """Bytes that one run takes above what was held before it. 0 where the system does not tell."""
    release_device_memory()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = reset_resident_peak()
    run()
    return max(0, resident_peak() - before)


def reset_resident_peak() -> int:
    """Start the count of the process's peak memory anew (Linux); return the bytes held now, 0 elsewhere."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return resident_peak()


def resident_peak() -> int:
    """Peak resident bytes of this process since the last reset. 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def matrix_rate(
    device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 2048, repeats: int = 9
) -> float:
    """FLOP/s of the best of several products of two square matrices: what the machine can do at most."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    seconds = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[2:])


def matrix_flops(run: Run) -> int:
    """FLOPs of the matrix products of a run, backward passes and products in place too; nothing else is counted."""
    from torch.utils.flop_counter import FlopCounterMode

    def of_shapes(_added: Any, left: Any, right: Any, **_: Any) -> int:
        return 2 * math.prod(left) * right[-1]

    # The counter does not know products in place by itself.
    in_place = dict.fromkeys((torch.ops.aten.baddbmm_, torch.ops.aten.addmm_), of_shapes)
    with FlopCounterMode(display=False, custom_mapping=in_place) as counted:
        run()
    return counted.get_total_flops()


def relative_difference(left: Tensor, right: Tensor) -> float:
    """Norm of the difference over the norm of `right`."""
    gap = (left.detach().double() - right.detach().double()).norm()
    return (gap / right.detach().double().norm().clamp_min(1e-30)).item()


def check_same(what: str, left: Tensor, right: Tensor, tolerance: float = TOLERANCE) -> float:
    """Return the relative difference. Raises RuntimeError where it is above `tolerance`: nothing to compare."""
    difference = relative_difference(left, right)
    if not difference <= tolerance:
        raise RuntimeError(
            f"{what} differ by {difference:.1e} of their norm, allowed is {tolerance:.0e}"
        )
    return difference


def slope(sizes: list[int], values: list[float]) -> float:
    """Exponent b of the least-squares fit value = a * size^b on logarithms; 1 is linear."""
    x, y = (
        torch.tensor([float(v) for v in series], dtype=torch.float64).log()
        for series in (sizes, values)
    )
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())
