"""The main job: worlds, baselines, a Ray Tune sweep tracked in MLflow, registration of the best, a report.

python tuning/run_ablation.py --smoke        # small settings: a first look in about a minute
python tuning/run_ablation.py --dry-run      # what the default study would run, and what it would cost
python tuning/run_ablation.py [--study phase_4_5] [--model-size nano micro] [--seeds 0 1 2] ...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import tuning.program  # noqa: F401, imported for its effect on the imports below
from llgbm.runtime import begin_program, exit_status, freeze_gc, quiet_libraries, say
from llgbm.world import World, build_world
from tuning.arguments import check_together, check_used, parse_arguments, study_of
from tuning.dry_run import show_preview
from tuning.registry.best import register_best
from tuning.report.answers import publish_answers
from tuning.report.document import publish_report
from tuning.report.record import log_baselines
from tuning.studies.options import Options
from tuning.studies.spec import Study
from tuning.sweep.artifacts import best_trials, keep_best_adapters
from tuning.sweep.asha import rungs
from tuning.sweep.checkpoints import check_storage
from tuning.sweep.cluster import choose_resources, terminate_as_interrupt
from tuning.sweep.memory import fit_memory, free_bytes
from tuning.sweep.resume import (
    ARGUMENTS_TAG,
    begin_anew,
    check_same_study,
    recorded_options,
)
from tuning.sweep.run import Job, open_store, run_trials, trials_lost
from tuning.tracking.address import reap_all
from tuning.tracking.notes import describe_facts, log_datasets, study_params, study_tags
from tuning.tracking.ownership import check_not_run, own_study
from tuning.tracking.runs import SCHEDULER_TAG, TrialResult, read_trials
from tuning.tracking.study import status_on_exit


def run(options: Options) -> int:
    """Run the study that the options ask for; return the exit status."""
    check_together(options)
    if not options.run.resume:
        # A mistake in the study is told before a cluster is joined.
        study = study_of(options)
        check_used(options, study)
    resources = choose_resources(options.run)
    if options.run.resume:
        options, study = recorded_study(options)
    if options.study.scheduler != "none":
        rungs(study)
    if options.run.is_preview:
        show_preview(study, options, resources)
        return 0
    check_storage(options.stores.storage, [trial.id for trial in study.trials])
    run = options.run
    resources = fit_memory(resources, study, run.max_concurrent, free_bytes(), run.stream)
    tracker = open_store(options)
    reap_all(tracker.tracking_uri)
    check_not_run(tracker.tracking_uri, tracker.experiment_id, study.id)
    freeze_gc()
    worlds = build_worlds(study, options)
    return run_study(Job(study, options, worlds, tracker, options.stores.storage, resources))


def recorded_study(options: Options) -> tuple[Options, Study]:
    """Make the study again that `--resume` names, as it was recorded; return it with its options."""
    options, recorded = recorded_options(options, open_store(options))
    study = study_of(options)
    check_same_study(study, recorded)
    return options, study


def build_worlds(study: Study, options: Options) -> dict[str, World]:
    """Build the worlds of a study, or read them from the cache; by hash."""
    cache, stream = options.stores.cache_folder, options.run.stream
    worlds = {world.hash: build_world(cache, world, stream=stream) for world in study.worlds}
    for world in worlds.values():
        say(describe_facts(world))
    return worlds


def run_study(job: Job) -> int:
    """Run what is left of a study, register the best generator and report; return the exit status."""
    study, tracker, worlds = job.study, job.tracker, job.worlds
    if job.options.run.fresh:
        tracker.supersede_study(study.id)
    tags = {
        ARGUMENTS_TAG: json.dumps(job.options.study.record()),
        "llgbm.resources": job.resources.describe(),
        SCHEDULER_TAG: job.scheduler,
    }
    tracker.begin(study.name, study.id, study_params(study), {**study_tags(study, worlds), **tags})
    with own_study(tracker, study.id) as ownership, status_on_exit(tracker):
        if job.options.run.fresh:
            begin_anew(study.trials, tracker, job.storage, ownership)
        else:
            begin_anew(trials_lost(study, job.options), tracker, job.storage, ownership)
        cache = job.options.stores.cache_folder
        if not job.is_beside:
            log_baselines(tracker, worlds, cache)
        log_datasets(tracker.client, tracker.parent_run_id, list(worlds.values()))
        study = run_trials(job, ownership)
        log_baselines(tracker, worlds, cache)
        results = read_trials(tracker.tracking_uri, tracker.parent_run_id)
        keep_adapters(job, study, results)
        registered = register_best(study, worlds, results, tracker, cache)
        publish_answers(tracker, worlds_by_trial(job, study), results, study.metric)
        summary = publish_report(tracker)
    print(json.dumps({**summary, "registered": registered}, sort_keys=True, allow_nan=False))
    finished = [result for result in results if result.status == "FINISHED"]
    return int(not len(finished) == len(results) == len(study.trials))


def keep_adapters(job: Job, study: Study, results: Sequence[TrialResult]) -> None:
    """Write the adapters of the best trials, if only theirs are kept."""
    stores = job.options.stores
    if stores.keep_artifacts == "best":
        best = best_trials(results, study.metric, stores.keep_best or 1)
        keep_best_adapters(job.tracker.client, worlds_by_trial(job, study), best)


def worlds_by_trial(job: Job, study: Study) -> dict[str, World]:
    """Return the world of each trial by the trial's id."""
    return {trial.id: job.worlds[trial.world.hash] for trial in study.trials}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and translate errors: 2 for a user's mistake, 130 for an interrupt, 1 for failed trials."""
    options = parse_arguments(arguments, __doc__)
    quiet_libraries()
    terminate_as_interrupt()
    return exit_status(
        lambda: run(options), options.run.debug, "interrupted: unfinished runs are marked KILLED"
    )


def run_command() -> int:
    """Run as the program `llgbm-ablation`; return its exit status."""
    begin_program()
    return main()


if __name__ == "__main__":
    sys.exit(run_command())
