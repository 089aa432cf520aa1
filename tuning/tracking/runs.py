"""Find, read and write MLflow runs: studies (parent runs) and their trials (child runs)."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llgbm.runtime import UserError, redact_forms
from llgbm.terms.names import NAMED, PREFIX
from tuning.tracking.curves import Curve, read_curves
from tuning.tracking.store import all_pages, connect, quiet_mlflow, redact, store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT_TAG = "mlflow.parentRunId"
STUDY_TAG = "llgbm.study"
STUDY_ID_TAG = "llgbm.study_id"
WORLD_PARAM = "world_seed"
TRIAL_TAG = "llgbm.trial_id"
CONFIG_TAG = "llgbm.config"
SUPERSEDED_TAG = "llgbm.superseded"
ATTEMPTS_TAG = "llgbm.attempts"
ERROR_TAG = "llgbm.error"
DEATH_TAG = "llgbm.last_death"
STOPPED_TAG = "llgbm.stopped_at_step"
STOPPED_BY_TAG = (
    "llgbm.stopped_by"  # the scheduler and its settings; the study's own are under SCHEDULER_TAG
)
SCHEDULER_TAG = "llgbm.scheduler"
NO_SCHEDULER = "none"
MEMBER_TAG = "llgbm.member_of."
# Runs are looked for by these, and no secret is part of them.
IDENTITY_TAGS = (PARENT_TAG, STUDY_ID_TAG, TRIAL_TAG)
FINAL_STATUSES = ("FINISHED", "FAILED", "KILLED")
PARAM_LENGTH = 6000
PARAMS_PER_CALL = 100
METRICS_PER_CALL = 1000
RUNS_PER_PAGE = 1000
STUDIES_NAMED = 10


@dataclass(frozen=True)
class TrialResult:
    """Trial as read from its run: last values in `metrics`, if finite, and (step, value) pairs in `curves`."""

    trial_id: str
    config: str
    seed: int | None
    status: str
    metrics: Mapping[str, float]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    run_id: str = ""
    stopped_at: int | None = None
    stopped_by: str = ""
    superseded: bool = False
    cause: str = ""  # of its failure, or of its worker's last death

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", finite(self.metrics))

    @classmethod
    def of(
        cls, run: Run, config: str | None = None, curves: Mapping[str, Curve] | None = None
    ) -> TrialResult:
        """Read a trial's run; `config` overrides the name that its first study gave it."""
        tags, params, curves = run.data.tags, run.data.params, curves or {}
        return cls(
            trial_id=tags.get(TRIAL_TAG, ""),
            config=config or tags.get(CONFIG_TAG, run.info.run_name),
            seed=_whole_number(params.get("seed")),
            status=run.info.status,
            metrics={**run.data.metrics, **_last_values(curves)},
            curves=curves,
            params=dict(params),
            run_id=run.info.run_id,
            stopped_at=_whole_number(tags.get(STOPPED_TAG)),
            stopped_by=tags.get(STOPPED_BY_TAG, ""),
            superseded=not is_live(run),
            cause=tags.get(ERROR_TAG) or tags.get(DEATH_TAG, ""),
        )

    @property
    def is_complete(self) -> bool:
        """True if it was trained to its last step and evaluated, and no newer run replaces it."""
        return self.status == "FINISHED" and self.stopped_at is None and not self.superseded

    def is_done(self, scheduler: str) -> bool:
        """Return True if a study under this scheduler has nothing left to run of the trial.

        A trial that a scheduler stopped is done under this scheduler alone, also while another study goes on with it.
        """
        if self.stopped_at is None:
            return self.status == "FINISHED"
        # Versions that recorded no settings had one scheduler.
        return scheduler != NO_SCHEDULER and self.stopped_by in ("", scheduler)

    def seen_under(self, scheduler: str) -> TrialResult:
        """Return the trial as a study under this scheduler has it, whatever another study does with it now."""
        if self.stopped_at is not None and self.is_done(scheduler):
            return replace(self, status="FINISHED")
        if self.stopped_at is not None and self.status != "FINISHED":
            return replace(self, stopped_at=None)
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Return the weights above 0 of its loss terms by name; none if the trial names none."""
        named = {name: self.params[own] for name, own in NAMED.items() if own in self.params}
        others = {
            key.removeprefix(PREFIX): value
            for key, value in self.params.items()
            if key.startswith(PREFIX)
        }
        found = {name: _weight(value) for name, value in {**named, **others}.items()}
        return {name: value for name, value in found.items() if value > 0}

    @property
    def last_result(self) -> dict[str, Any]:
        """The trial's last report: metrics, `step`, and `finished` (False if a scheduler stopped it)."""
        step = self.stopped_at
        if step is None:
            step = _whole_number(self.params.get("steps")) or 0
        return {**self.metrics, "step": step, "finished": self.stopped_at is None}


