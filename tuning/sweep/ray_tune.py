"""Run the trials of a queue with Ray Tune: scheduling, worker restarts, and final run statuses (set by the driver)."""

from __future__ import annotations

import re
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from llgbm.runtime import UserError, logger, progress_bar
from tuning.search.queue import TrialQueue
from tuning.studies.spec import TrialSpec
from tuning.sweep.asha import make_scheduler
from tuning.sweep.beside import Beside
from tuning.sweep.checkpoints import TrialCheckpoints, join, open_storage, remove_folder
from tuning.sweep.run import Job
from tuning.sweep.worker import RUN_ID, TrialSetting, ray_trainable
from tuning.tracking.ownership import Ownership
from tuning.tracking.runs import (
    DEATH_TAG,
    ERROR_TAG,
    NO_SCHEDULER,
    STOPPED_BY_TAG,
    STOPPED_TAG,
    read_trials,
)
from tuning.tracking.store import logins
from tuning.tracking.study import StudyTracker

HANDED_OUT_AGAIN = 3


class GivenUp:
    """Count how often Ray gave each trial up: whatever `max_failures`, it does if a reused worker died between trials.

    Such a trial is handed out again, a few times. The searcher and the watcher count apart: they may be pickled apart.
    """

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()

    def starts_again(self, trial_id: str) -> bool:
        """Return True if a trial that was given up just now is to be handed out again."""
        self._times[trial_id] += 1
        return self._times[trial_id] <= HANDED_OUT_AGAIN


class QueueSearcher(Searcher):
    """Adapt a `TrialQueue` to Ray Tune: suggest `{"trial": TrialSpec}`, pass on results and ends.

    `Searcher.save` and `restore` are not needed: a queue is opened from the stores each time.
    """

    def __init__(self, queue: TrialQueue) -> None:
        super().__init__()
        self._queue, self._given_up = queue, GivenUp()
        self._trials: dict[str, TrialSpec] = {}
        self._again: list[TrialSpec] = []

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial, None to be asked again later, or `Searcher.FINISHED` once no trial is open."""
        spec = self._again.pop() if self._again else self._queue.ask()
        if spec is not None:
            self._trials[trial_id] = spec
            return {"trial": spec}
        if self._queue.is_done() and not self._trials:
            return Searcher.FINISHED
        return None

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        """Pass an intermediate result on."""
        self._queue.progress(self._trials[trial_id], result)

    def on_trial_complete(
        self, trial_id: str, result: dict | None = None, error: bool = False
    ) -> None:
        """Pass the end on; a trial without error and without result was interrupted and stays open."""
        spec = self._trials.pop(trial_id)
        if error and self._given_up.starts_again(spec.id):
            self._again.append(spec)
        elif error:
            self._queue.tell(spec, None)
        elif result is not None:
            self._queue.tell(spec, result)

    def save(self, checkpoint_path: str) -> None:
        """Required by Ray."""

    def restore(self, checkpoint_path: str) -> None:
        """Required by Ray."""


class Watcher(tune.Callback):
    """Update the progress bar and set final run statuses. Updates that MLflow rejects are queued and retried.

    A trial that ended is released, and its checkpoints below `storage` are deleted if one is given and it was run to
    its end: a study without `scheduler` goes on with one that was stopped.
    """

    def __init__(
        self,
        tracker: StudyTracker,
        ownership: Ownership,
        storage: str | None,
        total_steps: int,
        scheduler: str = NO_SCHEDULER,
    ) -> None:
        self._tracker, self._ownership, self._storage = tracker, ownership, storage
        self._scheduler = scheduler
        self._bar = progress_bar("trials", total_steps)
        self._seen: dict[str, int] = {}
        self._run_ids: dict[str, str] = {}
        self._pending: list[Callable[[], object]] = []
        self._given_up = GivenUp()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the bar behind: over `ray://` none is shown."""
        return {**vars(self), "_bar": None}

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        """Move the bar, and remember the run that the worker writes to."""
        spec: TrialSpec = trial.config["trial"]
        self._seen[spec.id] = min(int(result.get("step", 0)), spec.config.steps)
        if RUN_ID in result:
            self._run_ids[spec.id] = result[RUN_ID]
        if self._bar is not None:
            self._bar.n = sum(self._seen.values())
            self._bar.refresh()

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Set the status of a trial that returned, or that a scheduler stopped."""
        spec, result = trial.config["trial"], trial.last_result or {}
        if result.get("failed"):
            self._end(spec, "FAILED", {ERROR_TAG: result["failed"]})
        elif result.get("reused"):
            self._update(partial(self._adopt, spec))
        elif result.get("finished"):
            self._end(spec, "FINISHED", {})
        else:
            stop = {STOPPED_TAG: str(result.get("step", 0)), STOPPED_BY_TAG: self._scheduler}
            self._end(spec, "FINISHED", stop)

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Record why the worker of a trial died; it is started again."""
        spec, cause = trial.config["trial"], death_of(trial)
        logger.warning("the worker of trial %s died and is started again: %s", spec.id, cause)
        self._update(partial(self._tracker.tag_trial, spec.id, {DEATH_TAG: cause}))

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Record why Ray gave a trial up; set its status if it is not handed out again."""
        if self._given_up.starts_again(trial.config["trial"].id):
            self.on_trial_recover(iteration, trials, trial)
            return
        tags = {ERROR_TAG: f"its worker died {HANDED_OUT_AGAIN + 1} times before it started"}
        self._end(trial.config["trial"], "FAILED", tags)

    def _end(self, spec: TrialSpec, status: str, tags: Mapping[str, str]) -> None:
        self._update(partial(self._finish, spec.id, status, tags, self._run_ids.get(spec.id)))

    def _finish(
        self, trial_id: str, status: str, tags: Mapping[str, str], run_id: str | None
    ) -> None:
        self._tracker.finish_trial(trial_id, status, tags, run_id)
        if self._storage and status == "FINISHED" and STOPPED_TAG not in tags:
            TrialCheckpoints(self._storage, trial_id).remove()
        self._ownership.release(trial_id)

    def _adopt(self, spec: TrialSpec) -> None:
        self._tracker.adopt(spec.id, spec.name)
        self._ownership.release(spec.id)

    def _update(self, update: Callable[[], object]) -> None:
        self._pending.append(update)
        try:
            self._flush()
        except UserError as error:
            logger.warning("%d trial statuses are set later: %s", len(self._pending), error)

    def _flush(self) -> None:
        while self._pending:
            self._pending[0]()
            del self._pending[0]

    def close(self) -> None:
        """Send the pending updates. Raises UserError if the store still fails."""
        if self._bar is not None:
            self._bar.close()
        self._flush()


def death_of(trial: Any) -> str:
    """Return Ray's account of a worker's last death, in one line, without Ray's names of processes."""
    if not trial.error_file:
        return "no cause known"
    last = Path(trial.error_file).read_text().rpartition("Failure # ")[2]
    lines = [line for line in last.splitlines()[1:] if not re.match(r"\s+\w+: ", line)]
    told = " ".join(line.strip() for line in lines if line.strip())
    return told[:500] or "no cause known"


