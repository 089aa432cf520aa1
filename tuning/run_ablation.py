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

from llgbm.baselines import known_baselines
from llgbm.runtime import UserError, exit_status, quiet_libraries, say
from llgbm.world import World, build_world
from tuning import registry, run_notes
from tuning.arguments import parse_arguments, points_of, study_of
from tuning.checkpoints import TrialCheckpoints, study_lock
from tuning.cluster import (
    Resources,
    check_resources,
    connect_ray,
    is_spread,
    leave_ray,
    start_ray,
    terminate_as_interrupt,
)
from tuning.estimates import estimate_study
from tuning.order import TrialOrder
from tuning.plan import Costs, last_results, past_runs, show_plan
from tuning.report import collect_baselines, read_study, result_json, summary, write_report_files
from tuning.resume import (
    ARGUMENTS_TAG,
    adopt_finished,
    begin_anew,
    check_same_study,
    recorded_arguments,
    study_arguments,
    trials_to_run,
)
from tuning.runs import TrialResult, read_trials
from tuning.search import PointSearch, describe_best, make_scheduler, make_searcher, open_search, optuna_url, rungs
from tuning.space import TrialSpec
from tuning.studies import Study
from tuning.tracking import StudyTracker


def run(arguments: Namespace) -> int:
    """Run the study that the arguments ask for; return the exit status."""
    if arguments.fresh and (arguments.resume or arguments.retry_failed):
        raise UserError("--fresh runs all trials anew: leave out --resume and --retry-failed, or leave out --fresh")
    run_notes.check_policy(arguments.keep_artifacts, arguments.keep_best)
    study = None if arguments.resume else study_of(arguments)
    nodes = connect_ray(arguments.address) if arguments.address else None
    resources = check_resources(arguments.cpus_per_trial, arguments.gpus_per_trial, arguments.max_concurrent, nodes)
    if study is None:
        arguments, recorded = recorded_arguments(arguments, parse_arguments([]), open_store(arguments))
        study = study_of(arguments)
        check_same_study(study, recorded)
    if arguments.scheduler != "none":
        rungs(study)
    if arguments.estimate:
        print(estimate_study(study))
    if arguments.dry_run:
        runs = past_runs(arguments.tracking_uri, Path.cwd(), arguments.experiment)
        show_plan(
            study, cache_of(arguments), runs, resources.concurrent, optuna_storage(arguments), points_of(arguments)
        )
    if arguments.estimate or arguments.dry_run:
        return 0
    tracker = open_store(arguments)
    storage = arguments.storage_path or str(cache_of(arguments) / "sweeps")
    storage = storage if "://" in storage else str(Path(storage).expanduser().resolve())
    with study_lock(storage, study.id):
        return run_study(study, arguments, storage, tracker, resources)


def cache_of(arguments: Namespace) -> Path:
    """Where worlds are kept."""
    return Path(arguments.cache).expanduser().resolve()


def optuna_storage(arguments: Namespace) -> str:
    """Where a search is kept."""
    return arguments.optuna_storage or optuna_url(arguments.tracking_uri, Path.cwd())


def open_store(arguments: Namespace) -> StudyTracker:
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
    tags = {ARGUMENTS_TAG: json.dumps(study_arguments(arguments)), "llgbm.resources": resources.describe()}
    tracker.begin(study.name, study.id, study_params(study), {**study_tags(study, worlds), **tags})
    with status_on_exit(tracker):
        log_baselines(tracker, worlds, cache_of(arguments))
        run_notes.log_datasets(tracker.client, tracker.parent_run_id, list(worlds.values()))
        study = run_trials(study, arguments, worlds, storage, tracker, resources, search)
        results = read_trials(tracker.tracking_uri, tracker.parent_run_id)
        if arguments.keep_artifacts == "best":
            by_trial = {trial.id: worlds[trial.world.hash] for trial in study.trials}
            best = run_notes.best_trials(results, study.metric, arguments.keep_best)
            run_notes.keep_best_adapters(tracker.client, by_trial, best)
        registered = register_best(study, worlds, results, tracker, study.metric)
        summary = publish_report(tracker)
    print(json.dumps({**summary, "registered": registered}, sort_keys=True, allow_nan=False))
    return 0 if all(r.status == "FINISHED" for r in results) and len(results) == len(study.trials) else 1


def open_points(study: Study, arguments: Namespace, tracker: StudyTracker) -> PointSearch:
    """The search of a study as its storage has it, with what trials have reached already."""
    assert study.space is not None
    known = last_results(past_runs(tracker.tracking_uri, Path.cwd(), arguments.experiment))
    found = open_search(study, optuna_storage(arguments), arguments.fresh)
    search = PointSearch(study.space, found, points_of(arguments), known)
    if arguments.retry_failed:
        search.retry_failed()
    return search


