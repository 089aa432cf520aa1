"""Banks of `dnd`: what is held out stays so, one scaling a bank, a resume of the same bank, the public file names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from dnd import names
from dnd.bank import AdapterBank, task_texts
from dnd.commands import exit_status, generate_command, train_command
from dnd.errors import DndError
from dnd.recipes import ARC_C, COMMON_SENSE, MATH, MATH_TASKS
from dnd.training import TrainSettings, train
from helpers import ROOT, SHARED
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_dnd_training import launch
from transformers import AutoModelForCausalLM

from llgbm.world import World

TASKS = ("ARC-c", "ARC-e", "BoolQ")


def bank_of(folder: Path, tasks: Sequence[str] = TASKS, flat: bool = False) -> Path:
    """A bank of random adapters, one a task: as PEFT writes them, or as the public ones lie."""
    for index, task in enumerate(tasks):
        own = folder / task / ("" if flat else f"{task}_0")
        own.mkdir(parents=True)
        torch.manual_seed(index)
        state = {"q.lora_A.weight": torch.randn(2, 12), "q.lora_B.weight": torch.randn(12, 2)}
        save_file(state, own / ("50.safetensors" if flat else "adapter_model.safetensors"))
        if not flat:
            (own / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
            (own / "prompts.json").write_text(json.dumps(["one", "two", "three"]))
    return folder


def tasks_of(folder: Path, **more: object) -> set[str]:
    return {task for _, task in AdapterBank.open(folder, held_out=ARC_C, **more).adapters}  # type: ignore[arg-type]


def said_by(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Return what the script of ARC-c prints of a bank, in a dry run."""
    options = ("--dry-run", *options)
    status = exit_status(lambda: train_command(COMMON_SENSE, "data/x", "out", ARC_C, options))
    return f"{status} {capsys.readouterr().err}"


def test_the_held_out_task_is_left_out_of_any_bank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    bank = bank_of(tmp_path / "data" / "x")
    (tmp_path / "link").symlink_to(bank, target_is_directory=True)
    shutil.copytree(bank, tmp_path / "renamed")
    for named in ("data/x", str(bank), "./data/../data/x", "link", "renamed"):
        said = said_by(capsys, f"--bank={named}")
        assert said.startswith("0 2 adapters of 2 tasks") and "held out: ARC-c" in said, said
    assert "2 adapters of 2 tasks" in said_by(capsys)
    said = said_by(capsys, f"--bank={bank}", "--tasks", "ARC-e", "arc_c")
    assert said.startswith("2 error: arc_c is held out by this script"), said
    alone = bank_of(tmp_path / "alone", ["ARC-c"])
    assert said_by(capsys, f"--bank={alone}").startswith(f"2 error: {alone} holds ARC-c")


@pytest.mark.parametrize("name", ["arc_c", "ARC-C", "ARC-Challenge", "ARC-c_train", "ARC-c-1"])
def test_the_held_out_task_is_known_however_it_is_spelled(tmp_path: Path, name: str) -> None:
    assert tasks_of(bank_of(tmp_path, [name, "ARC-e", "ARC-creation"])) == {"ARC-e", "ARC-creation"}


def test_the_held_out_task_is_known_at_other_depths_and_behind_links(tmp_path: Path) -> None:
    bank = bank_of(tmp_path / "bank", flat=True)
    for task in TASKS:
        (tmp_path / f"{task}.json").write_text(json.dumps([{"prompt": "one"}]))
        (bank / task / "prompts.json").write_text(json.dumps(["one"]))
    assert tasks_of(bank) == {"ARC-e", "BoolQ"}
    above = AdapterBank.open(tmp_path, held_out=ARC_C)
    assert {path.parent.name for path, _ in above.adapters} == {"ARC-e", "BoolQ"}
    linked = tmp_path / "linked"
    linked.mkdir()
    for task, alias in zip(TASKS, ("mine", "yours", "theirs"), strict=True):
        (linked / alias).symlink_to(bank / task, target_is_directory=True)
    assert tasks_of(linked) == {"yours", "theirs"}
    # A place that only lies below a folder of that name is not the task's.
    assert tasks_of(bank_of(tmp_path / "ARC-c" / "bank", ["BoolQ"])) == {"BoolQ"}


