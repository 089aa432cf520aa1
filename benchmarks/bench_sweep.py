"""The sweep `phase_4_5` under Ray and MLflow beside the same trainings in one plain process: wall time over the ideal.

    python benchmarks/bench_sweep.py                       # all 600 steps, about an hour on two idle cores
    python benchmarks/bench_sweep.py --steps 200 --seeds 0 --repeats 1

Both sides have their caches warm and one thread a training. The plain side trains and evaluates the trials one after
the other, with neither Ray nor MLflow; the ideal is the sum of its seconds over the number of trials at once. The
platform's side is the whole command from start to exit: imports, Ray, baselines, trials, artifacts, registration,
report. Half of the plain trials run before the platform and half after it, so that a machine that gets slower or faster
meanwhile treats both alike; all is done `--repeats` times (three), and medians with their spread are reported.
`over_ideal` is the platform's wall time over the ideal (to be at most 1.10). `over_own` takes the seconds that the
platform's own trials report instead, which a loaded machine or cores that slow each other down do not move.
`side_by_side`, if asked for, says how much: one training's seconds while another one runs, over its seconds alone. The
last line of standard output is one JSON object; see `record.py` for where it goes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

from record import environment, save
from timing import spread

ROOT = Path(__file__).parents[1]


def plain(options: argparse.Namespace) -> list[float]:
    """Seconds of each trial of the study, trained and evaluated in this process, one after the other."""
    import torch

    from llgbm.evaluation.metrics import evaluate_generator
    from llgbm.training import train
    from llgbm.world import build_world
    from tuning.studies import STUDIES, StudyOptions

    torch.set_num_threads(1)
    study = STUDIES["phase_4_5"](
        StudyOptions(steps=options.steps, seeds=tuple(options.seeds), smoke=options.quick)
    )
    world = build_world(options.cache, study.worlds[0], "cpu")
    found = []
    for trial in study.trials[options.part]:
        started = time.perf_counter()
        outcome = train(trial.config, world.data, world.lora_model)
        for part in ("test", "val", "train"):
            evaluate_generator(outcome.generator, world.data, world.lora_model, part)
        found.append(time.perf_counter() - started)
    return found


def study_arguments(options: argparse.Namespace, platform: bool = False) -> list[str]:
    """The options that both sides share, as the platform or as this script spells them."""
    steps = ["--steps", str(options.steps)] if options.steps else []
    toy = ["--smoke" if platform else "--quick"] if options.quick else []
    return [*toy, *steps, "--cache", str(options.cache), "--seeds", *map(str, options.seeds)]


def start_plain(options: argparse.Namespace, part: str) -> subprocess.Popen[str]:
    """The plain side in a fresh process: the trials `start:stop:step` of the study."""
    command = [sys.executable, __file__, "--plain", part, *study_arguments(options)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=env)


def seconds_of(process: subprocess.Popen[str]) -> list[float]:
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the plain trainings ended with status {process.returncode}")
    return json.loads(out.splitlines()[-1])


def run_platform(options: argparse.Namespace) -> dict[str, Any]:
    """Wall time of the whole command in an empty folder, and what its own trials say that they took."""
    from tuning.tracking.runs import read_trials
    from tuning.tracking.study import StudyTracker

    with nullcontext(options.keep) if options.keep else tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(ROOT / "tuning" / "run_ablation.py"),
            *study_arguments(options, platform=True),
        ]
        command += ["--max-concurrent", str(options.concurrent)]
        started = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - started
        tracker = StudyTracker.open(None, Path(folder), "llgbm")
        (parent,) = tracker.studies()
        trials = read_trials(tracker.tracking_uri, parent.info.run_id, curve_keys=())
    return {"wall_s": wall, "own_s": [trial.metrics["time/seconds"] for trial in trials]}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Both sides once: every other plain trial, the platform, the other plain trials."""
    load = os.getloadavg()[0]
    before = seconds_of(start_plain(options, "::2"))
    ours = run_platform(options)
    after = seconds_of(start_plain(options, "1::2"))
    plain_s = [
        second for pair in zip_longest(before, after) for second in pair if second is not None
    ]
    ideal, own_ideal = sum(plain_s) / options.concurrent, sum(ours["own_s"]) / options.concurrent
    return {
        **ours,
        "plain_s": plain_s,
        "over_ideal": ours["wall_s"] / ideal,
        "over_own": ours["wall_s"] / own_ideal,
        "load_before_and_after": [load, os.getloadavg()[0]],
    }


def side_by_side(options: argparse.Namespace) -> float:
    """Seconds of the first training while its twin runs, over its seconds alone."""
    alone = seconds_of(start_plain(options, ":1"))[0]
    twins = [start_plain(options, ":1") for _ in range(options.concurrent)]
    return median(seconds_of(twin)[0] for twin in twins) / alone


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, help="training steps (default: the study's own)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--concurrent", type=int, default=2, help="trials at once, and cores used (default: 2)"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="the smoke world, once; says nothing but that it runs"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=ROOT / ".llgbm",
        help="where the world is kept, built if absent",
    )
    parser.add_argument(
        "--side-by-side", action="store_true", help="time two trainings at once too"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="an empty folder to leave the platform's study in"
    )
    parser.add_argument(
        "--plain",
        metavar="A:B:C",
        help="run these trials of the plain side alone, print their seconds",
    )
    options = parser.parse_args(argv)
    options.cache = options.cache.resolve()
    if options.quick:
        options.repeats = 1
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    if options.keep and (options.repeats > 1 or any(options.keep.iterdir())):
        sys.exit("--keep takes an empty folder and one repeat")
    if options.plain:
        options.part = slice(*(int(n) if n else None for n in options.plain.split(":")))
        print(json.dumps(plain(options)))
        return 0
    slowed = side_by_side(options) if options.side_by_side else None
    runs = [compare(options) for _ in range(options.repeats)]
    result = {
        "benchmark": "sweep",
        "config": {
            "steps": options.steps,
            "seeds": options.seeds,
            "concurrent": options.concurrent,
            "quick": options.quick,
        },
        "environment": environment("ray", "mlflow", "torch"),
        "over_ideal": median(run["over_ideal"] for run in runs),
        "over_own": median(run["over_own"] for run in runs),
        "spread": spread(tuple(run["over_ideal"] for run in runs)),
        "side_by_side": slowed,
        "runs": runs,
    }
    save("sweep_cpu", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
