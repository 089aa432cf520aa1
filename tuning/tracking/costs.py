"""Estimate the time of a trial from finished trials of the same kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from llgbm.terms.names import NAMED
from llgbm.training import TrainingConfig
from tuning.tracking.runs import TRIAL_TAG, TrialResult, find_runs
from tuning.tracking.store import (
    connect,
    local_tracking_uri,
    sqlite_path,
    store_errors,
    usable_uri,
)

Kind = tuple[Any, ...]
KIND_PARAMS = (
    "model_size",
    "generator.name",
    "generator.hidden",
    "generator.blocks",
    "batch_size",
    "n_probes",
    "n_prompts",
)
# Runs that are older than these have the defaults.
LATER_PARAMS = {"condition": TrainingConfig.condition, "prompt_tokens": "0"}


def kind_of(config: TrainingConfig) -> Kind:
    """Return the settings that a step's time depends on: sizes, generator, and which losses are computed."""
    generator = config.generator
    widths = (generator.hidden, generator.blocks)
    numbers = (*widths, config.batch_size, config.n_probes, config.n_prompts)
    named = (config.model_size, generator.name, *map(str, numbers))
    read = (config.condition, str(config.prompt_tokens))
    return (*named, *read, *_losses(config.weights, config.delta_probes))


def kind_of_result(result: TrialResult) -> Kind:
    """Return the same as `kind_of`, from a run's parameters (texts)."""
    params = result.params
    read = (params.get(name, default) for name, default in LATER_PARAMS.items())
    return (
        *map(params.get, KIND_PARAMS),
        *read,
        *_losses(result.weights, params.get("delta_probes")),
    )


def _losses(weights: Mapping[str, float], probes: str | None) -> tuple[bool, str | None, str]:
    """Return what of the losses a step's time depends on: which are computed, and on which probes."""
    others = " ".join(sorted(set(weights) - set(NAMED)))
    return "weight" in weights, probes if set(weights) - {"weight"} else None, others


def past_runs(tracking_uri: str | None, root: Path, experiment: str) -> list[TrialResult]:
    """Return the trials of an experiment, each as its newest run has it, without curves; none without a store.

    Nothing is created. Raises UserError if the store cannot be read.
    """
    uri = tracking_uri or local_tracking_uri(root)
    if not uri.startswith("sqlite:"):
        uri = usable_uri(uri)
    elif not sqlite_path(uri).is_file():
        return []
    with store_errors(uri):
        client = connect(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return []
        runs = find_runs(client, found.experiment_id, {TRIAL_TAG: None})
        results = [TrialResult.of(run) for run in runs]
    return [result for result in results if not result.superseded]


@dataclass(frozen=True)
class Costs:
    """Expected seconds of a trial: median seconds per step, plus the median of what follows training."""

    runs: Sequence[TrialResult]

    @cached_property
    def _by_kind(self) -> dict[Kind, list[tuple[float, float]]]:
        """(seconds per step, seconds after training) of every completed run, by kind."""
        found: dict[Kind, list[tuple[float, float]]] = {}
        for run in self.runs:
            rate = run.metrics.get("time/steps_per_second")
            seconds = run.metrics.get("time/seconds")
            if rate and seconds and run.is_complete:
                training = int(run.params["steps"]) / rate
                rest = max(0.0, seconds - training)
                found.setdefault(kind_of_result(run), []).append((1 / rate, rest))
        return found

    def basis(self, config: TrainingConfig) -> int:
        """Return the number of past runs that an estimate is based on."""
        return len(self._by_kind.get(kind_of(config), []))

    def seconds(self, config: TrainingConfig) -> float | None:
        """Return the estimate, None if no trial of this kind has finished."""
        past = self._by_kind.get(kind_of(config))
        if not past:
            return None
        a_step, rest = (median(column) for column in zip(*past, strict=True))
        return config.steps * a_step + rest


def last_results(runs: Iterable[TrialResult], scheduler: str) -> dict[str, dict[str, Any]]:
    """Return the last report of each trial that is done under this scheduler, by trial id."""
    return {run.trial_id: run.last_result for run in runs if run.is_done(scheduler)}
