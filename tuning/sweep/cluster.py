"""Find the machines, choose a trial's share of them, and start or join Ray."""

from __future__ import annotations

import gc
import logging
import math
import os
import signal
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llgbm.runtime import UserError, keep_freed_memory, say, uncollected
from tuning.studies.options import RunOptions
from tuning.sweep.places import check_cluster, check_ray_folder, require_token, show_token
from tuning.tracking.store import pass_proxies

SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # The only machine of a Ray of our own is not dead because it is too busy to answer; were it, so would this be.
    "RAY_health_check_timeout_ms": "60000",
    "RAY_health_check_failure_threshold": "100",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # A trial that a scheduler stopped still sends its metrics: its worker is reused when that is done, not after 2 s.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "600",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
# How often a start of Ray is tried; a machine under load makes it miss its own limit.
START_ATTEMPTS = 4
LATE = "timed out during startup"
OBJECT_STORE_BYTES = 512 * 2**20
CUDA_CONTEXT_BYTES = 700 * 2**20


@dataclass(frozen=True)
class Node:
    """One machine: the CPUs and GPUs that trials may use."""

    cpus: float
    gpus: float

    def fits(self, cpus: float, gpus: float) -> int:
        """Count the trials of this size that run on it at once."""
        return int(min(self.cpus / cpus, self._gpu_places(gpus)) + 1e-9)

    def _gpu_places(self, gpus: float) -> float:
        """Count the places for trials of this share; none lies on two GPUs."""
        if gpus == 0:
            return math.inf
        if gpus >= 1:
            return self.gpus // gpus
        return int(self.gpus) * int(1 / gpus + 1e-9)


@dataclass(frozen=True)
class Resources:
    """Share of each trial, and the number that run at once."""

    cpus: float
    gpus: float
    concurrent: int
    nodes: tuple[Node, ...]

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))

    @property
    def is_full(self) -> bool:
        """True where trials fill every place, so that one more process takes a trial's place and no more memory."""
        return self.concurrent == sum(node.fits(self.cpus, self.gpus) for node in self.nodes)

    def describe(self) -> str:
        gpus = f" and {self.gpus:g} GPUs" if self.gpus else ""
        where = f" on {len(self.nodes)} machines" if len(self.nodes) > 1 else ""
        return f"{self.concurrent} at a time{where}, {self.cpus:g} CPUs{gpus} each"


def this_machine() -> tuple[Node, ...]:
    """Return the CPUs that this process may use, and the GPUs that torch sees."""
    return (Node(len(os.sched_getaffinity(0)), torch.cuda.device_count()),)


def choose_resources(run: RunOptions) -> Resources:
    """Choose what a trial gets of this machine, or of the cluster that the options name, which is joined."""
    nodes = None
    if run.address:
        nodes = connect_ray(run.address)
    elif not run.is_preview:
        check_ray_folder()
    return check_resources(run.cpus_per_trial, run.gpus_per_trial, run.max_concurrent, nodes)


def check_resources(
    cpus: float | None,
    gpus: float | None,
    concurrent: int | None,
    nodes: Sequence[Node] | None = None,
) -> Resources:
    """Check a trial's share of `nodes` (default: of this machine).

    Raises UserError for more than any of them has, or for nothing: Ray would leave such trials pending for ever.
    """
    nodes = tuple(nodes or this_machine())
    cpus = 1.0 if cpus is None else cpus
    gpus = (0.25 if any(node.gpus for node in nodes) else 0.0) if gpus is None else gpus
    largest = {"CPUs": max(node.cpus for node in nodes), "GPUs": max(node.gpus for node in nodes)}
    for name, asked in (("CPUs", cpus), ("GPUs", gpus)):
        _check_amount(name, asked, largest[name], len(nodes))
    if gpus > 1 and not float(gpus).is_integer():
        raise UserError(f"{gpus:g} GPUs per trial asked for; above 1 it must be a whole number")
    if concurrent is not None and concurrent < 1:
        raise UserError(f"--max-concurrent is {concurrent}: give at least 1")
    fits = sum(node.fits(cpus, gpus) for node in nodes)
    if not fits:
        raise UserError(
            f"no machine has {cpus:g} CPUs and {gpus:g} GPUs together: ask for less per trial"
        )
    return Resources(cpus, gpus, min(fits, concurrent or fits), nodes)


