"""Sweeps over a base, datasets and a bank of the user's own: what the options mean, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import rows, write_rows

from llgbm.models.load import SIZES, Base, BaseSource
from llgbm.runtime import UserError
from llgbm.tasks.files import FileSuite
from llgbm.tasks.synthetic import SyntheticSuite
from llgbm.teachers.bank import Bank, BankSource
from llgbm.teachers.build import make_bank
from llgbm.teachers.train import SFTConfig, TeacherConfig
from llgbm.world import WorldConfig, build_world
from tuning.arguments import parse_arguments
from tuning.run_ablation import main
from tuning.studies.own_world import custom_worlds

TOPICS = ("river", "stone", "cloud", "tiger")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    for topic in TOPICS:
        write_rows(folder, topic, rows(topic, 32))
    return folder


@pytest.fixture(scope="module")
def bank(tiny_base: Base, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers of each dataset, made as `python -m llgbm teachers` makes them."""
    out = tmp_path_factory.mktemp("banks") / "bank"
    teachers = TeacherConfig(
        rank=2,
        alpha=4.0,
        per_task=2,
        steps=2,
        examples=2,
        condition_train=4,
        condition_evaluation=4,
        trajectories=2,
    )
    make_bank(
        tiny_base,
        FileSuite.open(folder, TOPICS),
        SFTConfig(teachers, method="batched", checkpoints=1),
        out,
    )
    return out


def worlds(*arguments: str) -> tuple[WorldConfig, ...]:
    return custom_worlds(parse_arguments(arguments).study)


def data_arguments(folder: Path) -> list[str]:
    return ["--data", str(folder), "--tasks", "river", "stone", "cloud", "--held-out", "tiger"]


def test_options_become_a_world_that_is_fitted_to_its_datasets(
    tiny_base: Base, folder: Path
) -> None:
    (world,) = worlds(
        "--base", tiny_base.path, *data_arguments(folder), "--rows", "16", "--rank", "3"
    )
    assert world.size == f"base-{Path(tiny_base.path).name}" and world.base == BaseSource.find(
        tiny_base.path
    )
    assert world.suite == FileSuite.open(folder, ["river", "stone"], ["cloud"], ["tiger"], limit=16)
    teachers = world.teachers
    assert (teachers.rank, teachers.alpha, teachers.per_task, teachers.condition_evaluation) == (
        3,
        6.0,
        4,
        4,
    )
    assert world.eval_examples == 4
    (plain,) = worlds("--base", tiny_base.path, "--adapters-per-task", "2", "--alpha", "5")
    assert plain.suite == SyntheticSuite() and (plain.teachers.per_task, plain.teachers.alpha) == (
        2,
        5.0,
    )
    assert worlds() == () == worlds("--model-size", "micro")


