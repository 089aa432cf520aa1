"""Plan and estimate a study without running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tabulate import tabulate

from llgbm.estimate import TrialEstimate, WorldSketch, human
from llgbm.world import describe_world
from tuning.search.points import count_states, drawn_trials, find_search
from tuning.studies.spec import Study, TrialSpec
from tuning.tracking.costs import Costs, kind_of
from tuning.tracking.runs import TrialResult


@dataclass(frozen=True)
class Plan:
    """The trials of a study, those of a search as far as they are drawn, and how many are still to be drawn."""

    study: Study
    trials: tuple[TrialSpec, ...]
    undrawn: int
    runs: Sequence[TrialResult]

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
    study: Study,
    cache: Path,
    runs: Sequence[TrialResult],
    concurrent: int,
    optuna_url: str,
    n_points: int,
) -> None:
    """Print the trial table, what of each world is built, and what the rest would cost."""
    plan = Plan(study, study.trials, 0, runs)
    if study.space:
        plan = _show_space(study, runs, optuna_url, n_points)
    costs = Costs(runs)
    if plan.trials:
        print(
            tabulate(
                [_row(trial, plan, costs) for trial in plan.trials], HEADERS, disable_numparse=True
            )
        )
    for world in study.worlds:
        print(f"\nworld {world.hash} ({world.size}, {len(world.suite.tasks)} tasks):")
        for part, built in describe_world(cache, world).items():
            print(f"  {part}: {built}")
    print(f"\n{describe_cost(plan, costs, concurrent)}")


HEADERS = (
    "trial",
    "configuration",
    "size",
    "generator",
    "λ_w",
    "λ_d",
    "rate",
    "seed",
    "steps",
    "state",
    "estimate",
)


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


def _show_space(study: Study, runs: Sequence[TrialResult], optuna_url: str, n_points: int) -> Plan:
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


def estimate_study(study: Study) -> str:
    """A line a configuration (parameters, FLOPs, memory of a trial), then the world and the sum, for people.

    Raises UserError for a base that is not on this machine, or of another kind than Qwen2 and Llama.
    """
    trials = list(study.trials) or ([study.space.base] if study.space else [])
    worlds = {world.hash: WorldSketch(world) for world in study.worlds}
    found = [(trial, worlds[trial.world.hash].estimate(trial.config)) for trial in trials]
    total = sum(estimate.flops for _, estimate in found)
    building = sum(world.teacher_flops for world in worlds.values())
    return "\n".join(
        (
            _table(found),
            f"training of {len(found)} trials: {human(total, 'FLOP')}; teachers of {len(worlds)} worlds: "
            f"{human(building, 'FLOP')}; evaluation and the making of a base are not counted",
            "memory is a trial's peak on its device, from formulas: leave a fifth of the device free",
        )
    )


def _table(found: list[tuple[TrialSpec, TrialEstimate]]) -> str:
    rows: dict[tuple[str, str], list[Any]] = {}
    for trial, estimate in found:
        key = (trial.name, str(trial.config.model_size))
        rows.setdefault(key, [*key, 0, *_cells(estimate)])[2] += 1
    memory = list(found[0][1].memory)
    headers = [
        "configuration",
        "base",
        "trials",
        "base params",
        "adapter",
        "generator",
        "FLOP a step",
        "FLOP a trial",
    ]
    return tabulate(list(rows.values()), [*headers, *memory, "peak"], disable_numparse=True)


def _cells(estimate: TrialEstimate) -> list[str]:
    sizes = (estimate.base_parameters, estimate.adapter_values, estimate.generator_parameters)
    costs = (estimate.step_flops, estimate.flops)
    return [
        *(human(n) for n in (*sizes, *costs)),
        *(human(b, "B") for b in (*estimate.memory.values(), estimate.peak_bytes)),
    ]
