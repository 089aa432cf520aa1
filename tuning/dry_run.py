"""Plan and estimate a study without running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from tabulate import tabulate

from llgbm.estimate import TrialEstimate, WorldSketch, human
from llgbm.world import describe_world
from tuning.search.points import count_states, drawn_trials, find_search
from tuning.studies.options import Options, RunOptions
from tuning.studies.spec import Study, TrialSpec
from tuning.studies.terms import weights_text
from tuning.sweep.asha import scheduler_key
from tuning.sweep.cluster import Resources
from tuning.sweep.resume import left_to_run
from tuning.sweep.run import read_past_runs, trials_lost
from tuning.tracking.costs import Costs, kind_of
from tuning.tracking.runs import NO_SCHEDULER, TrialResult


@dataclass(frozen=True)
class Plan:
    """Trials of a study (of a search: those drawn so far), and the number still to be drawn."""

    study: Study
    trials: tuple[TrialSpec, ...]
    undrawn: int
    runs: Sequence[TrialResult]
    run: RunOptions = RunOptions()
    scheduler: str = NO_SCHEDULER

    @cached_property
    def _results(self) -> dict[str, TrialResult]:
        if self.run.fresh:
            return {}
        return {run.trial_id: run for run in self.runs}

    @cached_property
    def drawn(self) -> list[TrialSpec]:
        """Trials left to run, of those that are known."""
        run = self.run
        return left_to_run(
            self.trials, self._results, bool(run.resume), run.retry_failed, self.scheduler
        )

    def state(self, trial: TrialSpec) -> str:
        """Return `finished`, `to run`, or how a trial ended that is left as it is."""
        if trial in self.drawn:
            return "to run"
        result = self._results.get(trial.id)
        if result is None:
            return "left out"
        if result.is_done(self.scheduler):
            return "finished"
        return f"left {result.status.lower()}"

    @property
    def to_run(self) -> list[TrialSpec]:
        """Trials left to run; the middle of the space stands for each one that is not drawn yet."""
        drawn = self.drawn
        if self.study.space is None:
            return drawn
        ranges = self.study.space.ranges.items()
        middle = {name: (low * high) ** 0.5 for name, (low, high) in ranges}
        return drawn + [self.study.space.trials(middle)[0]] * self.undrawn


def show_preview(study: Study, options: Options, resources: Resources) -> None:
    """Print what `--estimate` and `--dry-run` ask for; nothing is run or written."""
    if options.run.estimate:
        print(estimate_study(study, options.run.stream))
    if options.run.dry_run:
        show_plan(study, options, resources.concurrent)


def show_plan(study: Study, options: Options, concurrent: int) -> None:
    """Print the trial table, the state of each world, and the cost of the trials left to run."""
    for world in study.worlds:
        if world.base is not None:
            WorldSketch(world)  # refuses a base that no teacher can be trained on
    runs, cache = read_past_runs(options), options.stores.cache_folder
    scheduler = scheduler_key(options.study.scheduler, study)
    lost = {trial.id for trial in trials_lost(study, options)}
    known = [run for run in runs if run.trial_id not in lost]
    plan = Plan(study, study.trials, 0, known, options.run, scheduler)
    if study.space:
        plan = _show_space(plan, options)
    costs = Costs(runs)
    if plan.trials:
        rows = [_row(trial, plan, costs) for trial in plan.trials]
        print(tabulate(*without_empty(rows, HEADERS), disable_numparse=True))
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
    "terms",
    "rate",
    "seed",
    "steps",
    "state",
    "estimate",
)


def _row(trial: TrialSpec, plan: Plan, costs: Costs) -> tuple[Any, ...]:
    config = trial.config
    seconds = costs.seconds(config)
    state = (plan.state(trial), "")
    if trial in plan.drawn:
        state = ("to run", "no past run" if seconds is None else duration(seconds))
    return (
        *(trial.id, trial.name, config.model_size, config.generator.text),
        *(f"{config.lambda_weight:g}", f"{config.lambda_delta:g}", weights_text(config.terms)),
        f"{config.learning_rate:g}",
        *(config.seed, config.steps, *state),
    )


def without_empty(
    rows: Sequence[Sequence[Any]], headers: Sequence[str]
) -> tuple[list[list[Any]], list[str]]:
    """Return a table without the column `terms` where no row has any."""
    place = headers.index("terms")
    if any(row[place] for row in rows):
        return [list(row) for row in rows], list(headers)
    return [[*row[:place], *row[place + 1 :]] for row in rows], [
        header for header in headers if header != "terms"
    ]


def _show_space(plan: Plan, options: Options) -> Plan:
    """Print the space and the points that Optuna has drawn; return the plan of its trials."""
    study, space, n_points = plan.study, plan.study.space, options.study.n_points
    assert space is not None
    found = None
    if not plan.run.fresh:
        found = find_search(study, options.optuna_url)
    states = count_states(found)
    print(f"{study.id}: {space.describe()}")
    known = ", ".join(f"{count} {state}" for state, count in states.items()) or "none yet"
    print(f"points: {n_points} wanted; in the Optuna study: {known}\n")
    trials: tuple[TrialSpec, ...] = ()
    if found:
        trials = drawn_trials(space, found)
    missing = max(0, n_points * len(space.seeds) - len(trials))
    if plan.run.retry_failed:
        missing = 0
    return replace(plan, trials=trials, undrawn=missing)


def describe_cost(plan: Plan, costs: Costs, concurrent: int) -> str:
    """Say how many trials are left, how long they would take, and on what that is based."""
    left, total = plan.to_run, len(plan.trials) + plan.undrawn
    finished = sum(plan.state(trial) == "finished" for trial in plan.trials)
    head = f"{total} trials, {finished} finished already, {len(left)} to run"
    if others := total - finished - len(left):
        head += f", {others} left as they are"
    if plan.undrawn:
        head += f", {plan.undrawn} of them still to be drawn"
    if not left:
        return f"{head}."
    seconds = [costs.seconds(trial.config) for trial in left]
    known = [value for value in seconds if value is not None]
    if not known:
        return f"{head}; no past run of their kind in this experiment to estimate their time from."
    kinds = {kind_of(trial.config): costs.basis(trial.config) for trial in left}
    wall = max(sum(known) / concurrent, max(known))
    rest = ""
    if without := len(left) - len(known):
        rest = f" and nothing for {without} trials of a kind that has no past run"
    return (
        f"{head}: about {duration(wall)} at {concurrent} at a time ({duration(sum(known))} in all), counted from "
        f"{sum(kinds.values())} past runs of the same size, generator, batch and losses{rest}; "
        "worlds to be built come on top."
    )


def duration(seconds: float) -> str:
    """Format seconds: 72 s, 14 min, 3.2 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def estimate_study(study: Study, stream: str = "auto") -> str:
    """Describe the cost of each configuration (parameters, FLOPs, memory of a trial) and of the whole study.

    Raises UserError for a base that is not on this machine, or of another kind than Qwen2 and Llama.
    """
    trials = list(study.trials)
    if study.space:
        trials = [study.space.base]
    worlds = {world.hash: WorldSketch(world, stream) for world in study.worlds}
    found = [(trial, worlds[trial.world.hash].estimate(trial.config)) for trial in trials]
    total = sum(estimate.flops for _, estimate in found)
    building = sum(world.teacher_flops for world in worlds.values())
    reading = max(world.reading_flops for world in worlds.values())
    lines = [
        _table(found),
        f"training of {len(found)} trials: {human(total, 'FLOP')}; teachers of {len(worlds)} worlds: "
        f"{human(building, 'FLOP')}; evaluation and the making of a base are not counted",
        "memory is a trial's peak on its device, from formulas: leave a fifth of the device free",
    ]
    if reading:
        lines.append(
            f"answers of validation and held-out tasks are written out to be read: up to {human(reading, 'FLOP')} each "
            "time that both are scored"
        )
    return "\n".join(lines)


def _table(found: list[tuple[TrialSpec, TrialEstimate]]) -> str:
    rows: dict[tuple[str, str], list[Any]] = {}
    memory = list(dict.fromkeys(part for _, estimate in found for part in estimate.memory))
    for trial, estimate in found:
        key = (trial.name, str(trial.config.model_size))
        rows.setdefault(key, [*key, 0, *_cells(estimate, memory)])[2] += 1
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


def _cells(estimate: TrialEstimate, memory: Sequence[str]) -> list[str]:
    sizes = (estimate.base_parameters, estimate.adapter_values, estimate.generator_parameters)
    costs = (estimate.step_flops, estimate.flops)
    return [
        *(human(n) for n in (*sizes, *costs)),
        *(
            human(b, "B")
            for b in (*(estimate.memory.get(part, 0.0) for part in memory), estimate.peak_bytes)
        ),
    ]
