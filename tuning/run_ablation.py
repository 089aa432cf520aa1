"""The main job: worlds, baselines, a Ray Tune sweep tracked in MLflow, registration of the best, a report.

python tuning/run_ablation.py [--study phase_4_5] [--model-size nano micro] [--seeds 0 1 2] ...
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from llgbm.runtime import UserError, exit_status, quiet_libraries, say
from llgbm.world import build_world
from tuning.arguments import parse_arguments, points_of, study_of
from tuning.dry_run import estimate_study, show_plan
from tuning.registry.register import register_best
from tuning.report.document import publish_report
from tuning.report.record import log_baselines
from tuning.studies.spec import Study
from tuning.sweep.artifacts import best_trials, check_policy, keep_best_adapters
from tuning.sweep.checkpoints import study_lock
from tuning.sweep.cluster import Resources, check_resources, connect_ray, terminate_as_interrupt
from tuning.sweep.resume import (
    ARGUMENTS_TAG,
    begin_anew,
    check_same_study,
    recorded_arguments,
    study_arguments,
)
from tuning.sweep.run import cache_of, open_points, open_store, optuna_storage, run_trials, rungs
from tuning.tracking.costs import past_runs
from tuning.tracking.notes import describe_facts, log_datasets, study_params, study_tags
from tuning.tracking.runs import read_trials
from tuning.tracking.study import StudyTracker, status_on_exit


def run(arguments: Namespace) -> int:
    """Run the study that the arguments ask for; return the exit status."""
    if arguments.fresh and (arguments.resume or arguments.retry_failed):
        raise UserError(
            "--fresh runs all trials anew: leave out --resume and --retry-failed, or leave out --fresh"
        )
    check_policy(arguments.keep_artifacts, arguments.keep_best)
    study = None if arguments.resume else study_of(arguments)
    nodes = connect_ray(arguments.address) if arguments.address else None
    resources = check_resources(
        arguments.cpus_per_trial, arguments.gpus_per_trial, arguments.max_concurrent, nodes
    )
    if study is None:
        arguments, recorded = recorded_arguments(
            arguments, parse_arguments([]), open_store(arguments)
        )
        study = study_of(arguments)
        check_same_study(study, recorded)
    if arguments.scheduler != "none":
        rungs(study)
    if arguments.estimate:
        print(estimate_study(study))
    if arguments.dry_run:
        runs = past_runs(arguments.tracking_uri, Path.cwd(), arguments.experiment)
        show_plan(
            study,
            cache_of(arguments),
            runs,
            resources.concurrent,
            optuna_storage(arguments),
            points_of(arguments),
        )
    if arguments.estimate or arguments.dry_run:
        return 0
    tracker = open_store(arguments)
    storage = arguments.storage_path or str(cache_of(arguments) / "sweeps")
    storage = storage if "://" in storage else str(Path(storage).expanduser().resolve())
    with study_lock(storage, study.id):
        return run_study(study, arguments, storage, tracker, resources)


def run_study(
    study: Study,
    arguments: Namespace,
    storage: str,
    tracker: StudyTracker,
    resources: Resources,
) -> int:
    """Build what a study needs, run what is left of it, register the best and report; return the exit status."""
    worlds = {world.hash: build_world(cache_of(arguments), world) for world in study.worlds}
    for world in worlds.values():
        say(describe_facts(world))
    if arguments.fresh:
        begin_anew(study, tracker, storage)
    search = open_points(study, arguments, tracker) if study.space else None
    tags = {
        ARGUMENTS_TAG: json.dumps(study_arguments(arguments)),
        "llgbm.resources": resources.describe(),
    }
    tracker.begin(study.name, study.id, study_params(study), {**study_tags(study, worlds), **tags})
    with status_on_exit(tracker):
        log_baselines(tracker, worlds, cache_of(arguments))
        log_datasets(tracker.client, tracker.parent_run_id, list(worlds.values()))
        study = run_trials(study, arguments, worlds, storage, tracker, resources, search)
        results = read_trials(tracker.tracking_uri, tracker.parent_run_id)
        if arguments.keep_artifacts == "best":
            by_trial = {trial.id: worlds[trial.world.hash] for trial in study.trials}
            best = best_trials(results, study.metric, arguments.keep_best)
            keep_best_adapters(tracker.client, by_trial, best)
        registered = register_best(study, worlds, results, tracker, cache_of(arguments))
        summary = publish_report(tracker)
    print(json.dumps({**summary, "registered": registered}, sort_keys=True, allow_nan=False))
    return (
        0
        if all(r.status == "FINISHED" for r in results) and len(results) == len(study.trials)
        else 1
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and translate errors: 2 for a user's mistake, 130 for an interrupt, 1 for failed trials."""
    parsed = parse_arguments(arguments, __doc__)
    quiet_libraries()
    terminate_as_interrupt()
    return exit_status(
        lambda: run(parsed), parsed.debug, "interrupted: unfinished runs are marked KILLED"
    )


if __name__ == "__main__":
    sys.exit(main())
