"""Teachers of a bank folder: PEFT's and the batched ones are the same, and a killed run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llgbm.lora import LoraSpec
from llgbm.models.load import Base
from llgbm.runtime import UserError
from llgbm.tasks.suite import Split
from llgbm.tasks.synthetic import SyntheticSuite
from llgbm.teachers.bank import Bank, read_manifest, show_bank
from llgbm.teachers.build import make_bank
from llgbm.teachers.peft import PeftRun
from llgbm.teachers.train import SFTConfig, TeacherConfig

TEACHERS = TeacherConfig(
    rank=3,
    alpha=6.0,
    per_task=2,
    steps=4,
    examples=4,
    learning_rate=1e-2,
    condition_train=4,
    condition_evaluation=3,
    trajectories=2,
)
ONE_EACH = SFTConfig(TEACHERS, checkpoints=1, every=2)
TWO_EACH = replace(ONE_EACH, checkpoints=2)


@dataclass(frozen=True)
class TwoTasks(SyntheticSuite):
    """Two tasks of the synthetic suite, as `--tasks` names some datasets of a folder."""

    @property
    def split(self) -> Split:
        return Split(("copy-plain", "reverse-brackets"), (), ())


def bank_of(base: Base, out: Path, config: SFTConfig) -> Bank:
    return make_bank(base, TwoTasks(), config, out)


def values(bank: Bank) -> Tensor:
    return bank.load().flatten(bank.spec)


@pytest.fixture(scope="module")
def banks(tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bank]:
    """One bank a method, and one of two checkpoints a run."""
    root = tmp_path_factory.mktemp("banks")
    configs = {
        "peft": ONE_EACH,
        "batched": replace(ONE_EACH, method="batched", at_once=3),
        "two": TWO_EACH,
    }
    return {name: bank_of(tiny_base, root / name, config) for name, config in configs.items()}


def start_of(spec: LoraSpec) -> Tensor:
    from llgbm.lora import LoraBatch
    from llgbm.teachers.peft import initial_state

    return LoraBatch.from_state_dicts([initial_state(spec, 0)]).flatten(spec)


def test_peft_trains_what_the_batched_primitive_trains(banks: dict[str, Bank]) -> None:
    ours, theirs = values(banks["batched"]), values(banks["peft"])
    moved = ours - start_of(banks["peft"].spec)
    assert moved.abs().max() > 1e-2
    # Adam divides by what is near zero: a few values may differ more than the rest.
    assert ((ours - theirs).abs() < 1e-5).float().mean() > 0.999
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    assert (ours[0] - ours[1]).abs().max() > 1e-3 and (ours[0] - ours[2]).abs().max() > 1e-3


def test_a_run_leaves_its_last_checkpoints(banks: dict[str, Bank]) -> None:
    manifest = read_manifest(banks["two"].folder)
    assert {i: e["step"] for i, e in manifest["adapters"].items()} == {
        "copy-plain_0": 4,
        "copy-plain_1": 2,
        "reverse-brackets_0": 4,
        "reverse-brackets_1": 2,
    }
    # One run over the whole share of rows is not one of two runs over halves.
    assert {e["subset"] for e in manifest["adapters"].values()} == {"1 of 1"}
    last, first, start = (
        values(banks["two"])[0],
        values(banks["two"])[1],
        start_of(banks["two"].spec)[0],
    )
    assert 0 < (first - start).norm() < (last - start).norm()


def test_the_layout_is_that_of_a_bank(banks: dict[str, Bank], tiny_base: Base) -> None:
    bank = banks["peft"]
    assert list(bank.adapters) == [
        f"{t}_{i}" for t in ("copy-plain", "reverse-brackets") for i in range(2)
    ]
    for adapter_id, task in bank.adapters.items():
        folder = bank.folder / "checkpoints" / task / adapter_id
        files = {"adapter_model.safetensors", "adapter_config.json", "prompts.json"}
        assert {p.name for p in folder.iterdir()} == files
        assert [len(bank.prompts(adapter_id)[p]) for p in ("train", "evaluation")] == [4, 3]
    first, second = (bank.prompts(f"copy-plain_{i}") for i in range(2))
    assert not set(first["train"]) & set(second["train"])  # each is given prompts of its own
    assert first["evaluation"] == second["evaluation"]
    assert len(bank.trajectories().of("copy-plain")) == 2
    assert set(bank.facts) == {
        "teacher_accuracy",
        "worst_teacher_accuracy",
        "base_accuracy",
    }
    assert show_bank(bank.folder)["torn"] == [] and show_bank(bank.folder)["finished"]
    assert Bank.open(bank.folder, tiny_base).hash == bank.hash != banks["two"].hash


def test_the_base_is_as_it_was(banks: dict[str, Bank], tiny_base: Base) -> None:
    from llgbm.models.load import load_base

    fresh = load_base(tiny_base.path).model.state_dict()
    assert fresh.keys() == tiny_base.model.state_dict().keys()
    assert all(torch.equal(v, fresh[k]) for k, v in tiny_base.model.state_dict().items())
    assert not any(p.requires_grad for p in tiny_base.model.parameters())


@pytest.mark.parametrize(
    "change",
    [
        {"accumulation": 4},
        {"gradient_checkpointing": "on"},
        {"accumulation": 2, "gradient_checkpointing": "on"},
    ],
)
def test_saving_memory_changes_no_adapter(
    banks: dict[str, Bank], tiny_base: Base, tmp_path: Path, change: dict[str, object]
) -> None:
    saved = values(bank_of(tiny_base, tmp_path / "bank", replace(TWO_EACH, **change)))  # type: ignore[arg-type]
    difference = (saved - values(banks["two"])).abs()
    assert (difference < 1e-5).float().mean() > 0.999 and difference.max() < 1e-3


def test_the_environment_of_accelerate_changes_no_teacher(
    banks: dict[str, Bank], tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert torch.equal(values(bank_of(tiny_base, tmp_path, ONE_EACH)), values(banks["peft"]))


class Killed(BaseException):
    """What a power cut is to a program, as far as a test in its process can have one."""


@pytest.mark.parametrize("step", [1, 3, 7])
def test_a_killed_run_goes_on_to_the_same_bits(
    banks: dict[str, Bank],
    tiny_base: Base,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    advanced: list[str] = []
    plain = PeftRun.advance

    def killed_at(self: PeftRun) -> None:
        if len(advanced) == step:
            raise Killed
        advanced.append(self.run.task)
        plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(PeftRun, "advance", killed_at)
        with pytest.raises(Killed):
            bank_of(tiny_base, tmp_path / "bank", TWO_EACH)
    assert not show_bank(tmp_path / "bank")["finished"]
    assert not any(p.requires_grad for p in tiny_base.model.parameters())
    redone = count_steps(monkeypatch)
    bank = bank_of(tiny_base, tmp_path / "bank", TWO_EACH)
    assert len(redone) == 8 - step + step % 2
    assert torch.equal(values(bank), values(banks["two"]))
    assert not list(bank.folder.glob(".states/*"))


def test_a_state_is_kept_where_no_adapter_is_there_yet(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = replace(ONE_EACH, teachers=replace(TEACHERS, steps=6))
    plain = PeftRun.advance

    def killed_at(self: PeftRun) -> None:
        if self.step == 3:
            raise Killed
        plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(PeftRun, "advance", killed_at)
        with pytest.raises(Killed):
            bank_of(tiny_base, tmp_path / "bank", late)
    redone = count_steps(monkeypatch)
    bank_of(tiny_base, tmp_path / "bank", late)
    assert len(redone) == 4 * 6 - 2


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that every further step adds its task to."""
    steps: list[str] = []
    plain = PeftRun.advance

    def counted(self: PeftRun) -> None:
        steps.append(self.run.task)
        plain(self)

    monkeypatch.setattr(PeftRun, "advance", counted)
    return steps


