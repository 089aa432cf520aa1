"""Fixtures of tests: one toy world for all of them, built once by the real code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# MLflow's servers start five processes for jobs that nothing here asks for.
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")

import pytest
import torch
from filelock import FileLock
from helpers import ROOT

from llgbm.lora import LoraBatch, LoraSpec
from llgbm.models.load import Base, ModelSize, load_base
from llgbm.models.pretrain import make_tokenizer, new_model
from llgbm.tasks.synthetic import SyntheticSuite
from llgbm.training import TrainingConfig
from llgbm.world import World, WorldConfig, build_world, smoke_world
from tuning.tracking.store import connect, local_tracking_uri
from tuning.tracking.study import StudyTracker

pytest.register_assert_rewrite("contracts")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Toy tensors are quicker on one, and several threads on a busy machine wait for each other."""
    torch.set_num_threads(1)


def shared_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder that all workers of one test run share, be there one or several (`-n`)."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the toy world is cached in."""
    return shared_folder(tmp_path_factory, "cache")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an MLflow store that holds nothing: to be copied, as making the tables takes a second."""
    folder = shared_folder(tmp_path_factory, "empty-store")
    with FileLock(folder / ".lock"):
        if not (folder / "mlruns").exists():
            connect(local_tracking_uri(folder / "new")).search_experiments()
            (folder / "new" / "mlruns").rename(folder / "mlruns")
    return folder / "mlruns"


@pytest.fixture(scope="session")
def world(cache: Path) -> World:
    """20 tasks (14 train, 2 val, 4 test), a base of 200 steps, teachers of 30: real in kind, coarse in accuracy."""
    return build_world(cache, smoke_world(WorldConfig()), "cpu")


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, cache: Path, world: World
) -> tuple[Path, str]:
    """The README's own `python tuning/run_ablation.py --smoke` on the toy world: its folder and what it printed."""
    folder = shared_folder(tmp_path_factory, "sweep")
    printed = folder / "printed.txt"
    with FileLock(folder / ".lock"):
        if not printed.is_file():
            _run_smoke(folder, cache, printed)
    return folder, printed.read_text()


def _run_smoke(folder: Path, cache: Path, printed: Path) -> None:
    (folder / "tuning").symlink_to(ROOT / "tuning")
    (folder / ".llgbm").symlink_to(cache)
    command = [sys.executable, "tuning/run_ablation.py", "--smoke"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    printed.write_text(done.stdout)


@pytest.fixture
def study(tmp_path: Path, empty_store: Path) -> StudyTracker:
    """A study without trials in a store of its own."""
    shutil.copytree(empty_store, tmp_path / "mlruns")
    tracker = StudyTracker.open(None, tmp_path, "ablation")
    tracker.begin("study", "id", {}, {})
    return tracker


@pytest.fixture
def config() -> TrainingConfig:
    """A training of 20 steps that fits the toy world."""
    return replace(TrainingConfig(), steps=20, batch_size=4, eval_every=10, n_probes=2, n_prompts=4)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A random 2-layer Qwen2 in a folder, with the suite's tokenizer: made in a second, for parity."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer(SyntheticSuite().vocabulary)
    model = new_model(
        ModelSize(hidden=32, layers=2, heads=4, kv_heads=2, intermediate=48), tokenizer, seed=0
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_base(folder)


@pytest.fixture(scope="session")
def tiny_spec(tiny_base: Base) -> LoraSpec:
    return LoraSpec.from_model(tiny_base.model, rank=3, alpha=6.0)


@pytest.fixture(scope="session")
def tiny_adapters(tiny_spec: LoraSpec) -> LoraBatch:
    """Three random adapters of the tiny base that move it visibly."""
    noise = torch.randn(3, tiny_spec.n_values, generator=torch.Generator().manual_seed(1))
    return LoraBatch.unflatten(tiny_spec, 0.2 * noise)