@pytest.fixture
def two(world: World, tmp_path: Path) -> Path:
    """Two of the world's adapters, in a bank of their own."""
    folder = world.bank.folder / "checkpoints"
    for task in sorted(path.name for path in folder.iterdir())[:2]:
        shutil.copytree(folder / task, tmp_path / "two" / task)
    return tmp_path / "two"


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.whole
def test_another_alpha_is_brought_to_the_first_one(two: Path, world: World, tmp_path: Path) -> None:
    """The adapter read, under the first one's config, is to PEFT what the file is under its own."""
    first, second = sorted(two.glob("*/*/adapter_config.json"))
    rank = json.loads(first.read_text())["r"]
    for values in ({"lora_alpha": 3.0}, {"lora_alpha": 5.0, "use_rslora": True}):
        change(second, **values)
        bank = AdapterBank.open(two)
        own = tmp_path / "read"
        own.mkdir(exist_ok=True)
        save_file(bank.read(1), own / "adapter_model.safetensors")
        shutil.copy(first, own)
        found = []
        for folder in (second.parent, own):
            base = AutoModelForCausalLM.from_pretrained(world.base.path)
            model = PeftModel.from_pretrained(base, folder).eval()
            found.append(model(torch.arange(9)[None]).logits)
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
        assert bank.factors[0] == 1 and bank.factors[1] != 1 and rank


