"""The main job: worlds, baselines, a Ray Tune sweep tracked in MLflow, registration of the best, a report.

python tuning/run_ablation.py [--study phase_4_5] [--model-size nano micro] [--seeds 0 1 2] ...
"""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llgbm.baselines import evaluate_baselines
from llgbm.runtime import exit_status, quiet_libraries, say
from llgbm.world import World, build_world
from tuning import registry
from tuning.arguments import parse_arguments, points_of, study_of
from tuning.plan import last_results, past_runs, show_plan
from tuning.report import DeltaMap, result_json, write_report
from tuning.search import PointSearch, describe_best, make_scheduler, make_searcher, open_search, optuna_url
from tuning.space import TrialSpec
from tuning.studies import Study
from tuning.sweep import Resources, check_resources, make_list_searcher, run_sweep, start_ray, terminate_as_interrupt
from tuning.tracking import StudyTracker, TrialResult, read_trials


def run(arguments: Namespace) -> int:
    """Run the study that the arguments ask for; return the exit status."""
    study, root = study_of(arguments), Path.cwd()
    cache = Path(arguments.cache).expanduser().resolve()
    resources = check_resources(arguments.cpus_per_trial, arguments.gpus_per_trial, arguments.max_concurrent)
    scheduler = make_scheduler(arguments.scheduler, study)
    storage, n_points = arguments.optuna_storage or optuna_url(arguments.tracking_uri, root), points_of(arguments)
    if arguments.dry_run:
        runs = past_runs(arguments.tracking_uri, root, arguments.experiment)
        show_plan(study, cache, runs, resources.concurrent, storage, n_points)
        return 0
    tracker = StudyTracker.open(arguments.tracking_uri, root, arguments.experiment)
    worlds = {world.hash: build_world(cache, world) for world in study.worlds}
    for world in worlds.values():
        say(describe_facts(world))
    search = None
    if study.space is not None:
        runs = past_runs(tracker.tracking_uri, root, arguments.experiment)
        search = PointSearch(study.space, open_search(study, storage), n_points, last_results(runs))
    target = tracker.begin(study.name, study.id, study_params(study, resources), study_tags(study, worlds))
    with status_on_exit(tracker):
        baselines = log_baselines(tracker, worlds)
        say(f"{describe_size(study, n_points)}, {resources.describe()}")
        start_ray(resources)
        searcher = make_searcher(search) if search else make_list_searcher(study.trials)
        run_sweep(study, worlds, target, tracker, resources, searcher, scheduler)
        if search:
            say(describe_best(search.space, search.study))
            study = replace(study, trials=search.trials())
        results = read_trials(tracker.tracking_uri, tracker.parent_run_id)
        registered = register_best(study, worlds, results, tracker, study.metric)
        summary = publish_report(study, worlds, results, baselines, tracker, study.metric)
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


def describe_size(study: Study, n_points: int) -> str:
    """How much is run."""
    if study.space is None:
        return f"{len(study.trials)} trials"
    return f"{n_points} points on {len(study.space.seeds)} seeds"


def study_params(study: Study, resources: Resources) -> dict[str, Any]:
    """What the parent run says of the study."""
    return {"study": study.name, "metric": study.metric, "trials": len(study.trials), "resources": resources.describe()}


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
    parsed = parse_arguments(arguments, __doc__)
    quiet_libraries()
    terminate_as_interrupt()
    return exit_status(lambda: run(parsed), parsed.debug, "interrupted: unfinished runs are marked KILLED")


if __name__ == "__main__":
    sys.exit(main())
