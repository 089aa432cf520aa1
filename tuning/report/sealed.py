"""Open the sealed tasks of a study: measure its generators on them, once, and record who opened what when."""

from __future__ import annotations

import getpass
import json
import tempfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from llgbm.evaluation.levels import evaluate_levels
from llgbm.generator.bundle import GeneratorBundle
from llgbm.generator.conditions import make_encoder
from llgbm.models.load import Base
from llgbm.runtime import UserError, say
from llgbm.teachers.sealed import sealed_teachers
from llgbm.world import World, WorldConfig, build_levels, build_world
from tuning.report.groups import SEALED
from tuning.report.record import OPENED_TAG, read_study
from tuning.tracking.runs import TrialResult
from tuning.tracking.store import connect, store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from tuning.studies.spec import Study


def open_sealed(tracking_uri: str, parent: Run, study: Study, cache: Path) -> int:
    """Measure the complete trials of a study on the sealed tasks of their worlds; return how many were measured.

    A trial that was measured before keeps its numbers. Raises UserError where a suite has no sealed tasks, or a trial
    has no generator any more.
    """
    if not any(level.is_sealed for world in study.worlds for level in world.suite.levels):
        raise UserError("the suite of this study has no sealed tasks: there is nothing to open")
    complete = [t for t in read_study(tracking_uri, parent.info.run_id).trials if t.is_complete]
    closed = [trial for trial in complete if not _is_open(trial)]
    worlds = _worlds(study, closed)
    with store_errors(tracking_uri):
        client = connect(tracking_uri)
        for world in dict.fromkeys(worlds[trial.trial_id] for trial in closed):
            own = [trial for trial in closed if worlds[trial.trial_id] == world]
            _open_world(client, parent.info.run_id, build_world(cache, world), own, cache)
        _record_opening(client, parent.info.run_id, closed)
    return len(closed)


def _worlds(study: Study, trials: list[TrialResult]) -> dict[str, WorldConfig]:
    """Return the world of each trial by trial id; all points of a search are of one world."""
    if study.space is not None:
        return dict.fromkeys((trial.trial_id for trial in trials), study.space.base.world)
    return {trial.id: trial.world for trial in study.trials}


def _is_open(trial: TrialResult) -> bool:
    return any(name.startswith(f"{SEALED}/") for name in trial.metrics)


def _open_world(
    client: MlflowClient, parent_run_id: str, world: World, trials: list[TrialResult], cache: Path
) -> None:
    encoder = make_encoder(world.config.encoder, world.base)
    levels = list(build_levels(cache, world.config, world.base, encoder, sealed=True))
    suite, teachers, count = world.config.suite, world.config.teachers, world.config.eval_examples
    ceiling = sealed_teachers(cache, world.base, world.bank.spec, suite, teachers, count)
    for name, value in _named(ceiling):
        client.log_metric(parent_run_id, f"{SEALED}/teacher/{world.config.label}/{name}", value)
    for trial in trials:
        generator = _generator(client, trial.run_id, world.base)
        found = evaluate_levels(generator.generator, world.lora_model, levels)
        for name, value in _named(found):
            client.log_metric(trial.run_id, f"{SEALED}/{name}", value)
        say(f"opened for {trial.config}, seed {trial.seed}: {_told(found)}")


def _named(found: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[str, float]]:
    """Yield the accuracy of each level and of all sealed tasks together, named as metrics are."""
    for level, own in found.items():
        yield level.removeprefix("sealed ").replace(" ", "_"), fmean(own.values())
    yield "accuracy", fmean(value for own in found.values() for value in own.values())


def _told(found: Mapping[str, Mapping[str, float]]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in _named(found))


def _generator(client: MlflowClient, run_id: str, base: Base) -> GeneratorBundle:
    """Load the generator that a trial kept, onto the device of the base."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = client.download_artifacts(run_id, "generator", folder)
        except OSError as error:
            raise UserError(
                f"run {run_id} has no generator any more, so it cannot be opened"
            ) from error
        bundle = GeneratorBundle.load(Path(path))
    bundle.check_base(base)
    bundle.generator.to(base.model.device)
    return bundle


def _record_opening(client: MlflowClient, parent_run_id: str, trials: list[TrialResult]) -> None:
    if not trials:
        return
    known = json.loads(client.get_run(parent_run_id).data.tags.get(OPENED_TAG, "[]"))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    opened = {"by": getpass.getuser(), "at": now, "trials": [trial.trial_id for trial in trials]}
    client.set_tag(parent_run_id, OPENED_TAG, json.dumps([*known, opened]))
