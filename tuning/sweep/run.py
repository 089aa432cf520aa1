"""Trials under Ray Tune: which are run, how a dead worker is followed up, who says how each trial ended."""

from __future__ import annotations

import re
import uuid
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from llgbm.runtime import UserError, logger, progress_bar, say
from llgbm.world import World
from tuning.arguments import points_of
from tuning.search.points import PointSearch, describe_best, make_searcher, open_search, optuna_url
from tuning.search.queue import TrialOrder
from tuning.studies.spec import Study, TrialSpec
from tuning.sweep.checkpoints import TrialCheckpoints, below, open_storage, remove_folder
from tuning.sweep.cluster import Resources, is_spread, leave_ray, start_ray
from tuning.sweep.resume import adopt_finished, trials_to_run
from tuning.sweep.worker import TrialSetting, ray_trainable
from tuning.tracking.costs import Costs, last_results, past_runs
from tuning.tracking.runs import DEATH_TAG, ERROR_TAG, STOPPED_TAG, TrackingTarget
from tuning.tracking.study import StudyTracker


def rungs(study: Study) -> tuple[int, int]:
    """First and last step at which ASHA may stop a trial: after a quarter of the steps, and before the end.

    A rung is reached at an evaluation. The last one before the end bounds them, since a trial that comes to its last
    step must not be stopped: its final evaluation is still to come. Raises UserError where there is none.
    """
    configs = [trial.config for trial in ((study.space.base,) if study.space else study.trials)]
    shortest = min(configs, key=lambda config: config.steps)
    last = (shortest.steps - 1) // shortest.eval_every * shortest.eval_every
    if last == 0:
        raise UserError(
            f"asha judges trials at evaluations before their end, but {shortest.steps} steps with one every "
            f"{shortest.eval_every} have none: raise --steps or leave --scheduler out"
        )
    return min(last, max(shortest.steps // 4, shortest.eval_every)), last


def make_scheduler(name: str, study: Study) -> Any:
    """None, or ASHA on the study's validation metric: the lower half stops at each rung, each at twice the last steps.

    Raises UserError as `rungs`.
    """
    if name == "none":
        return None
    from ray.tune.schedulers import ASHAScheduler

    first, last = rungs(study)
    return ASHAScheduler(
        time_attr="step",
        metric=study.metric,
        mode="max",
        max_t=last,
        grace_period=first,
        reduction_factor=2,
        stop_last_trials=False,
    )


class Watcher(tune.Callback):
    """Shows progress and decides FINISHED and FAILED. What the store does not take at once is told it again later.

    Finished trials' checkpoints below `storage` are deleted, if one is given.
    """

    def __init__(self, tracker: StudyTracker, storage: str | None, total_steps: int) -> None:
        self._tracker, self._storage = tracker, storage
        self._bar = progress_bar("trials", total_steps)
        self._seen: dict[str, int] = {}
        self._unsaid: list[Callable[[], object]] = []

    def __getstate__(self) -> dict[str, Any]:
        """A bar does not travel; over `ray://` none is shown."""
        return {**vars(self), "_bar": None}

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        """Move the bar."""
        spec: TrialSpec = trial.config["trial"]
        self._seen[spec.id] = min(int(result.get("step", 0)), spec.config.steps)
        if self._bar is not None:
            self._bar.n = sum(self._seen.values())
            self._bar.refresh()

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """The trial returned, well or with the cause of its failure, or a scheduler stopped it."""
        spec, result = trial.config["trial"], trial.last_result or {}
        if result.get("failed"):
            self._tell(
                partial(
                    self._tracker.finish_trial, spec.id, "FAILED", {ERROR_TAG: result["failed"]}
                )
            )
        elif result.get("reused"):
            self._tell(partial(self._tracker.adopt, spec.id, spec.name))
        else:
            tags = {} if result.get("finished") else {STOPPED_TAG: str(result.get("step", 0))}
            self._tell(partial(self._finish, spec.id, tags))

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Its process or machine is gone; Ray starts it again."""
        spec, cause = trial.config["trial"], death_of(trial)
        logger.warning("the worker of trial %s died and is started again: %s", spec.id, cause)
        self._tell(partial(self._tracker.tag_trial, spec.id, {DEATH_TAG: cause}))

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Ray gave the trial up."""
        tags = {ERROR_TAG: "its worker died and could not be started again"}
        self._tell(partial(self._tracker.finish_trial, trial.config["trial"].id, "FAILED", tags))

    def _finish(self, trial_id: str, tags: Mapping[str, str]) -> None:
        self._tracker.finish_trial(trial_id, "FINISHED", tags)
        if self._storage:
            TrialCheckpoints(self._storage, trial_id).remove()

    def _tell(self, saying: Callable[[], object]) -> None:
        self._unsaid.append(saying)
        try:
            self._say_all()
        except UserError as error:
            logger.warning("%d ends of trials are told later: %s", len(self._unsaid), error)

    def _say_all(self) -> None:
        while self._unsaid:
            self._unsaid[0]()
            del self._unsaid[0]

    def close(self) -> None:
        """Say what is left to be said. Raises UserError if the store still fails."""
        if self._bar is not None:
            self._bar.close()
        self._say_all()


def death_of(trial: Any) -> str:
    """What Ray wrote of a worker's last end, in one line, without the names that Ray gives to processes."""
    written = Path(trial.error_file).read_text() if trial.error_file else ""
    lines = written.rpartition("Failure # ")[2].splitlines()[1:]
    told = [line.strip() for line in lines if line.strip() and not re.match(r"\s+\w+: ", line)]
    return " ".join(told)[:500] or "no cause known"


def run_sweep(
    study: Study,
    worlds: Mapping[str, World],
    target: TrackingTarget,
    tracker: StudyTracker,
    resources: Resources,
    searcher: Searcher,
    scheduler: Any = None,
    *,
    storage: str,
    total_steps: int = 0,
    keep_adapters: bool = True,
    keep_checkpoints: bool = False,
) -> None:
    """Run what `searcher` suggests (`{"trial": TrialSpec}`) until it is finished; `worlds` by hash, on the CPU.

    Each run's final status is set here, in the driver, whatever became of its worker. A worker that dies is started
    again, on another machine if its own is gone, and goes on from the trial's checkpoint below `storage`.
    `total_steps` is the length of the progress bar. Raises KeyboardInterrupt on an interrupt, when no trial runs any
    more.
    """
    session, own_notes = uuid.uuid4().hex[:8], below(storage, f"ray/{study.id}")
    setting = TrialSetting(
        target, storage, session, resources.threads, resources.gpus, keep_adapters
    )
    watcher = Watcher(tracker, None if keep_checkpoints else storage, total_steps)
    remove_folder(*open_storage(own_notes))
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(ray_trainable, worlds=dict(worlds), setting=setting),
            {"cpu": resources.cpus, "gpu": resources.gpus},
        ),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1,
            reuse_actors=True,
            max_concurrent_trials=resources.concurrent,
            trial_name_creator=trial_name,
            trial_dirname_creator=trial_name,
        ),
        run_config=tune.RunConfig(
            name=session,
            storage_path=own_notes,
            failure_config=tune.FailureConfig(max_failures=-1),
            verbose=0,
            callbacks=[watcher],
        ),
    )
    try:
        tuner.fit()
    except BaseException:
        ray.shutdown()
        raise
    finally:
        watcher.close()
        remove_folder(*open_storage(own_notes))


def trial_name(trial: Any) -> str:
    """What Ray calls a trial: our id and, since a search may suggest a trial twice, its own."""
    return f"{trial.config['trial'].id}_{trial.trial_id}"


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
    trials = settled_trials(
        search.trials() if search else study.trials, arguments, storage, tracker
    )
    left = (
        []
        if search
        else trials_to_run(
            trials, tracker.live_runs(), bool(arguments.resume), arguments.retry_failed
        )
    )
    say(
        f"{search.describe() if search else f'{len(left)} of {len(trials)} trials to run'}, {resources.describe()}"
    )
    if search.is_done() if search else not left:
        return replace(study, trials=trials)
    shared = {key: world.to("cpu") for key, world in worlds.items()}
    start_ray(resources, sum(world.n_bytes for world in shared.values()))
    # Ray takes two seconds to import and must find its settings made.
    from tuning.search.queue import ListSearcher
    from tuning.sweep.run import run_sweep

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
