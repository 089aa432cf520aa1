"""Is one store with 500 trials of 200 steps usable, and what does logging cost a trial?

    python benchmarks/bench_tracking.py                                   # SQLite in a temporary folder, toy world
    python benchmarks/bench_tracking.py --tracking-uri http://127.0.0.1:5000 --size nano --cache .llgbm

Trials are written through the tracker that workers use, a real training's metrics by name, then read as sweeps, resumes
and reports read them. The cost of logging is measured in real trainings, with and without a tracker in turn: the share
of wall time spent in calls to the tracker, and the ratio of processor time. The last line of standard output is one
JSON object; it is written to `benchmarks/results/`, or to the ignored `scratch/` there if the working tree is dirty.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from record import environment, save

from llgbm.training import TrainingConfig, train
from llgbm.world import World, WorldConfig, build_world, smoke_world
from tuning.report.record import read_study
from tuning.studies import TrialSpec
from tuning.tracking import notes as run_notes
from tuning.tracking.runs import read_trials
from tuning.tracking.store import redact
from tuning.tracking.study import StudyTracker
from tuning.tracking.trial import TrialTracker

STEP_KEYS = (
    "loss/total",
    "loss/weight",
    "loss/delta",
    "grad_norm",
    "learning_rate",
    "delta/cosine",
    "delta/norm_ratio",
)
FINAL_KEYS = tuple(
    f"{part}/{name}"
    for part in ("heldout", "val", "train")
    for name in (
        "accuracy",
        "delta_cosine",
        "delta_norm_ratio",
        "delta_w_error",
        "nearest_teacher_distance",
        "diversity",
    )
)
CURVES = ("loss/total", "val/accuracy")


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def write_trial(study: StudyTracker, number: int, steps: int, folder: Path) -> None:
    """One trial as a worker logs it: every step, a validation every 50, final numbers, an artifact."""
    assert study.target is not None
    config = replace(TrainingConfig(), seed=number % 5, lambda_delta=float(number // 5))
    trial = TrialTracker.open(
        study.target, f"trial-{number}", f"d={number // 5}", config.as_dict(), {"llgbm.bank": "b"}
    )
    for step in range(1, steps + 1):
        trial.log(step, {key: 1.0 / (step + index) for index, key in enumerate(STEP_KEYS)})
        if step % 50 == 0:
            trial.log(step, {"val/accuracy": step / steps / 2})
    trial.log(steps + 1, {key: (number % 7) / 10 for key in FINAL_KEYS})
    trial.log_artifacts(folder, "")
    trial.close()
    study.finish_trial(f"trial-{number}", "FINISHED")


def measure_scale(uri: str | None, root: Path, trials: int, steps: int) -> dict[str, Any]:
    """Write and read one study; seconds for each thing that people wait for."""
    study = StudyTracker.open(uri, root, "bench-tracking")
    target = study.begin("bench", f"bench-{time.time_ns()}", {}, {})
    (root / "artifacts").mkdir()
    tasks = {f"task-{index}": index / 24 for index in range(24)}
    by_task = {part: {"accuracy": tasks, "delta_cosine": tasks} for part in ("test", "val")}
    (root / "artifacts" / "per_task.json").write_text(json.dumps(by_task))
    writes = [
        timed(lambda n=n: write_trial(study, n, steps, root / "artifacts"))[0]
        for n in range(trials)
    ]
    parent, few = target.parent_run_id, max(1, trials // 10)
    runs = study.client.search_runs(
        [target.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'", max_results=few
    )

    def one_by_one() -> None:
        for run in runs:
            for key in CURVES:
                study.client.get_metric_history(run.info.run_id, key)

    reads = {
        "look up every trial (a resume)": timed(study.live_runs)[0],
        "read_trials, two curves (a report)": timed(
            lambda: read_trials(study.tracking_uri, parent, CURVES)
        )[0],
        "read_trials, all curves": timed(lambda: read_trials(study.tracking_uri, parent))[0],
        "read_study, artifacts too": timed(lambda: read_study(study.tracking_uri, parent))[0],
        "two curves, run by run (scaled up)": timed(one_by_one)[0] * trials / len(runs),
    }
    study.finish("FINISHED")
    return {
        "trials": trials,
        "values": trials * (steps * len(STEP_KEYS) + steps // 50 + len(FINAL_KEYS)),
        "write_seconds_a_trial": {"first": median(writes[:few]), "last": median(writes[-few:])},
        "read_seconds": reads,
    }


class Clock:
    """Stands before an object and adds up the wall time that calls to it take."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.seconds = inner, 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return self.around(found) if callable(found) else found

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, with its time added up."""

        def run(*arguments: Any, **named: Any) -> Any:
            spent, answer = timed(lambda: call(*arguments, **named))
            self.seconds += spent
            return answer

        return run


def measure_cost(
    uri: str | None, root: Path, world: World, steps: int, repeats: int
) -> dict[str, Any]:
    """Real trainings with and without a tracker, in turn; each with tracker opens a run of its own."""
    study = StudyTracker.open(uri, root, "bench-tracking")
    study.begin("cost", f"cost-{time.time_ns()}", {}, {})
    run_notes.log_datasets(study.client, study.parent_run_id, [world])
    config = replace(TrainingConfig(), steps=steps, eval_every=max(1, steps // 6))
    if world.config.smoke:
        config = replace(config, batch_size=4, n_probes=2, n_prompts=4)
    spec, shares, ratios, walls = TrialSpec("bench", config, world.config), [], [], []
    for repeat in range(repeats):
        runs = {
            "with": lambda n=repeat: with_tracker(study, spec, world, n),
            "without": lambda: without(spec, world),
        }
        used = {}
        for name in sorted(runs, reverse=bool(repeat % 2)):
            processor = time.process_time()
            used[name] = timed(runs[name]) + (time.process_time() - processor,)
        shares.append(used["with"][1] / used["with"][0])
        walls.append(used["without"][0])
        ratios.append(used["with"][2] / used["without"][2])
    return {
        "world": world.config.size + (", toy" if world.config.smoke else ""),
        "steps": steps,
        "training_seconds": median(walls),
        "share_of_wall_time_in_tracker_calls": {"median": median(shares), "all": shares},
        "processor_time_with_over_without": {"median": median(ratios), "all": ratios},
    }


def without(spec: TrialSpec, world: World) -> None:
    train(spec.config, world.data, world.lora_model, lambda step, metrics: True)


def with_tracker(study: StudyTracker, spec: TrialSpec, world: World, number: int) -> float:
    """Train as a worker does, with notes, data sets and system metrics; return the seconds spent on tracking."""
    clock = Clock(None)
    tags = run_notes.note_tags(run_notes.trial_note(spec))
    arguments = (
        study.target,
        f"cost-{number}-{time.time_ns()}",
        spec.name,
        spec.config.as_dict(),
        tags,
    )
    tracker = clock._inner = clock.around(TrialTracker.open)(*arguments)
    clock.around(run_notes.log_datasets)(tracker.client, tracker.run_id, [world])
    with run_notes.system_metrics(study.tracking_uri, tracker.run_id):

        def report(step: int, metrics: Any) -> bool:
            clock.log(step, metrics)
            return True

        train(spec.config, world.data, world.lora_model, report)
    clock.close()
    return clock.seconds


@contextmanager
def folder_for(path: Path | None) -> Iterator[Path]:
    """The given folder, or one that is removed afterwards."""
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tracking-uri", help="a store (default: SQLite in a temporary folder)")
    parser.add_argument(
        "--size", help="model size of a full world for the cost of logging (default: the toy world)"
    )
    parser.add_argument(
        "--cache", type=Path, help="where worlds are kept (default: a temporary folder)"
    )
    parser.add_argument("--cost-steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    config = {
        **vars(options),
        "cache": None,
        "tracking_uri": options.tracking_uri and redact(options.tracking_uri),
    }
    result: dict[str, Any] = {
        "benchmark": "tracking",
        "config": config,
        "environment": environment("mlflow", "sqlalchemy", "torch"),
    }
    with tempfile.TemporaryDirectory() as root, folder_for(options.cache) as cache:
        result["scale"] = measure_scale(
            options.tracking_uri, Path(root), options.trials, options.steps
        )
        print(json.dumps(result["scale"], indent=1), file=sys.stderr)
        size = WorldConfig(size=options.size) if options.size else smoke_world(WorldConfig())
        world = build_world(cache, size)
        result["cost"] = measure_cost(
            options.tracking_uri, Path(root), world, options.cost_steps, options.repeats
        )
    save("tracking_cpu", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
