"""Trials under Ray Tune: which are run, how a dead worker is followed up, who says how each trial ended."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from llgbm.runtime import UserError, logger, progress_bar
from llgbm.world import World
from tuning.checkpoints import TrialCheckpoints, below, open_storage, remove_folder
from tuning.cluster import Resources
from tuning.order import TrialOrder
from tuning.runs import DEATH_TAG, ERROR_TAG, STOPPED_TAG
from tuning.studies import Study, TrialSpec
from tuning.tracking import StudyTracker, TrackingTarget
from tuning.trainable import TrialSetting, ray_trainable


class ListSearcher(Searcher):
    """Gives the trials of a list, each once, in an order that ends the sweep soon."""

    def __init__(self, order: TrialOrder) -> None:
        super().__init__()
        self._order = order

    def suggest(self, trial_id: str) -> Any:
        """The next trial; `Searcher.FINISHED` when all were given."""
        spec = self._order.next(trial_id)
        return {"trial": spec} if spec else Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        """How far a trial is says how long it will take."""
        self._order.progress(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """How long a trial took is what others of its kind will take."""
        self._order.ended(trial_id, result)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is left to run is read off the tracked runs."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as for `save`."""


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

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
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
            self._tell(partial(self._tracker.finish_trial, spec.id, "FAILED", {ERROR_TAG: result["failed"]}))
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
    setting = TrialSetting(target, storage, session, resources.threads, resources.gpus, keep_adapters)
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
