"""`make ablation` cold and warm: wall seconds of the whole command, and of its parts.

    python benchmarks/bench_main_job.py                  # twice the default study: cold, then warm
    python benchmarks/bench_main_job.py --quick          # the smoke study; says nothing but that it runs

Cold means an empty cache, so that the world is built first; warm is the same command again in another empty folder with
that cache. The parts of the world are those that the command tells (`banks …: built in 154 s`); `sweep` is the rest:
imports, Ray, trials, baselines, registration and report. Processor seconds are those of the command and of all that it
waited for. The last line of standard output is one JSON object; see `record.py` for where it goes.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import environment, save

ROOT = Path(__file__).parents[1]
BUILT = re.compile(r"^(\w+) [0-9a-f]{16}: built in (\d+) s$", re.MULTILINE)


def processor_seconds() -> float:
    """Processor seconds of all ended children of this process."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_once(cache: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Run the command in an empty folder; return its seconds, and what it tells of its parts and of its world."""
    load, used, started = os.getloadavg()[0], processor_seconds(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "tuning" / "run_ablation.py"), *arguments]
        done = subprocess.run(
            [*command, "--cache", str(cache)],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        )
    wall = time.perf_counter() - started
    parts = Counter[str]()
    for name, seconds in BUILT.findall(done.stderr):
        parts[name] += int(seconds)
    world = re.search(r"accuracy of base .*", done.stderr)
    return {
        "wall_s": wall,
        "processor_s": processor_seconds() - used,
        "parts_s": {**parts, "sweep": wall - parts.total()},
        "world": world[0] if world else None,
        "load_before": load,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the smoke study")
    options = parser.parse_args(argv)
    arguments = ["--smoke"] if options.quick else []
    with tempfile.TemporaryDirectory() as cache:
        found = {name: run_once(Path(cache), arguments) for name in ("cold", "warm")}
    result = {
        "benchmark": "main_job",
        "config": {"quick": options.quick},
        "environment": environment("ray", "mlflow", "torch"),
        **found,
    }
    save("main_job_cpu", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
