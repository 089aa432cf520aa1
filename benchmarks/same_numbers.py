"""Compare the numbers of two commits bit by bit: a short sweep of the working tree beside one of an earlier commit.

    python benchmarks/same_numbers.py                            # against HEAD~1, about two minutes on one core
    python benchmarks/same_numbers.py --base v0.1 --allow-changed-ids
    python benchmarks/same_numbers.py -- --study objectives --smoke    # another sweep, as run_ablation.py takes it

Run it for every change that claims to move no number. Both sides start from empty caches with one thread, so world,
baselines and trials are made anew by each side's own code. Every value of every metric is compared, at every step, but
for times, memory and the load of the machine. By default the ids of trials are compared too; with
`--allow-changed-ids` trials are matched by configuration and seed alone. The exit status is 1 where anything differs,
2 where a side cannot be run.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

ROOT = Path(__file__).parents[1]
# Both losses, apart and together, under each generator: what most code of a training is reached by.
SWEEP = (
    "--study generators --smoke --seeds 0 --steps 12 --cpus-per-trial 1 --max-concurrent 1".split()
)
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
NOT_NUMBERS = ("time/", "system/")
TRIAL_ID = "llgbm.trial_id"
NOTHING = "-"
Curve = dict[int, str]


@dataclass(frozen=True)
class RunRecord:
    """A run: the id of its trial (empty for that of a study), and its metrics, exact, by step."""

    trial_id: str
    metrics: Mapping[str, Curve]


Records = Mapping[str, RunRecord]


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same on both sides, and where it first shows."""

    run: str
    what: str
    step: str
    base: str
    here: str


def unpack_commit(commit: str, folder: Path) -> Path:
    """Write the files of a commit into a folder. Exits with status 2 where git knows no such commit."""
    packed = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True)
    if packed.returncode:
        stop(f"git has no commit {commit!r}: {packed.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def run_side(tree: Path, folder: Path, sweep: Sequence[str]) -> Records:
    """Run a sweep by the code of a tree in an empty folder; return its runs. Exits with status 2 where it fails."""
    folder.mkdir()
    path = os.pathsep.join(map(str, (tree, tree / "dnd_repo" / "workspace")))
    env = {
        **os.environ,
        **ONE_THREAD,
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    env.pop("MLFLOW_TRACKING_URI", None)
    check_imports(tree, folder, env)
    command = [
        sys.executable,
        str(tree / "tuning" / "run_ablation.py"),
        *sweep,
        "--cache",
        str(folder / "cache"),
    ]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        stop(f"the sweep of {tree} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return read_store(f"sqlite:///{folder}/mlruns/mlflow.db")


def check_imports(tree: Path, folder: Path, env: Mapping[str, str]) -> None:
    """Exit with status 2 unless the packages are those of the tree, not installed ones."""
    code = "import llgbm, tuning, dnd; print(*(package.__path__[0] for package in (llgbm, tuning, dnd)), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True
    )
    found = [Path(line) for line in done.stdout.splitlines()]
    if done.returncode or not all(path.is_relative_to(tree) for path in found):
        stop(
            f"the packages of {tree} cannot be imported from there: {done.stdout}{done.stderr[-2000:]}"
        )


def read_store(tracking_uri: str) -> Records:
    """Return the runs of a store by name and model size, with all values of all their metrics."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri)
    found: dict[str, RunRecord] = {}
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id], max_results=10_000):
            name = f"{run.info.run_name} {run.data.params.get('model_size', '')}".strip()
            if name in found:
                stop(
                    f"two runs are called {name!r}: give a sweep that runs every configuration once"
                )
            keys = [key for key in run.data.metrics if not key.startswith(NOT_NUMBERS)]
            curves = {key: read_curve(client, run.info.run_id, key) for key in keys}
            found[name] = RunRecord(run.data.tags.get(TRIAL_ID, ""), curves)
    return found


def read_curve(client: Any, run_id: str, key: str) -> Curve:
    """Return the values of a metric by step, written so that equal text means equal bits."""
    return {
        metric.step: float(metric.value).hex() for metric in client.get_metric_history(run_id, key)
    }


def compare(base: Records, here: Records, with_ids: bool) -> Iterator[Difference]:
    """Yield what differs: runs and metrics that one side lacks, ids, and each metric's first step with other bits."""
    for name in sorted({*base, *here}):
        if name not in base or name not in here:
            yield Difference(name, "run", NOTHING, *presence(name in base, name in here))
            continue
        if with_ids and base[name].trial_id != here[name].trial_id:
            yield Difference(name, "trial id", NOTHING, base[name].trial_id, here[name].trial_id)
        yield from compare_metrics(name, base[name].metrics, here[name].metrics)


def compare_metrics(
    name: str, base: Mapping[str, Curve], here: Mapping[str, Curve]
) -> Iterator[Difference]:
    """Yield the differences between the metrics of one run."""
    for key in sorted({*base, *here}):
        if key not in base or key not in here:
            yield Difference(name, key, NOTHING, *presence(key in base, key in here))
            continue
        before, after = base[key], here[key]
        steps = [step for step in sorted({*before, *after}) if before.get(step) != after.get(step)]
        if steps:
            first = steps[0]
            yield Difference(
                name, key, str(first), readable(before.get(first)), readable(after.get(first))
            )


def presence(in_base: bool, is_here: bool) -> tuple[str, str]:
    """Return what the table says of a thing that one side lacks."""
    return ("there" if in_base else "missing", "there" if is_here else "missing")


def readable(value: str | None) -> str:
    """Return a value in decimals, all that tell it from its neighbours."""
    return "missing" if value is None else repr(float.fromhex(value))


def table(differences: Sequence[Difference]) -> str:
    """Return the differences as a table."""
    rows = [(d.run, d.what, d.step, d.base, d.here) for d in differences]
    return tabulate(rows, ("run", "what", "first step", "base", "here"), disable_numparse=True)


def stop(reason: str) -> None:
    """Say why nothing can be compared and exit with status 2."""
    print(f"error: {reason}", file=sys.stderr)
    raise SystemExit(2)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base", default="HEAD~1", metavar="COMMIT", help="the commit to compare with (HEAD~1)"
    )
    parser.add_argument(
        "--allow-changed-ids", action="store_true", help="do not compare the ids of trials"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="a new folder to leave both sides in"
    )
    parser.add_argument(
        "sweep", nargs="*", default=SWEEP, metavar="OPTION", help=f"the sweep ({' '.join(SWEEP)})"
    )
    return parser.parse_args()


def main() -> int:
    """Run both sides, print what differs; return the exit status."""
    options = parse_arguments()
    if options.keep:
        options.keep.mkdir(parents=True)
    with nullcontext(options.keep) if options.keep else tempfile.TemporaryDirectory() as kept:
        folder = Path(kept).resolve()
        tree = unpack_commit(options.base, folder / "tree")
        base = run_side(tree, folder / "base", options.sweep)
        here = run_side(ROOT, folder / "here", options.sweep)
    found = list(compare(base, here, with_ids=not options.allow_changed_ids))
    curves = [curve for record in here.values() for curve in record.metrics.values()]
    compared = f"{len(here)} runs, {len(curves)} metrics, {sum(map(len, curves))} values"
    print(
        f"{table(found)}\n{len(found)} differences in {compared}"
        if found
        else f"the same numbers: {compared}"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
