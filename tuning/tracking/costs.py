"""Read the time and the results of past runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from llgbm.training import TrainingConfig
from tuning.tracking.runs import STOPPED_TAG, SUPERSEDED_TAG, TRIAL_TAG, measured
from tuning.tracking.store import connect, local_tracking_uri, sqlite_path, store_errors, usable_uri

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
        weight, delta = (
            float(self.params.get(f"lambda_{name}", 0)) > 0 for name in ("weight", "delta")
        )
        names = ("model_size", "generator.name", "batch_size", "n_probes", "n_prompts")
        return (
            *(self.params.get(name) for name in names),
            weight,
            self.params.get("delta_probes") if delta else None,
        )


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
    with store_errors(uri):
        client = connect(uri)
        found = client.get_experiment_by_name(experiment)
        return [] if found is None else list(_finished(client, found.experiment_id))


def _finished(client: Any, experiment_id: str) -> Iterator[PastRun]:
    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment_id], "attributes.status = 'FINISHED'", max_results=1000, page_token=token
        )
        for run in page:
            tags = run.data.tags
            if TRIAL_TAG in tags and SUPERSEDED_TAG not in tags:
                stopped = tags.get(STOPPED_TAG)
                yield PastRun(
                    tags[TRIAL_TAG],
                    measured(run),
                    run.data.params,
                    int(stopped) if stopped else None,
                )
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
            rate, seconds = (
                run.metrics.get("time/steps_per_second"),
                run.metrics.get("time/seconds"),
            )
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


def last_results(runs: Iterable[PastRun]) -> dict[str, dict[str, Any]]:
    """What finished trials last reported, by trial id."""
    return {run.trial_id: run.last_result for run in runs}