def _check_amount(name: str, asked: float, has: float, n_nodes: int) -> None:
    if not math.isfinite(asked) or asked < 0 or (name == "CPUs" and asked == 0):
        raise UserError(
            f"{asked:g} {name} per trial asked for; it must be a number above 0 (0 is allowed for GPUs)"
        )
    if asked > has:
        where = "this machine has" if n_nodes == 1 else f"the largest of {n_nodes} machines has"
        raise UserError(
            f"{asked:g} {name} per trial asked for, {where} {has:g}: ask for at most that"
        )


def memory_fraction(gpus: float, total_bytes: int) -> float:
    """Return the fraction of a GPU's memory that torch may take for a trial with this part of the GPU.

    The memory of each process's CUDA context is left aside, so that parts that add up to 1 fit together.
    """
    if gpus <= 0 or gpus >= 1:
        return 1.0
    return max(0.01, gpus - CUDA_CONTEXT_BYTES / total_bytes)


def take_share(threads: int, gpus: float) -> None:
    """Limit this process to its trial's share: threads, also of its children, and GPU memory; it keeps freed memory."""
    keep_freed_memory()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    if torch.cuda.is_available() and 0 < gpus < 1:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(memory_fraction(gpus, total), 0)


def start_ray(resources: Resources, shared_bytes: int = 0) -> None:
    """Start a local Ray, quietly, with room for `shared_bytes` of shared tensors; keep one that is running.

    Raises UserError where it does not come up in several attempts, each of Ray's own half minute.
    """
    require_token()
    quiet_ray()
    import ray

    if not ray.is_initialized():
        _start_with_patience(resources, OBJECT_STORE_BYTES + shared_bytes)
    terminate_as_interrupt()


def _start_with_patience(resources: Resources, store_bytes: int) -> None:
    import ray

    (node,) = resources.nodes
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(
                address="local",  # never some cluster that happens to run on this machine
                num_cpus=int(node.cpus),
                num_gpus=int(node.gpus),
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                object_store_memory=store_bytes,
            )
            return
        except Exception as error:  # Ray raises it bare
            if LATE not in str(error):
                raise
            ray.shutdown()
            say(f"Ray did not start in time (attempt {attempt} of {START_ATTEMPTS})")
    raise UserError(
        "Ray does not start on this machine, which is too busy: end other work and run the same command again; what is "
        "finished is kept"
    )


def leave_ray() -> None:
    """Disconnect from Ray, and end a local one.

    Ray ends a process that drops a reference to one of its objects meanwhile, so what can be dropped is dropped before.
    """
    import ray

    gc.collect()
    with uncollected():
        ray.shutdown()


def connect_ray(address: str) -> tuple[Node, ...]:
    """Connect to a running cluster (`auto`, `host:port` or `ray://host:port`); return what its machines have.

    Raises UserError if none answers there.
    """
    check_cluster(address)
    show_token()
    quiet_ray()
    import ray

    try:
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": {key: os.environ[key] for key in SETTINGS}},
        )
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        if "uthentica" in str(error):
            raise UserError(
                f"the Ray cluster at {address} does not accept this machine's token, so copy ~/.ray/auth_token from "
                "the machine that runs its head, or set RAY_AUTH_TOKEN"
            ) from error
        if "ray[client]" in str(error):
            raise UserError(
                f"{address} needs Ray's client: pip install 'llgbm[cluster]'"
            ) from error
        raise UserError(
            f"no Ray cluster can be joined at {address!r}: start one with `ray start --head --port 6379`, or leave "
            "--address out to use this machine alone"
        ) from error
    terminate_as_interrupt()
    alive = [
        node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")
    ]
    return tuple(Node(found["CPU"], found.get("GPU", 0.0)) for found in alive)


def quiet_ray() -> None:
    """Import Ray with our settings made first, unless the environment says otherwise."""
    os.environ.update({k: v for k, v in SETTINGS.items() if k not in os.environ})
    pass_proxies()
    import ray  # noqa: F401

    # The shared tensors are only read, which is what Ray's note asks for.
    warnings.filterwarnings(
        "ignore", message="Zero-copy tensor serialization|The input tensor is non-contiguous"
    )


def is_spread() -> bool:
    """Return True if the cluster spans several hosts."""
    import ray

    return len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}) > 1


def terminate_as_interrupt() -> None:
    """Make SIGTERM end the program as Ctrl-C does. Ray puts a handler of its own in place, so call it after too."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
