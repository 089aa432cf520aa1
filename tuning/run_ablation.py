"""The main job: worlds, baselines, a Ray Tune sweep tracked in MLflow, registration of the best, a report.

python tuning/run_ablation.py [--study phase_4_5] [--model-size nano micro] [--seeds 0 1 2] ...
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from llgbm.baselines import evaluate_baselines
from llgbm.models import SIZES
from llgbm.runtime import UserError, exit_status, quiet_libraries, say
from llgbm.world import World, build_world, describe_world
from tuning import registry
from tuning.real import add_real_arguments, own_worlds
from tuning.report import DeltaMap, result_json, write_report
from tuning.studies import Study, StudyOptions, TrialSpec, make_study
from tuning.sweep import Resources, check_resources, run_sweep, start_ray, terminate_as_interrupt
from tuning.tracking import StudyTracker, TrialResult, read_trials

VAL_METRICS = ("val/accuracy", "val/delta_cosine")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. A wrong option ends with one line and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is run")
    what.add_argument("--study", default="phase_4_5", metavar="NAME", help="a named study (default: phase_4_5)")
    what.add_argument(
        "--model-size", nargs="+", default=["nano"], metavar="SIZE", help=f"of {', '.join(SIZES)} (default: nano)"
    )
    what.add_argument("--lambda-weight", nargs="+", type=float, metavar="λ", help="weights of the weight loss")
    what.add_argument("--lambda-delta", nargs="+", type=float, metavar="λ", help="weights of the delta loss")
    what.add_argument("--seeds", nargs="+", type=int, metavar="N", help="seeds (default: 0 1 2)")
    what.add_argument("--steps", type=int, metavar="N", help="training steps of each trial")
    what.add_argument("--delta-probes", default="trajectory", help="trajectory (default), generic or domain")
    what.add_argument("--encoder", default="minilm", help="minilm (default), base, or a sentence-transformers folder")
    what.add_argument(
        "--metric",
        default="val/accuracy",
        metavar="NAME",
        help=f"what the best generator is chosen by, on validation tasks: {' or '.join(VAL_METRICS)}",
    )
    what.add_argument("--smoke", action="store_true", help="toy settings: shows that everything runs, nothing else")
    add_real_arguments(parser)
    how = parser.add_argument_group("how it is run")
    how.add_argument("--cpus-per-trial", type=float, metavar="X", help="CPUs of a trial (default: 1)")
    how.add_argument("--gpus-per-trial", type=float, metavar="X", help="GPUs of a trial, fractions allowed")
    how.add_argument("--max-concurrent", type=int, metavar="N", help="trials at once (default: what fits)")
    how.add_argument("--tracking-uri", metavar="URI", help="an MLflow server (default: ./mlruns/mlflow.db)")
    how.add_argument("--experiment", default="llgbm", help="MLflow experiment (default: llgbm)")
    how.add_argument("--cache", default=".llgbm", metavar="DIR", help="where worlds are kept (default: ./.llgbm)")
    how.add_argument("--dry-run", action="store_true", help="print the trials and what would be built, run nothing")
    how.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(arguments)


def study_of(arguments: argparse.Namespace) -> Study:
    """The study that the arguments ask for. Raises UserError for a bad value."""
    pairs = (("lambda_weight", arguments.lambda_weight), ("lambda_delta", arguments.lambda_delta))
    if arguments.metric not in VAL_METRICS:
        raise UserError(f"unknown metric {arguments.metric!r}; a generator is chosen by: {', '.join(VAL_METRICS)}")
    given: dict[str, Any] = {name: tuple(values) for name, values in pairs if values is not None}
    worlds = own_worlds(arguments)
    options = StudyOptions(
        model_sizes=tuple(world.size for world in worlds) or tuple(arguments.model_size),
        own_worlds=worlds,
        seeds=tuple(arguments.seeds if arguments.seeds is not None else ((0,) if arguments.smoke else (0, 1, 2))),
        steps=arguments.steps,
        delta_probes=arguments.delta_probes,
        encoder=arguments.encoder,
        smoke=arguments.smoke,
    )
    return make_study(arguments.study, replace(options, **given))


def show_plan(study: Study, cache: Path) -> None:
    """Print the trial table and what of each world is already built."""
    rows = [
        (
            t.id,
            t.name,
            t.config.model_size,
            t.config.lambda_weight,
            t.config.lambda_delta,
            t.config.seed,
            t.config.steps,
        )
        for t in study.trials
    ]
    print(tabulate(rows, ("trial", "configuration", "size", "λ_w", "λ_d", "seed", "steps"), disable_numparse=True))
    for world in study.worlds:
        print(f"\nworld {world.hash} ({world.size}, {len(world.suite.tasks)} tasks):")
        for part, built in describe_world(cache, world).items():
            print(f"  {part}: {built}")


def run(arguments: argparse.Namespace) -> int:
    """Run the study that the arguments ask for; return the exit status."""
    study, root = study_of(arguments), Path.cwd()
    cache = Path(arguments.cache).expanduser().resolve()
    if arguments.dry_run:
        show_plan(study, cache)
        return 0
    resources = check_resources(arguments.cpus_per_trial, arguments.gpus_per_trial, arguments.max_concurrent)
    tracker = StudyTracker.open(arguments.tracking_uri, root, arguments.experiment)
    worlds = {world.hash: build_world(cache, world) for world in study.worlds}
    for world in worlds.values():
        say(describe_facts(world))
    target = tracker.begin(study.name, study.id, study_params(study, resources), study_tags(study, worlds))
    with status_on_exit(tracker):
        baselines = log_baselines(tracker, worlds)
        say(f"{len(study.trials)} trials, {resources.describe()}")
        start_ray(resources)
        run_sweep(study, worlds, target, tracker, resources)
        results = read_trials(tracker.tracking_uri, tracker.parent_run_id)
        registered = register_best(study, worlds, results, tracker, arguments.metric)
        summary = publish_report(study, worlds, results, baselines, tracker, arguments.metric)
    print(json.dumps({**summary, "registered": registered}, sort_keys=True, allow_nan=False))
    return 0 if all(r.status == "FINISHED" for r in results) and len(results) == len(study.trials) else 1


@contextmanager
def status_on_exit(tracker: StudyTracker):
    """Give the parent run its right final status, whatever happens."""
    try:
        yield
    except KeyboardInterrupt:
        tracker.finish("KILLED")
        raise
    except BaseException:
        tracker.finish("FAILED")
        raise
    tracker.finish("FINISHED")


def describe_facts(world: World) -> str:
    """One line on what was built."""
    facts, split = world.bank.facts, world.config.suite.split
    return (
        f"world {world.config.hash} ({world.config.size}): {len(split.train)} training, {len(split.val)} validation, "
        f"{len(split.test)} test tasks; accuracy of base {facts['base_accuracy']:.3f}, "
        f"of teachers {facts['teacher_accuracy']:.3f}"
    )


def study_params(study: Study, resources: Resources) -> dict[str, Any]:
    """What the parent run says of the study."""
    return {"study": study.name, "trials": len(study.trials), "resources": resources.describe()}


def study_tags(study: Study, worlds: Mapping[str, World]) -> dict[str, str]:
    """Lineage of the parent run."""
    return {
        "llgbm.bank": ",".join(world.bank.hash for world in worlds.values()),
        "llgbm.base": ",".join(world.base.hash for world in worlds.values()),
    }


def log_baselines(tracker: StudyTracker, worlds: Mapping[str, World]) -> dict[str, dict[str, float]]:
    """Measure the baselines of every world; log them on the parent run and return them by name."""
    found: dict[str, dict[str, float]] = {}
    for world in worlds.values():
        for name, result in evaluate_baselines(world.data, world.flora).items():
            label = name if len(worlds) == 1 else f"{name} ({world.config.size})"
            found[label] = dict(result.metrics)
            slug = name if len(worlds) == 1 else f"{name}_{world.config.size}"
            tracker.log_metrics({f"baseline/{slug}/{key}": value for key, value in result.metrics.items()})
        tracker.log_metrics({f"world/{world.config.size}/{key}": value for key, value in world.bank.facts.items()})
    return found


def register_best(
    study: Study, worlds: Mapping[str, World], results: Sequence[TrialResult], tracker: StudyTracker, metric: str
) -> list[dict[str, str]]:
    """Register the best trial of each size by a validation metric. Nothing is registered when all trials failed."""
    specs = {trial.id: trial for trial in study.trials}
    registered = []
    for size in dict.fromkeys(trial.world.size for trial in study.trials):
        done = [r for r in results if r.status == "FINISHED" and specs[r.trial_id].world.size == size]
        if done:
            best = max(done, key=lambda r: r.metrics[metric])
            spec = specs[best.trial_id]
            version = register(study, spec, worlds[spec.world.hash], best, tracker, metric)
            say(
                f"registered {version.name} version {version.version} "
                f"({spec.name}, seed {spec.config.seed}) as {version.alias}"
            )
            registered.append({"name": version.name, "version": str(version.version), "alias": version.alias})
    return registered


def register(
    study: Study, spec: TrialSpec, world: World, best: TrialResult, tracker: StudyTracker, metric: str
) -> registry.RegisteredVersion:
    """Register one trial's generator: champion if it beats the champion on the same validation data."""
    name = f"llgbm-generator-{spec.world.size}" + ("-smoke" if spec.world.smoke else "")
    score = best.metrics[metric]
    alias = registry.decide_alias(registry.current_champion(tracker.tracking_uri, name), score, world.data.hash, metric)
    tags = {
        "llgbm.study": study.name,
        "llgbm.study_id": study.id,
        "llgbm.trial_id": spec.id,
        "llgbm.config": spec.name,
        "llgbm.bank": world.bank.hash,
        "llgbm.base": world.base.hash,
        "llgbm.val_data": world.data.hash,
    }
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(tracker.client.download_artifacts(best.run_id, "generator", folder))
        return registry.register_generator(
            tracker.tracking_uri, best.run_id, bundle, name, tags, score, metric, alias == "champion"
        )