def run_sweep(job: Job, queue: TrialQueue, ownership: Ownership) -> None:
    """Run the trials of a queue until it is done; the worlds of the job lie on the CPU.

    The driver sets the final status of each run. A worker that dies is started again, on another machine if its own is
    gone, and goes on from the trial's checkpoint. Raises KeyboardInterrupt on an interrupt, after all trials ended.
    """
    session, stores = uuid.uuid4().hex[:8], job.options.stores
    ray_folder = join(job.storage, f"ray/{job.study.id}")
    checkpoints = None if stores.keep_checkpoints else job.storage
    watcher = Watcher(job.tracker, ownership, checkpoints, queue.steps_left(), job.scheduler)
    remove_folder(*open_storage(ray_folder))
    tuner = tune.Tuner(
        _trainable(job, session),
        tune_config=tune.TuneConfig(
            search_alg=QueueSearcher(queue),
            scheduler=_scheduler(job),
            num_samples=-1,
            reuse_actors=True,
            max_concurrent_trials=job.resources.concurrent,
            trial_name_creator=trial_name,
            trial_dirname_creator=trial_name,
        ),
        run_config=tune.RunConfig(
            name=session,
            storage_path=ray_folder,
            failure_config=tune.FailureConfig(max_failures=-1),
            verbose=0,
            callbacks=[watcher],
        ),
    )
    try:
        beside = Beside(job.worlds, stores.cache_folder, job.resources) if job.is_beside else None
        tuner.fit()
        if beside is not None:
            beside.keep()
    except BaseException:
        ray.shutdown()
        raise
    finally:
        watcher.close()
        remove_folder(*open_storage(ray_folder))


def _scheduler(job: Job) -> Any:
    """Make the scheduler, with what the trials of the study have reported so far."""
    name, tracker = job.options.study.scheduler, job.tracker
    if name == NO_SCHEDULER:
        return None
    known = read_trials(tracker.tracking_uri, tracker.parent_run_id, [job.study.metric])
    return make_scheduler(name, job.study, [trial for trial in known if not trial.superseded])


def _trainable(job: Job, session: str) -> Any:
    """Bind the worker's function to the worlds, to its setting and to its share of a machine."""
    resources, target = job.resources, job.tracker.target
    assert target is not None
    setting = TrialSetting(
        target,
        job.storage,
        session,
        resources.threads,
        resources.gpus,
        keep_adapters=job.options.stores.keep_artifacts == "all",
        scheduler=job.scheduler,
        retry_oom=job.options.run.retry_oom,
        environment=logins() if job.options.run.address else {},
    )
    bound = tune.with_parameters(ray_trainable, worlds=dict(job.worlds), setting=setting)
    return tune.with_resources(bound, {"cpu": resources.cpus, "gpu": resources.gpus})


def trial_name(trial: Any) -> str:
    """Name a trial for Ray: by its id and, since a search may suggest a trial twice, Ray's own."""
    return f"{trial.config['trial'].id}_{trial.trial_id}"
