"""Search a study's space with Optuna (TPE) or at random.

A point is one Optuna trial; each of its seeds is a trial of the sweep. The state of a search is kept in Optuna's
storage only: a restarted driver finds the open points there and finishes them.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from llgbm.runtime import UserError, stream_seed
from tuning.search.queue import Result
from tuning.studies.spec import SearchSpace, Study, TrialSpec
from tuning.tracking.store import redact, sqlite_path, sqlite_uri, with_login

logger = logging.getLogger("tuning.search")
Answer = TypeVar("Answer")
STARTUP_POINTS = 5
STOPPED, RETRY_OF, TRIALS = "llgbm.stopped_at_step", "llgbm.retry_of", "llgbm.trial_ids"
STORAGE_ERRORS = (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, OSError)


def optuna_url(tracking_uri: str | None, root: Path) -> str:
    """Storage beside the MLflow store: of an SQLite store in its folder, else in `mlruns` under `root`."""
    local = tracking_uri is not None and tracking_uri.startswith("sqlite:")
    folder = sqlite_path(str(tracking_uri)).parent if local else Path(root).resolve() / "mlruns"
    return sqlite_uri(folder / "optuna.db")


@contextmanager
def explained_storage(url: str) -> Iterator[None]:
    """Turn what Optuna, the database and the disk raise in the block into a UserError of one sentence."""
    try:
        yield
    except UserError:
        raise
    except STORAGE_ERRORS as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"the Optuna storage {redact(url)} cannot be used ({reason[:200]}): give another --optuna-storage, "
            "sqlite:///path/optuna.db say"
        ) from error


def open_search(study: Study, url: str, fresh: bool = False) -> optuna.Study:
    """Optuna study of a search, found again under the study's id or created; `fresh` begins another beside it.

    Raises UserError where the storage cannot be used.
    """
    if study.space is None:
        raise ValueError(f"study {study.name} has no search space")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with explained_storage(url):
        if url.startswith("sqlite:"):
            sqlite_path(url).parent.mkdir(parents=True, exist_ok=True)
        storage = _storage(url)
        name = _study_name(study, storage, fresh)
        directions = [optuna.study.StudyDirection.MAXIMIZE] * len(study.space.objectives)
        return optuna.create_study(
            storage=storage, study_name=name, directions=directions, load_if_exists=True
        )


def find_search(study: Study, url: str) -> optuna.Study | None:
    """Optuna study of a search, or None where it was never begun; nothing is created.

    Raises UserError where the storage cannot be used.
    """
    if url.startswith("sqlite:") and not sqlite_path(url).is_file():
        return None
    with explained_storage(url):
        storage = _storage(url)
        name = _study_name(study, storage, fresh=False)
        known = name in optuna.get_all_study_names(storage)
        return optuna.load_study(storage=storage, study_name=name) if known else None


def _storage(url: str) -> optuna.storages.BaseStorage:
    try:
        return optuna.storages.get_storage(with_login(url))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the Optuna storage {redact(url)} cannot be opened ({redact(str(error))}): give another --optuna-storage, "
            "sqlite:///path/optuna.db say"
        ) from error


def _study_name(study: Study, storage: optuna.storages.BaseStorage, fresh: bool) -> str:
    """`<name>-<study id>-<n>` with the highest n that there is, one more with `fresh`; 1 where there is none."""
    stem = f"{study.name}-{study.id}-"
    numbers = [
        int(n.removeprefix(stem)) for n in optuna.get_all_study_names(storage) if n.startswith(stem)
    ]
    return f"{stem}{max(numbers, default=0) + 1 if fresh or not numbers else max(numbers)}"


@dataclass(frozen=True)
class Outcome:
    """Outcome of one seed of a point: its value of each objective (None: it failed), and whether it was stopped."""

    values: tuple[float, ...] | None
    step: int
    stopped: bool


class PointQueue:
    """Hand out the trials of points that Optuna draws; a point is told to Optuna when all its seeds have ended.

    `known` are the last results of trials that ended before, by trial id; these are told and not run again. `url` names
    the storage in errors. A storage that fails is tried again while trials run; after that UserError is raised.
    """

    def __init__(
        self,
        space: SearchSpace,
        optuna_study: optuna.Study,
        n_points: int,
        known: Mapping[str, Result] | None = None,
        url: str = "",
    ) -> None:
        if n_points < 1:
            raise UserError(f"{n_points} points of a search asked for; it must be at least 1")
        self._url = url
        self.space = space
        self.study = optuna_study
        self.n_points = n_points
        self.distributions: dict[str, BaseDistribution] = {
            name: FloatDistribution(low, high, log=True)
            for name, (low, high) in space.ranges.items()
        }
        self.results: dict[str, Result | None] = dict(known or {})
        self.running: set[str] = set()
        self._fail_half_asked()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the Optuna study out if it can be opened again: it holds the login of its storage."""
        state = vars(self).copy()
        if self._url:
            state["study"] = self.study.study_name
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._url:
            self.study = optuna.load_study(storage=_storage(self._url), study_name=state["study"])

    def ask(self) -> TrialSpec | None:
        """Return a seed of an open point, else of a new point; None if none can be started now."""
        return self._while_running(self._next, None)

    def _next(self) -> TrialSpec | None:
        self._settle()
        while (spec := next(self._waiting(), None)) is None:
            if len(self._points()) >= self.n_points:
                return None
            self._ask_point()
            self._settle()
        self.running.add(spec.id)
        return spec

    def _while_running(self, action: Callable[[], Answer], otherwise: Answer) -> Answer:
        """Return the action's answer, or `otherwise` if the storage fails while trials run."""
        try:
            with explained_storage(self._url):
                return action()
        except UserError:
            if self.running:
                return otherwise
            raise

    def progress(self, spec: TrialSpec, result: Result) -> None:
        """Ignore it: a point counts when all its seeds have ended."""

    def tell(self, spec: TrialSpec, result: Result | None) -> None:
        """Take the last result of a trial; None, or `failed` in the result, means that it failed."""
        self.running.discard(spec.id)
        self.results[spec.id] = result
        try:
            self._settle()
        except STORAGE_ERRORS as error:
            logger.warning("Optuna is told of a point later, its storage fails: %s", error)

    def trials(self) -> tuple[TrialSpec, ...]:
        """Return the trials of all points so far, those of earlier runs too, each once."""
        return drawn_trials(self.space, self.study)

    def is_done(self) -> bool:
        """Return True once every trial of every point has been handed out."""
        return self._while_running(self._is_drawn, False)

    def _is_drawn(self) -> bool:
        self._settle()
        return len(self._points()) >= self.n_points and next(self._waiting(), None) is None

    def steps_left(self) -> int:
        """Count the training steps of the trials that have not ended."""
        trials = [spec for point in self._points() for spec in self.space.trials(point.params)]
        missing = max(0, self.n_points - len(self._points())) * len(self.space.seeds)
        left = sum(spec.id not in self.results for spec in trials) + missing
        return left * self.space.base.config.steps

    def describe(self) -> str:
        """Say how many points are done, and which are best."""
        done = sum(point.state.is_finished() for point in self._points())
        how_far = f"{done} of {self.n_points} points done, {len(self.space.seeds)} seeds each"
        if not done:
            return how_far
        return f"{how_far}; {describe_best(self.space, self.study)}"

    def retry_failed(self) -> int:
        """Queue the failed points once more, and no others; return their number."""
        self.n_points = len(self._points())
        failed = [point for point in self._points() if point.state == TrialState.FAIL]
        for point in failed:
            self.study.enqueue_trial(point.params, user_attrs={RETRY_OF: point.number})
            for spec in self.space.trials(point.params):
                if spec.id in self.results and self._outcome(self.results[spec.id]).values is None:
                    del self.results[spec.id]
        return len(failed)

    def reopen_stopped(self) -> int:
        """Queue those points once more that another scheduler stopped; return their number."""
        stopped = [
            point
            for point in self._points()
            if STOPPED in point.user_attrs
            and any(spec.id not in self.results for spec in self.space.trials(point.params))
        ]
        for point in stopped:
            self.study.enqueue_trial(point.params, user_attrs={RETRY_OF: point.number})
        return len(stopped)

    def _waiting(self) -> Iterator[TrialSpec]:
        for point in self._points(TrialState.RUNNING):
            for spec in self.space.trials(point.params):
                if spec.id not in self.results and spec.id not in self.running:
                    yield spec

    def _ask_point(self) -> None:
        """New point. The sampler is seeded by the study and the point's number, not by what this process did."""
        number = len(whole_points(self.space, self.study, replaced=True))
        self.study.sampler = _sampler(
            self.space.sampler, stream_seed(self.study.study_name, number) % 2**32
        )
        point = self.study.ask(self.distributions)
        point.set_user_attr(TRIALS, [spec.id for spec in self.space.trials(point.params)])

    def _settle(self) -> None:
        """Tell every open point of which all seeds have ended."""
        for point in self._points(TrialState.RUNNING):
            ids = [spec.id for spec in self.space.trials(point.params)]
            if all(trial_id in self.results for trial_id in ids):
                self._tell_point(point, [self._outcome(self.results[trial_id]) for trial_id in ids])

    def _tell_point(self, point: FrozenTrial, outcomes: list[Outcome]) -> None:
        done = [outcome.values for outcome in outcomes if outcome.values is not None]
        if len(done) < len(outcomes):
            self.study.tell(point.number, state=TrialState.FAIL)
            return
        means = [sum(column) / len(done) for column in zip(*done, strict=True)]
        if not any(outcome.stopped for outcome in outcomes):
            self.study.tell(point.number, means)
            return
        step = min(outcome.step for outcome in outcomes if outcome.stopped)
        self._tell_stopped(optuna.trial.Trial(self.study, point._trial_id), means, step)

    def _tell_stopped(self, point: optuna.trial.Trial, means: list[float], step: int) -> None:
        """Optuna prunes points of one objective; of several it knows none, so the means so far stand, marked."""
        point.set_user_attr(STOPPED, step)
        if len(means) > 1:
            self.study.tell(point, means)
            return
        point.report(means[0], step)
        self.study.tell(point, state=TrialState.PRUNED)

    def _outcome(self, result: Result | None) -> Outcome:
        if result is None or result.get("failed"):
            return Outcome(None, 0, False)
        missing = [name for name in self.space.objectives if name not in result]
        if missing:
            logger.warning("a trial ended without %s: its point counts as failed", missing[0])
            return Outcome(None, 0, False)
        values = tuple(float(result[name]) for name in self.space.objectives)
        if not all(map(math.isfinite, values)):
            logger.warning("a trial ended with %s: its point counts as failed", values)
            return Outcome(None, 0, False)
        return Outcome(values, int(result.get("step", 0)), not result.get("finished", False))

    def _points(self, *states: TrialState) -> list[FrozenTrial]:
        return [t for t in whole_points(self.space, self.study) if not states or t.state in states]

    def _fail_half_asked(self) -> None:
        """Driver killed between asking and sampling leaves points without parameters: they are no points."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if not self.space.ranges.keys() <= trial.params.keys():
                self.study.tell(trial.number, state=TrialState.FAIL)


def whole_points(
    space: SearchSpace, optuna_study: optuna.Study, replaced: bool = False
) -> list[FrozenTrial]:
    """Points that have all their parameters; those that a retry replaces only if asked for."""
    trials = optuna_study.get_trials(deepcopy=False)
    retried = set() if replaced else {t.user_attrs.get(RETRY_OF) for t in trials}
    return [t for t in trials if space.ranges.keys() <= t.params.keys() and t.number not in retried]


def drawn_trials(space: SearchSpace, optuna_study: optuna.Study) -> tuple[TrialSpec, ...]:
    """Trials of a search's points, each once."""
    points = whole_points(space, optuna_study)
    return tuple(
        {spec.id: spec for point in points for spec in space.trials(point.params)}.values()
    )


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=STARTUP_POINTS, constant_liar=True
    )


