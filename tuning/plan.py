"""What a study would run, what of it is there already, and what it would cost; nothing is written or created."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from tabulate import tabulate

from llgbm.training import TrainingConfig
from llgbm.world import describe_world
from tuning.runs import STOPPED_TAG, SUPERSEDED_TAG, TRIAL_TAG, measured
from tuning.search import count_states, drawn_trials, find_search
from tuning.space import TrialSpec
from tuning.store import connect, explained, local_tracking_uri, sqlite_path, usable_uri
from tuning.studies import Study

Kind = tuple[Any, ...]


@dataclass(frozen=True)
class PastRun:
    """A finished trial as the store remembers it."""

    trial_id: str
    metrics: Mapping[str, float]
    params: Mapping[str, str]
    stopped_at: int | None

    @property
    def last_result(self) -> dict[str, Any]:
        """What the trial last reported: its metrics, its step, and whether it came to its end."""
        step = int(self.params["steps"]) if self.stopped_at is None else self.stopped_at
        return {**self.metrics, "step": step, "finished": self.stopped_at is None}

    @property
    def kind(self) -> Kind:
        """What its time depends on, as `kind_of` has it."""
        weight, delta = (float(self.params.get(f"lambda_{name}", 0)) > 0 for name in ("weight", "delta"))
        names = ("model_size", "generator.name", "batch_size", "n_probes", "n_prompts")
        return (*(self.params.get(name) for name in names), weight, self.params.get("delta_probes") if delta else None)


def kind_of(config: TrainingConfig) -> Kind:
    """Size, generator, sizes of a step, and which losses are computed."""
    probes = config.delta_probes if config.lambda_delta > 0 else None
    numbers = (str(n) for n in (config.batch_size, config.n_probes, config.n_prompts))
    return (config.model_size, config.generator.name, *numbers, config.lambda_weight > 0, probes)


def past_runs(tracking_uri: str | None, root: Path, experiment: str) -> list[PastRun]:
    """The finished trials of an experiment, none where there is no store yet; nothing is created.

    Raises UserError where the store cannot be read.
    """
    uri = tracking_uri or local_tracking_uri(root)
    if uri.startswith("sqlite:"):
        if not sqlite_path(uri).is_file():
            return []
    else:
        uri = usable_uri(uri)
    with explained(uri):
        client = connect(uri)
        found = client.get_experiment_by_name(experiment)
        return [] if found is None else list(_finished(client, found.experiment_id))


def _finished(client: Any, experiment_id: str) -> Iterator[PastRun]:
    token: str | None = None
    while True:
        page = client.search_runs([experiment_id], "attributes.status = 'FINISHED'", max_results=1000, page_token=token)
        for run in page:
            tags = run.data.tags
            if TRIAL_TAG in tags and SUPERSEDED_TAG not in tags:
                stopped = tags.get(STOPPED_TAG)
                yield PastRun(tags[TRIAL_TAG], measured(run), run.data.params, int(stopped) if stopped else None)
        token = page.token
        if not token:
            return


@dataclass(frozen=True)
class Costs:
    """Seconds of a trial, from past ones of its kind: the median second a step, and the median of what follows."""

    runs: Sequence[PastRun]

    @cached_property
    def _by_kind(self) -> dict[Kind, list[tuple[float, float]]]:
        found: dict[Kind, list[tuple[float, float]]] = {}
        for run in self.runs:
            rate, seconds = run.metrics.get("time/steps_per_second"), run.metrics.get("time/seconds")
            if rate and seconds and run.stopped_at is None:
                training = int(run.params["steps"]) / rate
                found.setdefault(run.kind, []).append((1 / rate, max(0.0, seconds - training)))
        return found

    def basis(self, config: TrainingConfig) -> int:
        """How many past runs an estimate stands on."""
        return len(self._by_kind.get(kind_of(config), []))

    def seconds(self, config: TrainingConfig) -> float | None:
        """The estimate, or None where no trial of the kind has finished."""
        past = self._by_kind.get(kind_of(config))
        if not past:
            return None
        a_step, rest = (median(column) for column in zip(*past, strict=True))
        return config.steps * a_step + rest


@dataclass(frozen=True)
class Plan:
    """The trials of a study, those of a search as far as they are drawn, and how many are still to be drawn."""

    study: Study
    trials: tuple[TrialSpec, ...]
    undrawn: int
    runs: Sequence[PastRun]

    @cached_property
    def finished(self) -> frozenset[str]:
        return frozenset(run.trial_id for run in self.runs)

    @property
    def to_run(self) -> list[TrialSpec]:
        """Each with a trial that stands for it: a search's base for one that is not drawn yet."""
        base = self.study.space.trials(_middle(self.study))[0] if self.study.space else None
        drawn = [trial for trial in self.trials if trial.id not in self.finished]
        return drawn + ([base] * self.undrawn if base else [])


