"""Register the best trial of a study under the name of its size."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llgbm.runtime import UserError, say
from tuning.registry.champions import Rivals
from tuning.registry.fetch import BUNDLE_FILE
from tuning.registry.register import Score, register_generator
from tuning.registry.versions import RegisteredVersion
from tuning.sweep.artifacts import PER_TASK, read_per_task
from tuning.tracking.runs import finite

if TYPE_CHECKING:
    from llgbm.world import World
    from tuning.studies.spec import Study, TrialSpec
    from tuning.tracking.runs import TrialResult
    from tuning.tracking.study import StudyTracker


def register_best(
    study: Study,
    worlds: Mapping[str, World],
    results: Sequence[TrialResult],
    tracker: StudyTracker,
    cache: Path,
) -> list[dict[str, str]]:
    """Register the best complete trial of each size by the study's metric; return the versions.

    A trial whose artifacts are gone is passed over, and the next best is taken.
    """
    specs = {trial.id: trial for trial in study.trials}
    registered = []
    for size in dict.fromkeys(trial.world.size for trial in study.trials):
        own = [r for r in results if r.is_complete and specs[r.trial_id].world.size == size]
        done = [r for r in own if study.metric in r.metrics]
        done.sort(key=lambda r: -r.metrics[study.metric])
        candidates = read_candidates(tracker, done, study.metric)
        if candidates:
            best, per_task = candidates[0]
            spec = specs[best.trial_id]
            rivals = Rivals(
                [own for _, own in candidates[1:]],
                best_baseline(cache, worlds[spec.world.hash], study.metric),
            )
            score = Score(best.metrics[study.metric], study.metric, per_task, rivals)
            version = register(study, spec, worlds[spec.world.hash], tracker, best.run_id, score)
            say(
                f"registered {version.name} version {version.version} "
                f"({spec.name}, seed {spec.config.seed}) as {version.alias}"
            )
            registered.append(
                {"name": version.name, "version": str(version.version), "alias": version.alias}
            )
    return registered


Candidate = tuple["TrialResult", dict[str, float]]


def read_candidates(
    tracker: StudyTracker, done: Sequence[TrialResult], metric: str
) -> list[Candidate]:
    """Return the trials that kept a generator and validation figures by task, with these; say which did not."""
    found: list[Candidate] = []
    for trial in done:
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(tracker.download_artifacts(trial.run_id, PER_TASK, folder))
                figures = read_per_task(path)["val"][metric.removeprefix("val/")]
                per_task = {str(task): float(value) for task, value in figures.items()}
                if finite(per_task) != per_task:
                    raise ValueError(f"its {metric} by task is not finite")
                # Only the best is registered: its generator must be there.
                if not found:
                    tracker.download_artifacts(trial.run_id, f"generator/{BUNDLE_FILE}", folder)
        except (UserError, OSError, ValueError, KeyError, TypeError) as error:
            say(
                f"the artifacts of trial {trial.trial_id} ({trial.config}, seed {trial.seed}) cannot be read, so it "
                f"is not registered: {str(error).partition(chr(10))[0][:200]}"
            )
        else:
            found.append((trial, per_task))
    return found


def best_baseline(cache: Path, world: World, metric: str) -> tuple[str, float] | None:
    """Return name and validation score of the best baseline of a world, None for a smoke world or without a score."""
    from llgbm.evaluation.baselines import UPPER_BOUND, known_baselines

    if world.config.smoke:
        return None
    key = metric.removeprefix("val/")
    scores = {
        name: values[key]
        for name, values in known_baselines(cache, world.data, world.lora_model, "val").items()
        if name != UPPER_BOUND and math.isfinite(values[key])
    }
    if not scores:
        return None
    name = max(scores, key=lambda name: scores[name])
    return name, scores[name]


def register(
    study: Study,
    spec: TrialSpec,
    world: World,
    tracker: StudyTracker,
    run_id: str,
    score: Score,
) -> RegisteredVersion:
    """Register the generator of one trial's run under the name of its size."""
    name = f"llgbm-generator-{spec.world.size}"
    if spec.world.smoke:
        name += "-smoke"
    tags = {
        "llgbm.study": study.name,
        "llgbm.study_id": study.id,
        "llgbm.trial_id": spec.id,
        "llgbm.config": spec.name,
        "llgbm.bank": world.bank.hash,
        "llgbm.base": world.base.hash,
        "llgbm.val_data": world.data.hash,
    }
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(tracker.download_artifacts(run_id, "generator", folder))
        return register_generator(tracker.tracking_uri, run_id, bundle, name, tags, score)