@pytest.mark.parametrize("odd", [{"use_dora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_adapters_that_are_read_otherwise_are_refused(two: Path, odd: dict[str, object]) -> None:
    change(sorted(two.glob("*/*/adapter_config.json"))[1], **odd)
    with pytest.raises(DndError, match=f"differ in {next(iter(odd))}"):
        AdapterBank.open(two).read(1)


@pytest.mark.parametrize("odd", [{"r": 0}, {"lora_alpha": None}, {"lora_alpha": -8}])
def test_a_config_without_scaling_costs_one_sentence(two: Path, odd: dict[str, object]) -> None:
    change(sorted(two.glob("*/*/adapter_config.json"))[1], **odd)
    with pytest.raises(DndError, match="has no alpha and rank above 0"):
        AdapterBank.open(two).read(1)


def test_a_config_that_is_none_costs_one_sentence(two: Path) -> None:
    sorted(two.glob("*/*/adapter_config.json"))[1].write_text('["r"]')
    with pytest.raises(DndError, match="is no config of an adapter"):
        AdapterBank.open(two).read(1)


@pytest.mark.parametrize("what", ["weights", "alpha", "prompts", "one more"])
def test_a_training_does_not_go_on_with_another_bank(two: Path, world: World, what: str) -> None:
    settings = TrainSettings(
        encoder=world.base.path,
        n_prompts=2,
        max_length=8,
        features=((4, 6, 66),),
        token_size=(6, 66),
        kernel_size=3,
        steps=2,
        batch_size=1,
        save_every=1,
    )
    out = two.parent / "out"

    def stop(step: int, loss: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, AdapterBank.open(two), out, report=stop)
    moved = shutil.copytree(two, two.parent / "moved")
    folder = next(iter(sorted(two.glob("*/*"))))
    if what == "weights":
        state = load_file(folder / "adapter_model.safetensors")
        next(iter(state.values()))[0, 0] += 1e-3
        save_file(state, folder / "adapter_model.safetensors")
    elif what == "alpha":
        change(sorted(two.glob("*/*/adapter_config.json"))[1], lora_alpha=1.5)
    elif what == "prompts":
        texts = json.loads((folder / "prompts.json").read_text())
        change(folder / "prompts.json", train=texts["train"][1:])
    else:
        shutil.copytree(folder, folder.with_name("more"))
    with pytest.raises(DndError, match="another bank"):
        train(settings, AdapterBank.open(two), out, resume=True)
    assert len(train(settings, AdapterBank.open(moved), out, resume=True).losses) == 2


@pytest.mark.parametrize(
    ("task", "purpose", "files", "found"),
    [
        ("ARC-c", "evaluation", ["ARC-c_train", "ARC-c_test", "ARC-e_test"], "ARC-c_test"),
        ("ARC-c", "train", ["ARC-c_train", "ARC-c_test"], "ARC-c_train"),
        ("HumanEval", "evaluation", ["Human_Eval", "GSM8K"], "Human_Eval"),
        ("BoolQ", "evaluation", ["BoolQ_validation", "BoolQ_train"], "BoolQ_validation"),
        ("BoolQ", "evaluation", ["BoolQ_validation", "BoolQ_test"], "BoolQ_test"),
        ("math-plus", "train", ["Math-Plus", "MATH"], "Math-Plus"),
        ("MATH", "evaluation", ["Math-Plus", "MATH", "Mu-Math"], "MATH"),
        ("HumanEval", "evaluation", ["Human_Eval", "HumanEval"], "HumanEval"),
    ],
)
def test_the_public_names_of_files_are_found(
    tmp_path: Path, task: str, purpose: str, files: list[str], found: str
) -> None:
    for name in files:
        text = json.dumps([{"prompt": f"of {name}"}])
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8-sig")
    assert task_texts(Path(), task, tmp_path, purpose=purpose) == (f"of {found}",)


def test_a_file_that_is_missing_or_one_of_two_costs_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DndError, match=r"none of ARC-c_test\.json, ARC-c_validation\.json"):
        names.data_file(tmp_path, "ARC-c", "evaluation")
    for name in ("Human_Eval", "Human-Eval"):
        (tmp_path / f"{name}.json").write_text("[]")
    with pytest.raises(DndError, match=r"has Human-Eval\.json and Human_Eval\.json"):
        names.data_file(tmp_path, "HumanEval", "evaluation")


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="../shared/data is absent")
def test_the_published_files_are_found() -> None:
    wanted = {"ARC-c": "ARC-c_test", "HumanEval": "Human_Eval", "GSM8K": "GSM8K"}
    for task, name in {**wanted, "BoolQ": "BoolQ_validation", "OBQA": "OBQA_test"}.items():
        assert names.data_file(SHARED / "data", task, "evaluation").stem == name
        assert task_texts(Path(), task, SHARED / "data", purpose="evaluation")


def home_of_the_seed(folder: Path, world: World) -> Path:
    """A folder as the public scripts find it: a flat bank, its config, texts, and the encoder."""
    bank = bank_of(folder / "data" / "math1.5B", ["Math-Plus", "Mu-Math", "GSM8K"], flat=True)
    (bank / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    texts = folder / "prepare" / "data"
    texts.mkdir(parents=True)
    for task in ("Math-Plus", "Mu-Math", "GSM8K"):
        rows = [{"prompt": f"{task} {i}", "response": "1"} for i in range(4)]
        (texts / f"{task}.json").write_text(json.dumps(rows))
    (folder / "models").mkdir()
    (folder / "models" / "all-MiniLM-L12-v2").symlink_to(world.base.path)
    return folder


SIZES = [
    *("--n-prompts=2", "--max-length=8", "--length=8", "--features", "4x6x14", "--kernel-size=3"),
    *("--token-size", "4", "14", "--steps=2", "--batch-size=1"),
]


@pytest.mark.whole
def test_the_command_of_the_seed_runs_as_written(tmp_path: Path, world: World) -> None:
    folder = home_of_the_seed(tmp_path, world)
    script = "workspace/main/tasks/math/train_qwen1.5lora_Math.py"
    done = launch(script, "1", SIZES, folder)
    assert done.returncode == 0, done.stderr
    assert "2 adapters of 2 tasks" in done.stderr and "held out: GSM8K, MATH" in done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    assert (folder / "checkpoints" / "qwen1.5lora__Math" / "checkpoint-000002").is_dir()


@pytest.mark.parametrize(
    ("start", "launcher", "script"),
    [
        (".", "scripts/launch_multi.sh", "workspace/main/tasks/math/train_qwen1.5lora_Math.py"),
        ("workspace/main", "launch_multi.sh", "tasks/math/train_qwen1.5lora_Math.py"),
    ],
)
def test_the_launcher_is_found_from_inside_dnd_repo(
    tmp_path: Path, world: World, start: str, launcher: str, script: str
) -> None:
    """A copy of dnd_repo whose own folder holds the bank, called from within as DnD's README does."""
    home = home_of_the_seed(tmp_path, world)
    shutil.copytree(ROOT / "dnd_repo", home, dirs_exist_ok=True)
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": ""}
    command = ["bash", launcher, script, "1", "--tasks", "MATH-Plus"]
    done = subprocess.run(command, cwd=home / start, env=env, capture_output=True, text=True)
    assert "math1.5B has no task 'MATH-Plus'; it has: Math-Plus, Mu-Math" in done.stderr
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_generation_reads_the_public_texts(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home_of_the_seed(tmp_path, world))
    train_command(MATH, "data/math1.5B", "out", MATH_TASKS, SIZES)
    (written,) = generate_command(MATH, "out", "made", "GSM8K", [])
    config = json.loads((Path(written) / "adapter_config.json").read_text())
    assert config == {"r": 2, "lora_alpha": 4}


def test_a_bank_without_any_config_says_where_to_put_one(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home_of_the_seed(tmp_path, world))
    (tmp_path / "data" / "math1.5B" / "adapter_config.json").unlink()
    with pytest.raises(DndError, match=r"put that of its adapters into data/math1\.5B"):
        train_command(MATH, "data/math1.5B", "out", (), SIZES)