def run_trials(
    study: Study,
    arguments: Namespace,
    worlds: Mapping[str, World],
    storage: str,
    tracker: StudyTracker,
    resources: Resources,
    search: PointSearch | None,
) -> Study:
    """Run those trials of a study that are left to run, if any, under Ray; return it with the trials that it has."""
    trials = settled_trials(search.trials() if search else study.trials, arguments, storage, tracker)
    left = [] if search else trials_to_run(trials, tracker.live_runs(), bool(arguments.resume), arguments.retry_failed)
    say(f"{search.describe() if search else f'{len(left)} of {len(trials)} trials to run'}, {resources.describe()}")
    if search.is_done() if search else not left:
        return replace(study, trials=trials)
    shared = {key: world.to("cpu") for key, world in worlds.items()}
    start_ray(resources, sum(world.n_bytes for world in shared.values()))
    # Ray takes two seconds to import and must find its settings made.
    from tuning.sweep import ListSearcher, run_sweep

    assert tracker.target is not None
    costs = Costs(past_runs(tracker.tracking_uri, Path.cwd(), arguments.experiment))
    order = TrialOrder(left, resources.concurrent, costs.seconds)
    run_sweep(
        study,
        shared,
        tracker.target,
        tracker,
        resources,
        make_searcher(search, optuna_storage(arguments)) if search else ListSearcher(order),
        make_scheduler(arguments.scheduler, study),
        storage=storage,
        total_steps=search.steps_left() if search else sum(trial.config.steps for trial in left),
        keep_adapters=arguments.keep_artifacts == "all",
        keep_checkpoints=arguments.keep_checkpoints,
    )
    leave_ray()
    if search:
        say(describe_best(search.space, search.study))
        trials = settled_trials(search.trials(), arguments, storage, tracker)
    return replace(study, trials=trials)


def settled_trials(
    trials: tuple[TrialSpec, ...], arguments: Namespace, storage: str, tracker: StudyTracker
) -> tuple[TrialSpec, ...]:
    """The same trials, once those that are finished count in this study and have left no checkpoint behind."""
    for trial in adopt_finished(trials, tracker.live_runs(), tracker):
        if not arguments.keep_checkpoints:
            TrialCheckpoints(storage, trial.id).remove()
    return trials


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
    known = "base_accuracy" in facts and f"base {facts['base_accuracy']:.3f}, teachers {facts['teacher_accuracy']:.3f}"
    return (
        f"world {world.config.hash} ({world.config.size}): {len(split.train)} training, {len(split.val)} validation, "
        f"{len(split.test)} test tasks; accuracy of {known or 'teachers taken over is not known'}"
    )


def study_params(study: Study) -> dict[str, Any]:
    """What the parent run says of the study."""
    trials = "searched" if study.space else len(study.trials)
    return {"study": study.name, "metric": study.metric, "trials": trials}


def note_of(study: Study) -> str:
    """Markdown for the parent run's page."""
    if study.space:
        return f"**{study.name}**: {study.space.describe()}\n\nWhy: {study.note}"
    return run_notes.study_note(study.name, study.trials, study.note)


def study_tags(study: Study, worlds: Mapping[str, World]) -> dict[str, str]:
    """Lineage of the parent run."""
    return {
        "llgbm.bank": ",".join(world.bank.hash for world in worlds.values()),
        "llgbm.base": ",".join(world.base.hash for world in worlds.values()),
        **run_notes.note_tags(note_of(study)),
    }


def log_baselines(tracker: StudyTracker, worlds: Mapping[str, World], cache: Path) -> None:
    """Log the baselines of every world on the parent run, unless it has them."""
    known = collect_baselines(tracker.metrics())
    for world in worlds.values():
        size = world.config.size
        mine = {n.removesuffix(f"_{size}"): m for n, m in known.items() if len(worlds) == 1 or n.endswith(f"_{size}")}
        if not mine:
            mine = known_baselines(cache, world)
            slugs = {name: name if len(worlds) == 1 else f"{name}_{size}" for name in mine}
            logged = {f"baseline/{slugs[n]}/{key}": v for n, values in mine.items() for key, v in values.items()}
            tracker.log_metrics({**logged, **{f"world/{size}/{k}": v for k, v in world.bank.facts.items()}})


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
    """Register one trial's generator: champion if it beats the champion on the same validation tasks."""
    name = f"llgbm-generator-{spec.world.size}" + ("-smoke" if spec.world.smoke else "")
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
        bundle = Path(tracker.download_artifacts(best.run_id, "generator", folder))
        figures = json.loads(Path(tracker.download_artifacts(best.run_id, "per_task.json", folder)).read_text())
        per_task = figures["val"][metric.removeprefix("val/")]
        return registry.register_generator(
            tracker.tracking_uri, best.run_id, bundle, name, tags, best.metrics[metric], metric, per_task
        )


def publish_report(tracker: StudyTracker) -> dict[str, Any]:
    """Write the report to the parent run, print its table, return its numbers."""
    record = read_study(tracker.tracking_uri, tracker.parent_run_id)
    with tempfile.TemporaryDirectory() as folder:
        write_report_files(Path(folder), record)
        print(summary(record))
        tracker.log_artifacts(Path(folder))
    return result_json(record)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and translate errors: 2 for a user's mistake, 130 for an interrupt, 1 for failed trials."""
    parsed = parse_arguments(arguments, __doc__)
    quiet_libraries()
    terminate_as_interrupt()
    return exit_status(lambda: run(parsed), parsed.debug, "interrupted: unfinished runs are marked KILLED")


if __name__ == "__main__":
    sys.exit(main())