def test_a_plan_names_base_bank_and_tasks_and_writes_nothing(
    tiny_base: Base,
    folder: Path,
    bank: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        main(["--base", tiny_base.path, *data_arguments(folder), "--bank", str(bank), "--dry-run"])
        == 0
    )
    printed = capsys.readouterr().out
    assert (
        f"base: {tiny_base.path}" in printed
        and f"teachers: {bank}" in printed
        and "4 tasks" in printed
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.whole
def test_a_world_of_a_given_bank_has_that_banks_adapters(
    tiny_base: Base, folder: Path, bank: Path, tmp_path: Path
) -> None:
    (world,) = worlds("--base", tiny_base.path, *data_arguments(folder), "--bank", str(bank))
    built = build_world(tmp_path, world, "cpu")
    stored = Bank.open(bank, tiny_base)
    by_id = dict(zip(stored.adapters, stored.load().flatten(stored.spec), strict=True))
    for adapter_id, values in zip(built.data.adapter_ids, built.data.values_AV, strict=True):
        assert torch.equal(values, by_id[adapter_id])
    parts = {
        part: [built.data.adapter_ids[i] for i in found] for part, found in built.data.rows.items()
    }
    assert parts == {
        "train": ["river_0", "river_1", "stone_0", "stone_1"],
        "val": ["cloud_0"],
        "test": ["tiger_0"],
    }
    fewer = build_world(
        tmp_path,
        worlds(
            "--base",
            tiny_base.path,
            *data_arguments(folder)[:-3],
            "--held-out",
            "cloud",
            "--bank",
            str(bank),
        )[0],
    )
    assert (
        set(fewer.data.tasks) == {"river", "stone", "cloud"} and fewer.bank.hash != built.bank.hash
    )


def test_a_bank_that_does_not_fit_is_refused(
    tiny_base: Base, folder: Path, bank: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path, "piano", rows("piano", 32))
    for topic in TOPICS:
        write_rows(tmp_path, topic, rows(topic, 32))
    suite = FileSuite.open(tmp_path, ["river", "piano"], ["stone"], ["tiger"])
    with pytest.raises(UserError, match="no adapter of piano"):
        BankSource.find(str(bank)).open(tiny_base, suite)
    with pytest.raises(UserError, match="changed since"):
        BankSource(str(bank), "other").open(tiny_base, suite)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "river"], "--data"),
        (["--held-out", "river"], "--data"),
        (["--rows", "16"], "--data"),
        (
            ["--data", "{data}", "--tasks", "river", "--held-out", "tiger"],
            "--data needs a base model",
        ),
        (["--rank", "4"], "--base"),
        (["--bank", "x"], "--base"),
        (["--dtype", "bfloat16"], "--base"),
        (["--base", "{base}", "--dtype", "int3"], "float32, bfloat16"),
        (["--base", "{base}", "--model-size", "qwen2.5-0.5b"], "no qwen2.5-0.5b"),
        (["--base", "{base}", "--model-size", "nano"], "mixed"),
        (
            ["--base", "{base}", "--model-size", "qwen2.5-0.5b", "qwen2.5-1.5b"],
            "--base is one model",
        ),
        (["--model-size", "nano", "qwen2.5-0.5b"], "mixed"),
        (["--base", "nowhere-at-all"], "no such folder"),
        (["--base", "{base}", "--data", "{data}", "--tasks", "river", "stone"], "--held-out"),
        (
            [
                "--base",
                "{base}",
                "--data",
                "{data}",
                "--tasks",
                "river",
                "stone",
                "--held-out",
                "nothing",
            ],
            "'nothing'",
        ),
        (
            [
                "--base",
                "{base}",
                "--data",
                "{data}",
                "--tasks",
                "river",
                "--held-out",
                "tiger",
                "--rows",
                "0",
            ],
            "--rows is 0",
        ),
        (
            [
                "--base",
                "{base}",
                "--data",
                "{data}",
                "--tasks",
                "river",
                "stone",
                "--held-out",
                "tiger",
                "--rows",
                "4",
            ],
            "rows",
        ),
        (["--base", "{base}", "--bank", "{data}"], "manifest.json"),
        (["--base", "{base}", "--bank", "{data}", "--rank", "2"], "--rank is about teachers"),
        (["--base", "{base}", "--rank", "0"], "rank"),
        (["--base", "{base}", "--target-modules", "q_proj", "nope"], "no Linear layer called nope"),
        (["--base", "{base}", "--adapters-per-task", "0"], "at least one teacher"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str],
    words: str,
    tiny_base: Base,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (
        main([*(a.format(base=tiny_base.path, data=folder) for a in arguments), "--dry-run"]) == 2
    )
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and words in last


def test_sizes_name_the_hub_ids_that_they_stand_for() -> None:
    hubs = {name: getattr(size, "hub", None) for name, size in SIZES.items()}
    assert hubs["nano"] is None and hubs["qwen2.5-1.5b"] == "Qwen/Qwen2.5-1.5B-Instruct"
