"""One step of the default training, and its parts, beside the step of an earlier commit in the same run.

    python benchmarks/bench_train_step.py                       # against ecb2f2d, one thread
    python benchmarks/bench_train_step.py --base HEAD~1 --blocks 5

The earlier commit is checked out as a git worktree in a temporary folder. Each tree runs in a process of its own; the
two get the same tensors and are told in turn to run a block of steps. What is compared is processor seconds, which a
machine that is not idle moves least; the clock's are given too. The first losses and gradients must agree (1e-5). Parts
are timed by themselves: drawing a batch, the generator with the weight loss, Δ of given adapters, the optimiser. Beside
them stand the FLOPs of the matrix products of a step, and the seconds that these take at the machine's own matrix rate:
no step of these products is quicker. The bank is made up, its probes being examples of the embedded suite with their
answers, so as long as real ones; no number depends on what is learnt. The last line of standard output is one JSON
object; see `record.py` for where it goes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peers import SETTINGS
from record import environment, save
from timing import check_same, spread

from llgbm.delta import encode_probes
from llgbm.models.pretrain import make_tokenizer, new_model
from llgbm.probes import Probe, ProbeSet
from llgbm.tasks.synthetic import SyntheticSuite

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("step_worker.py")
CONDITION = 384


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base", default="ecb2f2d", help="the commit to compare with (default: ecb2f2d)"
    )
    parser.add_argument("--size", choices=("toy", "nano", "micro"), default="nano")
    parser.add_argument("--adapters", type=int, default=48, help="of the bank")
    parser.add_argument("--blocks", type=int, default=9, help="blocks of steps that each tree runs")
    parser.add_argument("--steps", type=int, default=10, help="a block")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a toy size against this commit; says only that it runs",
    )
    options = parser.parse_args(argv)
    if options.quick:
        options.base, options.size, options.adapters, options.blocks, options.steps = (
            "HEAD",
            "toy",
            4,
            2,
            1,
        )
    return options


def make_setting(folder: Path, size: str, adapters: int) -> Path:
    """Write the tensors of a made-up bank and its base's config, so that both trees read the same."""
    suite = SyntheticSuite()
    tokenizer = make_tokenizer(suite.vocabulary)
    model = new_model(SETTINGS[size][0], tokenizer, seed=0)
    tasks = [suite.split.tasks[index % len(suite.split.tasks)] for index in range(adapters)]
    texts = {
        task: [Probe(e.prompt, e.answer) for e in suite.examples(task, "train", 16, "step")]
        for task in tasks
    }
    probes = encode_probes(tokenizer, ProbeSet.trajectories(texts), tasks)
    shape = (*probes.positions_APQ.shape, model.config.hidden_size)
    generator = torch.Generator().manual_seed(0)
    setting = {
        "config": model.config.to_dict(),
        "weights": model.state_dict(),
        "rank": SETTINGS[size][1],
        "ids_APT": probes.ids_APT,
        "positions_APQ": probes.positions_APQ,
        "valid_APQ": probes.valid_APQ,
        "base_APQD": torch.randn(shape, generator=generator),
        "delta_APQD": torch.randn(shape, generator=generator),
        "train_ANC": torch.randn(adapters, 32, CONDITION, generator=generator),
        "seed": 0,
    }
    torch.save(setting, folder / "setting.pt")
    return folder / "setting.pt"


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A checkout of a commit beside this one while the block runs."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(
            ["git", "worktree", "add", "--detach", "-q", str(tree), commit], cwd=ROOT, check=True
        )
        try:
            yield tree
        finally:
            subprocess.run(
                ["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True
            )


class Worker:
    """A process that runs the steps of one tree, and answers in JSON lines."""

    def __init__(self, tree: Path, setting: Path, threads: int) -> None:
        path = os.pathsep.join(map(str, (tree, tree / "dnd_repo" / "workspace")))
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-W", "ignore", str(WORKER), str(setting), str(tree)]
        self._process = subprocess.Popen(
            command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send a question, wait for its answer. Raises RuntimeError where the process ended."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of a tree ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def compare(
    workers: dict[str, Worker], folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Check the first step of both, then time blocks in turn."""
    checks = {
        name: worker.ask({"check": str(folder / f"{name}.pt")}) for name, worker in workers.items()
    }
    losses = {name: torch.tensor(found["losses"]) for name, found in checks.items()}
    gradients = {name: torch.load(folder / f"{name}.pt") for name in workers}
    differences = {
        "losses": check_same("the losses of the two trees", losses["ours"], losses["base"]),
        "gradients": check_same(
            "the gradients of the two trees", gradients["ours"], gradients["base"]
        ),
    }
    for worker in workers.values():
        worker.ask({"steps": 2})
    blocks: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for block in range(options.blocks):
        for name in sorted(workers, reverse=block % 2 == 1):
            blocks[name].append(workers[name].ask({"steps": options.steps}))
    least = {name: worker.ask({"products": True}) for name, worker in workers.items()}
    peaks = {name: worker.ask({"peak": True})["peak_mb"] for name, worker in workers.items()}
    return {
        "relative_difference": differences,
        "padding": checks["ours"]["padding"],
        "sides": {
            name: summary(found) | least[name] | {"peak_mb": peaks[name]}
            for name, found in blocks.items()
        },
    }


def summary(blocks: list[dict[str, float]]) -> dict[str, float]:
    """Medians of each measured second, and the spread of the step's."""
    medians = {key: statistics.median(block[key] for block in blocks) for key in blocks[0]}
    return {**medians, "spread": spread(tuple(block["step_cpu_s"] for block in blocks))}


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as temporary, worktree(options.base) as tree:
        folder = Path(temporary)
        setting = make_setting(folder, options.size, options.adapters)
        trees = {"ours": ROOT, "base": tree}
        workers = {name: Worker(path, setting, options.threads) for name, path in trees.items()}
        try:
            found = compare(workers, folder, options)
        finally:
            for worker in workers.values():
                worker.close()
    ratio = found["sides"]["base"]["step_cpu_s"] / found["sides"]["ours"]["step_cpu_s"]
    result = {
        "benchmark": "train_step",
        "config": vars(options),
        "environment": environment("torch", "transformers", "accelerate"),
        "over_ours": ratio,
        "ratios": {f"{options.size} {options.base} cpu": ratio},
        **found,
    }
    save("train_step_cpu", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