def _whole_number(text: str | None) -> int | None:
    """Read a number that a run holds as text, None if it is none."""
    if text is None or not re.fullmatch(r"-?\d{1,18}", text):
        return None
    return int(text)


def _weight(text: str) -> float:
    """Read a weight; 0 for what is no number, since a store may hold anything."""
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0


def _last_values(curves: Mapping[str, Curve]) -> dict[str, float]:
    return {key: curve[-1][1] for key, curve in curves.items() if curve}


def measured(run: Run) -> dict[str, float]:
    """Return a run's last metrics that are finite. NaN is a placeholder, see `TrialTracker.show_first`."""
    return finite(run.data.metrics)


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """Return the values that are finite: what is compared is among these, so that NaN never wins."""
    return {key: value for key, value in values.items() if math.isfinite(value)}


def read_trials(
    tracking_uri: str, parent_run_id: str, curve_keys: Collection[str] | None = None
) -> list[TrialResult]:
    """Read the trials of a study, oldest first, with the curves of `curve_keys` (None: see `read_curves`).

    Trials that another study ran and this one shares are included, under this study's name for them.
    Raises UserError if the store fails or has no such run.
    """
    quiet_mlflow()
    member_tag = MEMBER_TAG + parent_run_id
    with store_errors(tracking_uri):
        client = connect(tracking_uri)
        parent = client.get_run(parent_run_id)
        experiment_id = parent.info.experiment_id
        own = list(find_runs(client, experiment_id, {PARENT_TAG: parent_run_id}))
        shared = list(find_runs(client, experiment_id, {member_tag: None}))
        runs = {run.info.run_id: run for run in (*own, *shared)}
        curves = read_curves(client, list(runs.values()), curve_keys)
    scheduler = parent.data.tags.get(SCHEDULER_TAG, NO_SCHEDULER)
    # Obsolete in this study is only a run that has a newer one here.
    by_age = sorted(runs.values(), key=lambda run: (is_live(run), run.info.start_time))
    newest = {run.data.tags.get(TRIAL_TAG, ""): run.info.run_id for run in by_age}
    results = [
        TrialResult.of(run, run.data.tags.get(member_tag), curves[run_id]).seen_under(scheduler)
        for run_id, run in runs.items()
    ]
    return [replace(one, superseded=newest[one.trial_id] != one.run_id) for one in results]


def is_live(run: Run) -> bool:
    """True unless a newer run replaces this one (`--fresh`)."""
    return SUPERSEDED_TAG not in run.data.tags


def trial_run(client: MlflowClient, experiment_id: str, trial_id: str) -> Run | None:
    """Return the live run of a trial, None if there is none."""
    return next(filter(is_live, find_runs(client, experiment_id, {TRIAL_TAG: trial_id})), None)


def find_runs(
    client: MlflowClient, experiment_id: str, tags: Mapping[str, str | None]
) -> Iterator[Run]:
    """Yield the runs with these tags, oldest first; None matches any value."""
    where = " and ".join(_condition(key, value) for key, value in tags.items())
    return all_pages(
        lambda token: client.search_runs(
            [experiment_id],
            where,
            max_results=RUNS_PER_PAGE,
            order_by=["attributes.start_time ASC"],
            page_token=token,
        )
    )


def _condition(tag: str, value: str | None) -> str:
    if value is None:
        return f"tags.`{tag}` LIKE '%'"
    return f"tags.`{tag}` = '{value}'"


def open_run(
    client: MlflowClient, experiment_id: str, found: Run | None, name: str, tags: Mapping[str, str]
) -> str:
    """Create a run, or reopen `found`: set it RUNNING, clear its error and update its tags. Return its id.

    That a scheduler stopped it stays on record until it is run to its end: the study of that scheduler has it so.
    """
    tags = {key: value if key in IDENTITY_TAGS else redact(value) for key, value in tags.items()}
    if found is None:
        return client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
    run_id = found.info.run_id
    client.update_run(run_id, status="RUNNING")
    if ERROR_TAG in found.data.tags:
        client.delete_tag(run_id, ERROR_TAG)
    for key, value in tags.items():
        if found.data.tags.get(key) != value:
            client.set_tag(run_id, key, value)
    return run_id