def _middle(study: Study) -> dict[str, float]:
    assert study.space is not None
    return {name: (low * high) ** 0.5 for name, (low, high) in study.space.ranges.items()}


def show_plan(
    study: Study, cache: Path, runs: Sequence[PastRun], concurrent: int, optuna_url: str, n_points: int
) -> None:
    """Print the trial table, what of each world is built, and what the rest would cost."""
    plan = Plan(study, study.trials, 0, runs)
    if study.space:
        plan = _show_space(study, runs, optuna_url, n_points)
    costs = Costs(runs)
    if plan.trials:
        print(tabulate([_row(trial, plan, costs) for trial in plan.trials], HEADERS, disable_numparse=True))
    for world in study.worlds:
        print(f"\nworld {world.hash} ({world.size}, {len(world.suite.tasks)} tasks):")
        for part, built in describe_world(cache, world).items():
            print(f"  {part}: {built}")
    print(f"\n{describe_cost(plan, costs, concurrent)}")


HEADERS = ("trial", "configuration", "size", "generator", "λ_w", "λ_d", "rate", "seed", "steps", "state", "estimate")


def _row(trial: TrialSpec, plan: Plan, costs: Costs) -> tuple[Any, ...]:
    config = trial.config
    seconds = costs.seconds(config)
    done = trial.id in plan.finished
    return (
        *(trial.id, trial.name, config.model_size, config.generator.name),
        *(f"{config.lambda_weight:g}", f"{config.lambda_delta:g}", f"{config.learning_rate:g}"),
        *(config.seed, config.steps, "finished" if done else "to run"),
        "" if done else "no past run" if seconds is None else duration(seconds),
    )


def _show_space(study: Study, runs: Sequence[PastRun], optuna_url: str, n_points: int) -> Plan:
    """Print what is searched and what Optuna has of it; the plan of its trials."""
    space = study.space
    assert space is not None
    found = find_search(study, optuna_url)
    states = count_states(found)
    print(f"{study.id}: {space.describe()}")
    known = ", ".join(f"{count} {state}" for state, count in states.items()) or "none yet"
    print(f"points: {n_points} wanted; in the Optuna study: {known}\n")
    trials = drawn_trials(space, found) if found else ()
    missing = max(0, n_points * len(space.seeds) - len(trials))
    return Plan(study, trials, missing, runs)


def describe_cost(plan: Plan, costs: Costs, concurrent: int) -> str:
    """One or two sentences: how many trials are left, how long they would take, and what that is based on."""
    left = plan.to_run
    drawn = f", {plan.undrawn} of them still to be drawn" if plan.undrawn else ""
    total = len(plan.trials) + plan.undrawn
    head = f"{total} trials, {total - len(left)} finished already, {len(left)} to run{drawn}"
    if not left:
        return f"{head}."
    seconds = [costs.seconds(trial.config) for trial in left]
    known = [value for value in seconds if value is not None]
    if not known:
        return f"{head}; no past run of their kind in this experiment to estimate their time from."
    kinds = {kind_of(trial.config): costs.basis(trial.config) for trial in left}
    wall = max(sum(known) / concurrent, max(known))
    without = len(left) - len(known)
    rest = f" and nothing for {without} trials of a kind that has no past run" if without else ""
    return (
        f"{head}: about {duration(wall)} at {concurrent} at a time ({duration(sum(known))} in all), counted from "
        f"{sum(kinds.values())} past runs of the same size, generator, batch and losses{rest}; "
        "worlds to be built come on top."
    )


def duration(seconds: float) -> str:
    """72 s, 14 min, 3.2 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def last_results(runs: Iterable[PastRun]) -> dict[str, dict[str, Any]]:
    """What finished trials last reported, by trial id."""
    return {run.trial_id: run.last_result for run in runs}