def count_states(optuna_study: optuna.Study | None) -> dict[str, int]:
    """Count the points of a search by state."""
    trials = optuna_study.get_trials(deepcopy=False) if optuna_study else []
    return dict(Counter(trial.state.name.lower() for trial in trials))


def describe_best(space: SearchSpace, optuna_study: optuna.Study) -> str:
    """Best points that were run to their end: one of one objective, those that no other beats in all of several."""
    whole = [t for t in optuna_study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
    whole = [t for t in whole if STOPPED not in t.user_attrs]
    best = [t for t in whole if not any(_beats(other, t) for other in whole)]
    names = " and ".join(space.objectives)
    if not best:
        return f"no point of the search was run to its end: nothing to say of {names}"
    shown = [
        f"{space.trials(t.params)[0].name} ({', '.join(f'{v:.3f}' for v in t.values)})"
        for t in best[:5]
    ]
    more = f" and {len(best) - 5} more" if len(best) > 5 else ""
    return f"best of {len(whole)} points by mean {names} over {len(space.seeds)} seeds: {'; '.join(shown)}{more}"


def _beats(one: FrozenTrial, other: FrozenTrial) -> bool:
    """Return whether one point is at least as good in every objective, and better in one; of equals the earlier."""
    pairs = list(zip(one.values, other.values, strict=True))
    if all(mine == yours for mine, yours in pairs):
        return one.number < other.number
    return all(mine >= yours for mine, yours in pairs)