def log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    """Log the parameters that a run lacks. Raises UserError if it has another value of one."""
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    wanted = dict(flat_params(params))
    changed = sorted(key for key, value in wanted.items() if known.get(key, value) != value)
    if changed:
        key = changed[0]
        raise UserError(
            f"this run was begun with {key} = {known[key]} and is opened again with {wanted[key]}: "
            "restore the old value or start under a new name."
        )
    fresh = [Param(key, value) for key, value in wanted.items() if key not in known]
    for chunk in chunks(fresh, PARAMS_PER_CALL):
        client.log_batch(run_id, params=chunk)


def flat_params(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested parameters as ("outer.inner", text) pairs, cut to the length that MLflow takes."""
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from flat_params(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", redact_forms(str(value))[:PARAM_LENGTH]


def chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Yield consecutive slices of at most `size` items."""
    return (items[start : start + size] for start in range(0, len(items), size))


@dataclass(frozen=True)
class TrackingTarget:
    """Address that the trials of a study report to; small and picklable, since it is sent to workers."""

    tracking_uri: str
    experiment_id: str
    parent_run_id: str
    study: str


def check_finite(step: int, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics as floats. Raises ValueError if one is not finite."""
    values = {key: float(value) for key, value in metrics.items()}
    for key, value in values.items():
        if not math.isfinite(value):
            raise ValueError(
                f"metric {key!r} is {value} at step {step}: only finite values can be logged"
            )
    return values


def now_ms() -> int:
    """Return the time in milliseconds, as MLflow counts it."""
    return int(time.time() * 1000)


def find_study(tracking_uri: str, asked: str, experiment: str | None = None) -> Run:
    """Return the parent run of a study by study id, run id or `latest`, in one experiment or (None) in all.

    If a study has several runs, the newest live one counts. Raises UserError if the store fails, or has no such
    experiment or study.
    """
    with store_errors(tracking_uri):
        client = connect(tracking_uri)
        runs = parent_runs(client, _experiment_ids(client, experiment, tracking_uri))
    where = f", experiment {experiment!r}," if experiment else ""
    return pick_study(runs, asked, redact(tracking_uri) + where)


def pick_study(runs: Sequence[Run], asked: str, where: str) -> Run:
    """Return the parent run among `runs` that `asked` means. Raises UserError that names the known ones."""
    found = [run for run in runs if asked in _names(run)]
    if found:
        return max(found, key=lambda run: (is_live(run), run.info.start_time))
    raise UserError(f"{where} has no study {asked!r}: it has {_known(runs)}.")


def _names(run: Run) -> tuple[str, ...]:
    return "latest", run.data.tags[STUDY_ID_TAG], run.info.run_id


def _known(runs: Sequence[Run]) -> str:
    newest = sorted(runs, key=lambda run: -run.info.start_time)
    tags = [run.data.tags for run in newest]
    named = list(dict.fromkeys(f"{own[STUDY_ID_TAG]} ({own.get(STUDY_TAG, '?')})" for own in tags))
    older = len(named) - STUDIES_NAMED
    more = f" and {older} older ones" if older > 0 else ""
    return ", ".join(named[:STUDIES_NAMED]) + more or "none at all"


def _experiment_ids(client: MlflowClient, name: str | None, tracking_uri: str) -> list[str]:
    found = all_pages(lambda token: client.search_experiments(page_token=token))
    known = {experiment.name: experiment.experiment_id for experiment in found}
    if name is None:
        return list(known.values())
    if name not in known:
        raise UserError(
            f"{redact(tracking_uri)} has no experiment {name!r}: it has {', '.join(sorted(known))}."
        )
    return [known[name]]


def parent_runs(client: MlflowClient, experiment_ids: Sequence[str]) -> list[Run]:
    """Return the parent runs of all studies in these experiments, oldest first in each."""
    found: list[Run] = []
    for experiment_id in experiment_ids:
        runs = find_runs(client, experiment_id, {STUDY_ID_TAG: None})
        found += [run for run in runs if PARENT_TAG not in run.data.tags]
    return found
