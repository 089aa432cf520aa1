"""Training of `dnd` by one process and by several, its checkpoints, the adapters that it writes, its refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dnd.bank import AdapterBank, Samples, positions, read_adapter
from dnd.commands import exit_status, generate_command, train_command
from dnd.conditions import encode_texts
from dnd.errors import DndError
from dnd.generation import AdapterWriter
from dnd.tokenizer import LoraTokenizer2D
from dnd.training import TrainSettings, newest_checkpoint, train
from helpers import ROOT
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llgbm.world import World

DND = ROOT / "dnd_repo"
# Stands where a task script stands, and leaves what each process ends with.
WORKER = """
import os, sys
from pathlib import Path
from dnd.commands import exit_status, train_command
from dnd.model.decoderonly import trained_state
from dnd.recipes import MATH
from safetensors.torch import save_file

def run():
    trained = train_command(MATH, "absent", "out")
    if trained:
        state = {k: v.contiguous() for k, v in trained.model.state_dict().items()}
        save_file(state, Path(os.environ["LEFT"]) / f"rank{os.environ['RANK']}.safetensors")

sys.exit(exit_status(run))
"""


@pytest.fixture(scope="session")
def bank_folder(world: World) -> Path:
    return world.bank.folder / "checkpoints"


@pytest.fixture
def settings(world: World) -> TrainSettings:
    return TrainSettings(
        encoder=world.base.path,
        n_prompts=3,
        max_length=16,
        features=((8, 12, 66),),
        kernel_size=3,
        steps=4,
        batch_size=4,
        learning_rate=1e-3,
        save_every=2,
        seed=0,
    )


def options_of(settings: TrainSettings, bank: Path, out: Path) -> list[str]:
    """The same settings as a command line."""
    given = {
        "n-prompts": 3,
        "max-length": 16,
        "kernel-size": 3,
        "steps": 4,
        "save-every": 2,
        "seed": 0,
    }
    sizes = [f"--{name}={value}" for name, value in given.items()]
    places = [f"--bank={bank}", f"--out={out}", f"--encoder={settings.encoder}"]
    tokens = [
        "--features",
        "8x12x66",
        "--learning-rate=1e-3",
        "--token-size",
        "6",
        "66",
        "--length=16",
    ]
    return [*places, *sizes, *tokens, f"--batch-size={settings.batch_size}"]


def launch(
    script: str, count: str, options: Sequence[str], folder: Path
) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {
        **os.environ,
        "PYTHON": sys.executable,
        "LEFT": str(folder),
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
    }
    command = [str(DND / "scripts" / "launch_multi.sh"), script, count, *options]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280)


@pytest.mark.whole
def test_two_processes_do_what_one_does_with_twice_the_batch(
    tmp_path: Path, bank_folder: Path, settings: TrainSettings
) -> None:
    settings = replace(settings, token_size=(6, 66))
    alone = train(settings, AdapterBank.open(bank_folder), tmp_path / "alone")
    (tmp_path / "worker.py").write_text(WORKER)
    halved = replace(settings, batch_size=settings.batch_size // 2)
    done = launch(
        str(tmp_path / "worker.py"),
        "2",
        options_of(halved, bank_folder, tmp_path / "both"),
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    losses = torch.load(Path(result["checkpoint"]) / "trainer.pt", weights_only=True)["losses"]
    assert losses == pytest.approx(alone.losses, rel=1e-4) and len(losses) == 4
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() and all(
        torch.equal(v, second[k]) for k, v in first.items()
    )
    assert alone.losses[-1] < alone.losses[0]


def test_a_resumed_training_ends_as_an_unbroken_one(
    tmp_path: Path, bank_folder: Path, settings: TrainSettings
) -> None:
    bank = AdapterBank.open(bank_folder)
    whole = train(settings, bank, tmp_path / "whole")

    def stop(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, bank, tmp_path / "broken", report=stop)
    assert newest_checkpoint(tmp_path / "broken").name == "checkpoint-000002"
    rest = train(settings, bank, tmp_path / "broken", resume=True)
    assert rest.losses == whole.losses
    assert [p.name for p in (tmp_path / "broken").iterdir()] == ["checkpoint-000004"]
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[key]), key
    with pytest.raises(DndError, match="other settings"):
        train(replace(settings, learning_rate=2e-3), bank, tmp_path / "broken", resume=True)


def test_the_environment_of_accelerate_changes_no_loss(
    tmp_path: Path,
    bank_folder: Path,
    settings: TrainSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short, bank = replace(settings, steps=2), AdapterBank.open(bank_folder)
    plain = train(short, bank, tmp_path / "plain")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert train(short, bank, tmp_path / "other").losses == plain.losses
    for key, value in train(short, bank, tmp_path / "third").model.state_dict().items():
        assert torch.equal(value, plain.model.state_dict()[key]), key


def test_generated_adapters_are_what_plain_peft_loads(
    tmp_path: Path, bank_folder: Path, settings: TrainSettings, world: World
) -> None:
    task = world.bank.adapters[next(iter(world.bank.adapters))]
    bank = AdapterBank.open(bank_folder)
    trained = train(replace(settings, steps=2), bank, tmp_path / "out")
    prompts = bank.adapters[0][0].parent
    written = generate_command(
        settings,
        str(tmp_path / "out"),
        str(tmp_path / "made"),
        task,
        [f"--prompts={prompts}", "--count=2"],
    )
    states = [read_adapter(Path(folder) / "adapter_model.safetensors") for folder in written]
    assert any((states[0][k] - states[1][k]).abs().max() > 0 for k in states[0])
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(world.base.path), written[0]
    )
    held = {k.replace(".default.", "."): v for k, v in model.state_dict().items() if ".lora_" in k}
    assert held.keys() == states[0].keys() and all(
        torch.equal(held[k], v) for k, v in states[0].items()
    )
    texts = json.loads((prompts / "prompts.json").read_text())["evaluation"]
    drawn = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[
        : settings.n_prompts
    ]
    encoded = encode_texts(world.base.tokenizer, [texts[i] for i in drawn], settings.max_length)
    tokens = trained.model.generate({name: ids[None] for name, ids in encoded.items()})[0]
    wanted = LoraTokenizer2D((6, 66)).detokenize(states[0], tokens)
    assert all(torch.equal(wanted[k], v) for k, v in states[0].items())
    bare = AdapterWriter.load(trained.checkpoint / "model.safetensors", settings, prompts)
    assert all(torch.equal(v, states[1][k]) for k, v in bare.generate(texts, seed=1).items())


def test_a_step_of_several_processes_is_one_step_of_all() -> None:
    shares = [positions(step=5, batch_size=3, rank=rank, n_ranks=4) for rank in range(4)]
    assert sum(shares, []) == positions(step=5, batch_size=12, rank=0, n_ranks=1)


def test_samples_take_every_adapter_once_an_epoch(bank_folder: Path, world: World) -> None:
    bank = AdapterBank.open(bank_folder)
    tokenizer = LoraTokenizer2D((6, 66))
    stream = Samples(bank, tokenizer, world.base.tokenizer, n_prompts=2, length=8, seed=3)
    wanted = torch.stack([tokenizer.tokenize(state) for state in bank.states()]).nan_to_num()
    for epoch in (0, 1):
        drawn = [stream[epoch * len(wanted) + i]["tokens"].nan_to_num() for i in range(len(wanted))]
        found = [int((wanted - tokens).abs().flatten(1).sum(1).argmin()) for tokens in drawn]
        assert sorted(found) == list(range(len(wanted)))
    assert not torch.equal(stream[0]["input_ids"], stream[len(wanted)]["input_ids"])


def plain_bank(folder: Path, ranks: Sequence[int] = (2, 2), key: str = "q.lora_{}.weight") -> Path:
    for index, rank in enumerate(ranks):
        own = folder / f"task{index}" / f"task{index}_0"
        own.mkdir(parents=True)
        state: dict[str, Tensor] = {
            key.format("A"): torch.randn(rank, 12),
            key.format("B"): torch.randn(12, rank),
        }
        save_file(state, own / "adapter_model.safetensors")
        (own / "adapter_config.json").write_text("{}")
        (own / "prompts.json").write_text(json.dumps(["one", "two", "three"]))
    return folder


def refused(capsys: pytest.CaptureFixture[str], settings: TrainSettings, *options: str) -> str:
    """What a training script says of a mistake; it must be one line and status 2."""
    assert exit_status(lambda: train_command(settings, "nowhere", "out", (), options)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(said) == 1
    return said[0]


def test_bad_input_costs_one_sentence(
    tmp_path: Path,
    settings: TrainSettings,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "--smoke for the embedded one" in refused(capsys, settings)
    good = plain_bank(tmp_path / "good")
    assert "no task 'task7'; it has: task0, task1" in refused(
        capsys, settings, f"--bank={good}", "--tasks", "task7"
    )
    assert "3 prompts, 9 are needed" in refused(capsys, settings, f"--bank={good}", "--n-prompts=9")
    assert "do not divide" in refused(capsys, settings, f"--bank={good}", "--token-size", "4", "7")
    assert "name a folder or a hub id" in refused(
        capsys, settings, f"--bank={good}", "--encoder=nowhere"
    )
    for ranks in ((2, 3), (2, 1)):
        mixed = plain_bank(tmp_path / f"mixed{ranks[1]}", ranks)
        assert "share one base and one rank" in refused(capsys, settings, f"--bank={mixed}")
    foreign = plain_bank(tmp_path / "foreign", key="q.weight_{}")
    assert "no matrix of a LoRA" in refused(capsys, settings, f"--bank={foreign}")
    weights = good / "task1" / "task1_0" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:60])
    assert "torn" in refused(capsys, settings, f"--bank={good}")


def test_the_package_needs_nothing_of_llgbm_but_for_its_bank(tmp_path: Path) -> None:
    """Make unimportable what `dnd_repo/requirements.txt` does not name; the bare interpreter has no LLGBM to run."""
    code = (
        "import os, sys; os.environ.pop('PYTHONPATH', None); sys.executable = sys._base_executable;"
        "sys.modules.update(dict.fromkeys(('llgbm', 'tuning', 'ray', 'mlflow', 'peft')));"
        "import dnd.recipes; from dnd.commands import exit_status, generate_command, train_command;"
        "sys.exit(exit_status(lambda: train_command(dnd.recipes.MATH, 'bank', 'out', (), sys.argv[1:])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--smoke"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and "error: --smoke needs LLGBM" in done.stderr, done.stderr
    plain_bank(tmp_path / "bank")
    done = subprocess.run(
        [sys.executable, "-c", code, "--dry-run"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "2 adapters of 2 tasks" in done.stderr, done.stderr


def test_the_launcher_refuses_before_it_starts_anything(tmp_path: Path) -> None:
    for script, count, message in (
        ("workspace/main/tasks/math/nosuch.py", "2", "there is no script"),
        ("workspace/main/tasks/math/train_qwen1.5lora_Math.py", "0", "N a number of processes"),
        (
            "workspace/main/tasks/math/train_qwen1.5lora_Math.py",
            "2",
            "there is no bank at data/math1.5B",
        ),
    ):
        done = launch(script, count, [], tmp_path)
        assert (
            done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
        ), done.stderr


@pytest.mark.parametrize(
    "script", sorted((DND / "workspace" / "main" / "tasks").rglob("*.py")), ids=lambda p: p.stem
)
def test_task_scripts_are_a_few_lines_over_one_function(script: Path) -> None:
    lines = [line for line in script.read_text().splitlines() if line.strip()]
    assert len(lines) <= 14