def publish_report(
    study: Study,
    worlds: Mapping[str, World],
    results: Sequence[TrialResult],
    baselines: Mapping[str, Mapping[str, float]],
    tracker: StudyTracker,
    metric: str,
) -> dict[str, Any]:
    """Write the report to the parent run, print its table, return its numbers."""
    with tempfile.TemporaryDirectory() as folder:
        deltas = best_delta_map(worlds, study, results, tracker, Path(folder) / "deltas", metric)
        out = Path(folder) / "report"
        out.mkdir()
        print(write_report(out, study.name, results, baselines, deltas))
        tracker.log_artifacts(out)
    return result_json(study.name, results, baselines)


def best_delta_map(
    worlds: Mapping[str, World],
    study: Study,
    results: Sequence[TrialResult],
    tracker: StudyTracker,
    folder: Path,
    metric: str,
) -> DeltaMap | None:
    """Teacher and generated deltas of the test tasks, of the trial that is best by a validation metric."""
    from safetensors.numpy import load_file

    specs = {trial.id: trial for trial in study.trials}
    done = [r for r in results if r.status == "FINISHED"]
    if not done:
        return None
    best = max(done, key=lambda r: r.metrics[metric])
    spec = specs[best.trial_id]
    folder.mkdir()
    stored = load_file(Path(tracker.client.download_artifacts(best.run_id, "deltas", str(folder))) / "test.safetensors")
    data = worlds[spec.world.hash].data
    labels = tuple(f"{data.families[i]}/{data.tasks[i]}" for i in data.rows["test"])
    return DeltaMap(np.asarray(stored["teacher"]), np.asarray(stored["predicted"]), labels, spec.name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and translate errors: 2 for a user's mistake, 130 for an interrupt, 1 for failed trials."""
    parsed = parse_arguments(arguments)
    quiet_libraries()
    terminate_as_interrupt()
    return exit_status(lambda: run(parsed), parsed.debug, "interrupted: unfinished runs are marked KILLED")


if __name__ == "__main__":
    sys.exit(main())
