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
from llgbm.runtime import UserError, exit_status, quiet_libraries, say
from llgbm.world import World, build_world, describe_world
from tuning import registry, run_notes
from tuning.checkpoints import TrialCheckpoints, study_lock
from tuning.cluster import Resources, check_resources, connect_ray, is_spread, start_ray, terminate_as_interrupt
from tuning.report import DeltaMap, collect_baselines, result_json, write_report
from tuning.resume import (
    ARGUMENTS_TAG,
    adopt_finished,
    begin_anew,
    check_same_study,
    recorded_arguments,
    study_arguments,
    trials_to_run,
)
from tuning.studies import Study, StudyOptions, TrialSpec, make_study
from tuning.tracking import StudyTracker, TrialResult, read_trials

VAL_METRICS = ("val/accuracy", "val/delta_cosine")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. A wrong option ends with one line and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is run")
    what.add_argument("--study", default="phase_4_5", metavar="NAME", help="a named study (default: phase_4_5)")
    what.add_argument("--model-size", nargs="+", default=["nano"], metavar="SIZE", help="nano, micro (default: nano)")
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
    how = parser.add_argument_group("how it is run")
    how.add_argument(
        "--resume",
        metavar="STUDY_ID",
        help="go on with a study that was interrupted or killed: its id, or `latest`; what finished is not run again",
    )
    how.add_argument("--retry-failed", action="store_true", help="run the failed trials again, and no others")
    how.add_argument("--fresh", action="store_true", help="run all trials anew, those that finished before too")
    how.add_argument("--cpus-per-trial", type=float, metavar="X", help="CPUs of a trial (default: 1)")
    how.add_argument("--gpus-per-trial", type=float, metavar="X", help="GPUs of a trial, fractions allowed")
    how.add_argument("--max-concurrent", type=int, metavar="N", help="trials at once (default: what fits)")
    how.add_argument("--address", metavar="ADDRESS", help="a Ray cluster: auto, host:port or ray://host:port")
    how.add_argument(
        "--storage-path",
        metavar="DIR",
        help="where unfinished trials keep their state, a folder or s3://… that all machines reach "
        "(default: CACHE/sweeps)",
    )
    how.add_argument("--keep-checkpoints", action="store_true", help="keep the state of finished trials too")
    how.add_argument("--tracking-uri", metavar="URI", help="an MLflow server (default: ./mlruns/mlflow.db)")
    how.add_argument("--experiment", default="llgbm", help="MLflow experiment (default: llgbm)")
    how.add_argument(
        "--keep-artifacts",
        choices=run_notes.KEEP_ARTIFACTS,
        default="all",
        help="whose generated adapters are kept: of all trials, of the best, or none (default: all)",
    )
    how.add_argument(
        "--keep-best",
        type=int,
        default=1,
        metavar="K",
        help="how many trials a size are the best, for --keep-artifacts best (default: 1)",
    )
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
    options = StudyOptions(
        model_sizes=tuple(arguments.model_size),
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
    if arguments.fresh and (arguments.resume or arguments.retry_failed):
        raise UserError("--fresh runs all trials anew: leave out --resume and --retry-failed, or leave out --fresh")
    run_notes.check_policy(arguments.keep_artifacts, arguments.keep_best)
    study = None if arguments.resume else study_of(arguments)
    cache = Path(arguments.cache).expanduser().resolve()
    if arguments.dry_run and study:
        show_plan(study, cache)
        return 0
    nodes = connect_ray(arguments.address) if arguments.address else None
    resources = check_resources(arguments.cpus_per_trial, arguments.gpus_per_trial, arguments.max_concurrent, nodes)
    tracker = open_store(arguments)
    if study is None:
        arguments, recorded = recorded_arguments(arguments, parse_arguments([]), tracker)
        study = study_of(arguments)
        check_same_study(study, recorded)
    if arguments.dry_run:
        show_plan(study, cache)
        return 0
    storage = arguments.storage_path or str(cache / "sweeps")
    storage = storage if "://" in storage else str(Path(storage).expanduser().resolve())
    with study_lock(storage, study.id):
        return run_study(study, arguments, cache, storage, tracker, resources)


def open_store(arguments: argparse.Namespace) -> StudyTracker:
    """The MLflow store. Raises UserError if it cannot be used, or not from all machines of the cluster."""
    local = not arguments.tracking_uri or arguments.tracking_uri.startswith("sqlite")
    if arguments.address and local and is_spread():
        raise UserError(
            "trials on several machines cannot write into one SQLite file: start `mlflow server` and give its "
            "address as --tracking-uri http://host:port"
        )
    return StudyTracker.open(arguments.tracking_uri, Path.cwd(), arguments.experiment)


def run_study(
    study: Study,
    arguments: argparse.Namespace,
    cache: Path,
    storage: str,
    tracker: StudyTracker,
    resources: Resources,
) -> int:
    """Build what a study needs, run what is left of it, register the best and report; return the exit status."""
    worlds = {world.hash: build_world(cache, world) for world in study.worlds}
    for world in worlds.values():
        say(describe_facts(world))
    if arguments.fresh:
        begin_anew(study, tracker, storage)
    tags = {ARGUMENTS_TAG: json.dumps(study_arguments(arguments)), "llgbm.resources": resources.describe()}
    tracker.begin(study.name, study.id, study_params(study), {**study_tags(study, worlds), **tags})
    with status_on_exit(tracker):
        baselines = log_baselines(tracker, worlds)
        run_notes.log_datasets(tracker.client, tracker.parent_run_id, list(worlds.values()))
        run_trials(study, arguments, worlds, storage, tracker, resources)
        results = read_trials(tracker.tracking_uri, tracker.parent_run_id)
        if arguments.keep_artifacts == "best":
            by_trial = {trial.id: worlds[trial.world.hash] for trial in study.trials}
            best = run_notes.best_trials(results, arguments.metric, arguments.keep_best)
            run_notes.keep_best_adapters(tracker.client, by_trial, best)
        registered = register_best(study, worlds, results, tracker, arguments.metric)
        summary = publish_report(study, worlds, results, baselines, tracker, arguments.metric)
    print(json.dumps({**summary, "registered": registered}, sort_keys=True, allow_nan=False))
    return 0 if all(r.status == "FINISHED" for r in results) and len(results) == len(study.trials) else 1


def run_trials(
    study: Study,
    arguments: argparse.Namespace,
    worlds: Mapping[str, World],
    storage: str,
    tracker: StudyTracker,
    resources: Resources,
) -> None:
    """Run those trials of a study that are left to run, if any, under Ray."""
    runs = tracker.live_runs()
    for trial in adopt_finished(study.trials, runs, tracker):
        if not arguments.keep_checkpoints:
            TrialCheckpoints(storage, trial.id).remove()
    trials = trials_to_run(study.trials, runs, bool(arguments.resume), arguments.retry_failed)
    say(f"{len(trials)} of {len(study.trials)} trials to run, {resources.describe()}")
    if not trials:
        return
    shared = {key: world.to("cpu") for key, world in worlds.items()}
    start_ray(resources, sum(world.n_bytes for world in shared.values()))
    # Ray takes two seconds to import and must find its settings made.
    from tuning.sweep import ListSearcher, run_sweep

    assert tracker.target is not None
    run_sweep(
        study,
        shared,
        tracker.target,
        tracker,
        resources,
        ListSearcher(trials),
        storage=storage,
        total_steps=sum(trial.config.steps for trial in trials),
        keep_adapters=arguments.keep_artifacts == "all",
        keep_checkpoints=arguments.keep_checkpoints,
    )


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


def study_params(study: Study) -> dict[str, Any]:
    """What the parent run says of the study."""
    return {"study": study.name, "trials": len(study.trials)}


def study_tags(study: Study, worlds: Mapping[str, World]) -> dict[str, str]:
    """Lineage of the parent run."""
    return {
        "llgbm.bank": ",".join(world.bank.hash for world in worlds.values()),
        "llgbm.base": ",".join(world.base.hash for world in worlds.values()),
        **run_notes.note_tags(run_notes.study_note(study.name, study.trials)),
    }


def log_baselines(tracker: StudyTracker, worlds: Mapping[str, World]) -> dict[str, dict[str, float]]:
    """Baselines of every world by name, measured and logged on the parent run unless it has them."""
    known = collect_baselines(tracker.metrics())
    found: dict[str, dict[str, float]] = {}
    for world in worlds.values():
        size = world.config.size
        mine = {n.removesuffix(f"_{size}"): m for n, m in known.items() if len(worlds) == 1 or n.endswith(f"_{size}")}
        if not mine:
            mine = {name: dict(result.metrics) for name, result in evaluate_baselines(world.data, world.flora).items()}
            slugs = {name: name if len(worlds) == 1 else f"{name}_{size}" for name in mine}
            logged = {f"baseline/{slugs[n]}/{key}": v for n, values in mine.items() for key, v in values.items()}
            tracker.log_metrics({**logged, **{f"world/{size}/{k}": v for k, v in world.bank.facts.items()}})
        found |= {name if len(worlds) == 1 else f"{name} ({size})": values for name, values in mine.items()}
    return found


def register_best(
    study: Study, worlds: Mapping[str, World], results: Sequence[TrialResult], tracker: StudyTracker, metric: str
) -> list[dict[str, str]]:
    """Register the best trial of each size by a validation metric. Nothing is registered when all trials failed."""
    specs = {trial.id: trial for trial in study.trials}
    registered = []
    for size in dict.fromkeys(trial.world.size for trial in study.trials):
        done = [r for r in results if r.whole and specs[r.trial_id].world.size == size]
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
    done = [r for r in results if r.whole]
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