def test_a_torn_adapter_is_made_again_and_no_other(
    banks: dict[str, Bank], tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bank"
    shutil.copytree(banks["two"].folder, folder)
    weights = folder / "checkpoints/copy-plain/copy-plain_0/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    assert show_bank(folder)["torn"] == ["copy-plain_0"]
    with pytest.raises(UserError, match="copy-plain_0"):
        Bank.open(folder, tiny_base)
    steps = count_steps(monkeypatch)
    bank = bank_of(tiny_base, folder, TWO_EACH)
    assert set(steps) == {"copy-plain"}
    assert torch.equal(values(bank), values(banks["two"]))
    assert bank_of(tiny_base, folder, TWO_EACH).hash == bank.hash and len(steps) == 4


def test_a_folder_of_other_settings_or_other_things_is_refused(
    banks: dict[str, Bank], tiny_base: Base, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="another settings"):
        bank_of(tiny_base, banks["two"].folder, replace(TWO_EACH, accumulation=2))
    with pytest.raises(UserError, match="another rank and settings"):
        bank_of(
            tiny_base, banks["two"].folder, replace(TWO_EACH, teachers=replace(TEACHERS, rank=2))
        )
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        bank_of(tiny_base, tmp_path, TWO_EACH)
    manifest = tmp_path / "torn" / "manifest.json"
    manifest.parent.mkdir()
    manifest.write_text(json.dumps({"version": 1})[:-1])
    with pytest.raises(UserError, match="is torn"):
        bank_of(tiny_base, manifest.parent, TWO_EACH)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "magic"}, "peft, batched"),
        ({"gradient_checkpointing": "maybe"}, "auto, on, off"),
        ({"every": 0}, "at least 1"),
        ({"checkpoints": 3}, "divide evenly"),
        ({"accumulation": 3}, "divide evenly"),
        ({"method": "batched"}, "one checkpoint"),
        ({"every": 4}, "more than 4 steps"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        replace(TWO_EACH, **change)  # type: ignore[arg-type]


def test_a_run_that_does_not_fit_is_refused(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llgbm.teachers.build.free_memory", lambda device: 1e3)
    with pytest.raises(UserError, match="--method peft"):
        bank_of(tiny_base, tmp_path / "bank", replace(ONE_EACH, method="batched"))


def test_checkpointing_comes_by_itself_where_memory_is_short(
    banks: dict[str, Bank], tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Sequence[object]] = []
    from llgbm.teachers import peft as sft

    plain = sft.blocks_checkpointed
    monkeypatch.setattr("llgbm.teachers.peft.free_memory", lambda device: 1e3)
    monkeypatch.setattr(
        "llgbm.teachers.peft.blocks_checkpointed",
        lambda model: used.append([model]) or plain(model),
    )
    bank_of(tiny_base, tmp_path / "bank", TWO_EACH)
    assert len(used) == 8
