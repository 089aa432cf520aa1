"""Hold the trials that run at once against the memory of this machine, before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil

from llgbm.estimate import WorldSketch, human
from llgbm.runtime import UserError, say
from tuning.studies.spec import Study, TrialSpec
from tuning.sweep.cluster import Resources

WORKER_BYTES = 450 * 10**6  # a worker with its libraries, before it trains
CGROUP = Path("/sys/fs/cgroup")


def free_bytes() -> int:
    """Return the memory that this machine, or this process's container, has left."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):
        limit, used = (
            int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current")
        )
        free = min(free, limit - used)
    return free


def fit_memory(
    resources: Resources, study: Study, asked: int | None, free: int, stream: str = "auto"
) -> Resources:
    """Return the resources with so many trials at once as `free` bytes allow; `asked` is the user's own number.

    A trial on a GPU takes a worker's memory of the host, one on the CPU its peak as well. Raises UserError if the user
    asked for more than fits.
    """
    if len(resources.nodes) > 1 or resources.concurrent == 1:
        return resources
    each = WORKER_BYTES
    if not resources.gpus:
        each += int(max(_peaks(study, stream), default=0))
    fits = max(1, free // each)
    if resources.concurrent <= fits:
        return resources
    why = f"a trial takes about {human(each, 'B')} and {human(free, 'B')} are free"
    if asked is not None:
        raise UserError(
            f"{asked} trials at once do not fit into memory ({why}): give --max-concurrent {fits} or less"
        )
    say(f"{fits} instead of {resources.concurrent} trials at a time, since {why}")
    return replace(resources, concurrent=fits)


def _peaks(study: Study, stream: str) -> Iterator[float]:
    """Yield the peak of each kind of trial, in bytes; a base of a kind that cannot be estimated yields none."""
    trials = [study.space.base] if study.space else list(study.trials)
    kinds: dict[tuple, TrialSpec] = {}
    for trial in trials:
        config = trial.config
        sizes = (config.batch_size, config.n_probes, config.probe_chunk, config.n_prompts)
        saving = (config.activation_checkpointing, *sorted(config.weights))
        kinds[(trial.world.hash, config.generator, *sizes, *saving)] = trial
    for trial in kinds.values():
        with suppress(UserError):
            yield WorldSketch(trial.world, stream).estimate(trial.config).peak_bytes
