"""Measure the baselines of a study in processes beside its first trials.

They take places of trials, and take them first: after the trials they would run beside an empty place.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llgbm.evaluation.baselines import Piece, keep_measured, measure_pieces, unknown_groups
from llgbm.runtime import pick_device, say
from llgbm.world import World
from tuning.sweep.cluster import OBJECT_STORE_BYTES, Resources, take_share

# Seconds that trials wait for processes of baselines to have their places.
PATIENCE = 10.0


def pieces_to_measure(world: World, cache: Path) -> list[Piece]:
    """Return what the cache lacks: reports read the baselines of held-out tasks, a registry those of validation.

    Those of a toy world take less time than a process needs to start.
    """
    if world.config.smoke:
        return []
    return [
        (part, group)
        for part in ("test", "val")
        for group in unknown_groups(cache, world.data, part)
    ]


def is_beside(worlds: Mapping[str, World], cache: Path, resources: Resources) -> bool:
    """True where baselines that are not known yet are measured beside the trials, not before them.

    That takes a second copy of the worlds in Ray's store, for which its spare half must do.
    """
    has_room = sum(world.n_bytes for world in worlds.values()) <= OBJECT_STORE_BYTES // 2
    unknown = any(pieces_to_measure(world, cache) for world in worlds.values())
    return resources.is_full and has_room and unknown


class Beside:
    """Baselines that are being measured, those of each world in a process with a trial's share of a machine.

    `worlds` holds worlds on the CPU by hash. Only what is in no cache is measured. It is made when the first processes
    have their places, or after `PATIENCE` seconds: trials that ask earlier would take all places.
    """

    def __init__(self, worlds: Mapping[str, World], cache: Path, resources: Resources) -> None:
        import ray

        self._worlds, self._cache = worlds, cache
        measure = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus)(_measure)
        self._asked = {
            key: measure.remote(ray.put(world), asked, resources)
            for key, world in worlds.items()
            if (asked := pieces_to_measure(world, cache))
        }
        wanted = resources.cpus * min(len(self._asked), resources.concurrent)
        limit = time.monotonic() + PATIENCE
        while _cpus_taken() < wanted and time.monotonic() < limit:
            time.sleep(0.05)

    def keep(self) -> None:
        """Wait for the numbers and put them into the cache. What a process failed in is left to the driver."""
        import ray
        from ray.exceptions import RayError

        for key, reference in self._asked.items():
            try:
                measured = ray.get(reference)
            except RayError as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                say(f"the baselines of world {key} are measured after the trials: {first}")
                continue
            for (part, group), numbers in measured.items():
                keep_measured(self._cache, self._worlds[key].data, part, group, numbers)


def _cpus_taken() -> float:
    import ray

    return ray.cluster_resources().get("CPU", 0) - ray.available_resources().get("CPU", 0)


def _measure(world: World, asked: list[Piece], resources: Resources) -> dict[Piece, Any]:
    take_share(resources.threads, resources.gpus)
    own = world.to(pick_device() if resources.gpus else "cpu")
    return measure_pieces(own.data, own.lora_model, asked)
