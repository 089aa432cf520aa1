"""Run the trials of a study that are left to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from llgbm.runtime import UserError, say
from llgbm.world import World
from tuning.search.queue import ListQueue, TrialQueue
from tuning.studies.options import Options
from tuning.studies.spec import Study, TrialSpec
from tuning.sweep.asha import scheduler_key
from tuning.sweep.beside import is_beside
from tuning.sweep.checkpoints import TrialCheckpoints
from tuning.sweep.cluster import Resources, is_spread, leave_ray, start_ray
from tuning.sweep.resume import adopt_finished, lost_trials, trials_to_run
from tuning.sweep.shared import SharedQueue
from tuning.tracking.costs import Costs, last_results, past_runs
from tuning.tracking.ownership import Ownership
from tuning.tracking.runs import TrialResult
from tuning.tracking.store import local_tracking_uri, usable_uri
from tuning.tracking.study import StudyTracker


@dataclass(frozen=True)
class Job:
    """Study to run, the options it is run with, and what it runs on; `worlds` by hash."""

    study: Study
    options: Options
    worlds: Mapping[str, World]
    tracker: StudyTracker
    storage: str
    resources: Resources

    @property
    def scheduler(self) -> str:
        """Return the key of the scheduler that judges its trials."""
        return scheduler_key(self.options.study.scheduler, self.study)

    @property
    def is_beside(self) -> bool:
        """True where baselines are measured beside the trials, not before them."""
        return is_beside(self.worlds, self.options.stores.cache_folder, self.resources)


def open_store(options: Options) -> StudyTracker:
    """Open the MLflow store. Raises UserError if it cannot be used, or not from all machines of the cluster."""
    uri = options.stores.tracking_uri
    local = not uri or uri.startswith("sqlite")
    if options.run.address and local and is_spread():
        raise UserError(
            "trials on several machines cannot write into one SQLite file: start `mlflow server` and give its "
            "address as --tracking-uri http://host:port"
        )
    return StudyTracker.open(uri, Path.cwd(), options.stores.experiment)


def read_past_runs(options: Options) -> list[TrialResult]:
    """Read the trials of the experiment; nothing is created."""
    return past_runs(options.stores.tracking_uri, Path.cwd(), options.stores.experiment)


def trials_lost(study: Study, options: Options) -> list[TrialSpec]:
    """Return the finished trials of a study whose artifacts are gone, if these are to be run again."""
    past: list[TrialResult] = []
    if options.run.retry_lost:
        own = {trial.id for trial in study.trials}
        past = [result for result in read_past_runs(options) if result.trial_id in own]
    lost: set[str] = set()
    if past:  # or else there may be no store yet
        uri = options.stores.tracking_uri or local_tracking_uri(Path.cwd())
        lost = lost_trials(usable_uri(uri), past)
    return [trial for trial in study.trials if trial.id in lost]


def open_queue(job: Job) -> TrialQueue:
    """Queue what is left to run of a study: points of its space, or trials of its list."""
    past = read_past_runs(job.options)
    if job.study.space is not None:
        return _open_points(job, past)
    trials, run = job.study.trials, job.options.run
    runs = job.tracker.live_runs()
    left = trials_to_run(trials, runs, bool(run.resume), run.retry_failed, job.scheduler)
    return ListQueue(trials, left, job.resources.concurrent, Costs(past).seconds)


def _open_points(job: Job, past: list[TrialResult]) -> TrialQueue:
    from tuning.search.points import PointQueue, open_search

    assert job.study.space is not None
    url, options = job.options.optuna_url, job.options
    found = open_search(job.study, url, options.run.fresh)
    known = last_results(past, job.scheduler)
    points = PointQueue(job.study.space, found, options.study.n_points, known, url)
    points.reopen_stopped()
    if options.run.retry_failed:
        points.retry_failed()
    return points


def run_trials(job: Job, ownership: Ownership) -> Study:
    """Run the trials of a study that are left to run; return the study with all its trials."""
    queue = SharedQueue(open_queue(job), ownership)
    settle_finished(job, queue.trials())
    say(f"{queue.describe()}, {job.resources.describe()}")
    if not queue.is_done():
        _run_queue(job, queue, ownership)
        say(queue.describe())
        settle_finished(job, queue.trials())
    return replace(job.study, trials=queue.trials())


def _run_queue(job: Job, queue: TrialQueue, ownership: Ownership) -> None:
    shared = {key: world.to("cpu") for key, world in job.worlds.items()}
    start_ray(job.resources, sum(world.n_bytes for world in shared.values()))
    # Ray takes two seconds to import, and reads its settings then: `start_ray` makes them first.
    from tuning.sweep.ray_tune import run_sweep

    run_sweep(replace(job, worlds=shared), queue, ownership)
    leave_ray()


def settle_finished(job: Job, trials: tuple[TrialSpec, ...]) -> None:
    """Make finished trials count in this study, and delete the checkpoints of those that nobody goes on with."""
    for trial in adopt_finished(trials, job.tracker.live_runs(), job.tracker, job.scheduler):
        if not job.options.stores.keep_checkpoints:
            TrialCheckpoints(job.storage, trial.id).remove()
