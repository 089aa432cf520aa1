"""Read what users made with an earlier version: bundles, banks, caches and stores, with the numbers that they held.

The files are in `tests/data/formats`; `tests/make_formats.py` made them.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from formats import (
    ARGUMENTS,
    BASE,
    BUNDLES,
    CACHE,
    DATA,
    FOLDER,
    OLDER_BUNDLES,
    OLDER_CACHE,
    PROMPTS,
    STORE,
    TOKEN_BUNDLES,
    TOPICS,
    restore_store,
    shown_numbers,
)
from helpers import ROOT
from safetensors.torch import load_file

from llgbm.commands.adapters import read_own_lineage
from llgbm.evaluation.baselines import known_baselines
from llgbm.generator import GENERATORS
from llgbm.generator.bundle import GeneratorBundle, load_generator, save_generator
from llgbm.generator.conditions import build_conditions, make_encoder
from llgbm.generator.networks import GeneratorConfig
from llgbm.lora import LoraBatch
from llgbm.models.load import load_base
from llgbm.runtime import UserError
from llgbm.teachers.bank import Bank, BankSource, read_manifest
from llgbm.teachers.build import build_bank
from llgbm.teachers.writer import BankWriter
from llgbm.world import gather_data, make_lora_model
from tuning.arguments import parse_arguments, study_of
from tuning.registry import fetch_bundle
from tuning.report import find_study, read_study, write_report
from tuning.sweep.artifacts import PER_TASK, read_per_task
from tuning.sweep.resume import trials_to_run
from tuning.tracking.study import StudyTracker
from tuning.tracking.trial import finished_result

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a copy of the fixtures: a reader may write, and paths in them are relative."""
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    shutil.copy(ROOT / "tests" / "tiny_study.py", tmp_path / "study.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file that a cache holds; its locks are none."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# Generators that came later have no bundle of the first format.
LATER = ("latent", "retrieval")
OLDER = sorted(GENERATORS.keys() - set(LATER))


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        *((OLDER_BUNDLES, name) for name in OLDER),
        *((BUNDLES, name) for name in ("default", *LATER)),
        (TOKEN_BUNDLES, "default"),
    ],
    ids=[*OLDER, "format 2", *LATER, "format 3"],
)
def test_a_bundle_writes_the_adapter_that_it_wrote(folder: Path, name: str) -> None:
    bundle = GeneratorBundle.load(folder / name)
    base = load_base(BASE)
    bundle.check_base(base)
    assert bundle.facts["generator"]["name"] == name
    with pytest.raises(UserError, match="not for base"):
        bundle.check_base(replace(base, hash="another", folder=None))
    wrote, wanted = bundle.generate(PROMPTS), load_file(folder / f"{name}.safetensors")
    assert wrote.keys() == wanted.keys() and max(t.abs().max() for t in wanted.values()) > 0.01
    for key, values in wanted.items():
        torch.testing.assert_close(wrote[key], values, rtol=0, atol=1e-5)
    assert bundle.adapter_config()["base_model_name_or_path"] == str(BASE)


def test_a_bundle_of_another_format_is_refused_and_what_is_written_names_its_own(
    tmp_path: Path,
) -> None:
    file = BUNDLES / "default" / "generator.json"
    described = json.loads(file.read_text())
    older = json.loads((OLDER_BUNDLES / "default" / "generator.json").read_text())
    assert "version" not in older and described["version"] == 2
    generator, facts = load_generator(file.parent)
    config = GeneratorConfig(**facts.pop("generator"))
    del facts["version"]
    (tmp_path / "again").mkdir()
    save_generator(tmp_path / "again", generator, config, facts)
    assert json.loads((tmp_path / "again" / "generator.json").read_text()) == described
    for version, words in ((4, "format 4, and this version of llgbm reads"), ("2", "is torn")):
        file.write_text(json.dumps({**described, "version": version}))
        with pytest.raises(UserError, match=words):
            GeneratorBundle.load(file.parent)


def test_a_bank_of_a_newer_format_is_refused() -> None:
    file = Path("bank-2") / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 3}))
    with pytest.raises(UserError, match="format 3.*install a newer llgbm"):
        Bank.open(file.parent, load_base(BASE))


def test_numbers_by_task_of_a_newer_format_are_refused(tmp_path: Path) -> None:
    file = tmp_path / PER_TASK
    file.write_text('{"test": {}}')
    assert read_per_task(file) == {"test": {}}
    file.write_text('{"version": 3}')
    with pytest.raises(UserError, match="format 3"):
        read_per_task(file)


def versions_in(path: Path) -> Iterator[str]:
    """Yield the dotted names of a module's own constants that are versions."""
    package = ROOT / "dnd_repo" / "workspace" if "dnd_repo" in path.parts else ROOT
    module = ".".join(path.relative_to(package).with_suffix("").parts)
    for node in ast.parse(path.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            if isinstance(target, ast.Name) and re.fullmatch(r"(\w+_)?VERSION", target.id):
                yield f"{module}.{target.id}"


def test_the_documents_list_the_version_of_every_format() -> None:
    text = (ROOT / "docs" / "formats.md").read_text()
    listed = {name: int(number) for number, name in re.findall(r"\| (\d+) \| `([\w.]+)` \|", text)}
    folders = (ROOT / name for name in ("llgbm", "tuning", "dnd_repo/workspace/dnd"))
    files = chain.from_iterable(folder.rglob("*.py") for folder in folders)
    known = list(chain.from_iterable(map(versions_in, files)))
    found = {
        name: getattr(import_module(name.rpartition(".")[0]), name.rpartition(".")[2])
        for name in known
    }
    assert listed == found and len(known) > 15
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert "format 2 of `generator.json`" in changes and "docs/formats.md" in changes


def test_a_lineage_of_version_1_is_read_and_holds() -> None:
    lineage = read_own_lineage(Path("adapter"))
    assert lineage is not None and lineage["version"] == 1
    assert lineage["made"] == "1970-01-01T00:00:00+00:00"
    assert load_base(BASE).is_named(lineage["base"]["hash"])
    wrote, wanted = load_file("adapter/adapter_model.safetensors"), Path("bundles/default")
    for key, values in load_file(f"{wanted}.safetensors").items():
        torch.testing.assert_close(wrote[key], values, rtol=0, atol=1e-5)
    facts = GeneratorBundle.load(wanted).facts
    assert lineage["generator"]["hash"] == facts["generator_hash"]


@pytest.mark.parametrize("folder", [Path("bank"), Path("bank-2")], ids=["version 1", "version 2"])
def test_a_bank_lists_and_loads(folder: Path) -> None:
    bank = Bank.open(folder, load_base(BASE))
    assert dict(bank.adapters) == {f"{topic}_0": topic for topic in TOPICS[:3]}
    assert (bank.spec.rank, bank.spec.alpha) == (1, 2.0)
    files = [
        load_file(folder / f"checkpoints/{topic}/{topic}_0/adapter_model.safetensors")
        for topic in TOPICS[:3]
    ]
    stacked = LoraBatch.from_state_dicts(files).flatten(bank.spec)
    assert (
        torch.equal(bank.load().flatten(bank.spec), stacked)
        and stacked.abs().min(1).values.max() > 0
    )
    asked = {row["prompt"] for row in json.loads((DATA / "river.json").read_text())}
    prompts = bank.prompts("river_0")
    assert {purpose: len(own) for purpose, own in prompts.items()} == {"train": 2, "evaluation": 2}
    assert set(prompts["train"] + prompts["evaluation"]) <= asked
    assert bank.facts == {
        "base_accuracy": 0.0,
        "teacher_accuracy": 0.0,
        "worst_teacher_accuracy": 0.0,
    }
    stored = json.loads((folder / "trajectories.json").read_text())
    probes = bank.trajectories()
    assert [[p.prompt, p.continuation] for p in probes.of("stone")] == stored["stone"]
    assert BankSource.find(str(folder)).hash == bank.hash


def test_a_bank_of_version_1_is_written_on_under_its_hash() -> None:
    base, folder = load_base(BASE), Path("bank")
    before, settings = Bank.open(folder, base), read_manifest(folder)["settings"]
    facts = before.facts
    writer = BankWriter(folder, base, before.spec, settings)
    with writer.opened():
        assert writer.is_finished and writer.missing(list(before.adapters)) == []
        writer.reopen()
        with pytest.raises(UserError, match="not finished"):
            Bank.open(folder, base)
        told = before.trajectories()
        asked = {topic: [probe.prompt for probe in told.of(topic)] for topic in TOPICS[:3]}
        writer.finish(list(before.adapters), asked, {"facts": facts}, 24)
    after = Bank.open(folder, base)
    assert (after.hash, after.adapters) == (before.hash, before.adapters)
    assert read_manifest(folder)["version"] == 2 and not (folder / "bank.json").exists()


def test_a_cache_is_found_part_by_part_and_nothing_of_it_is_made_again() -> None:
    before = contents(CACHE)
    config, base = study_of(parse_arguments(ARGUMENTS)).worlds[0], load_base(BASE)
    bank = build_bank(CACHE, base, config.suite, config.teachers)
    data = gather_data(CACHE, config, base, bank)
    baselines = known_baselines(CACHE, data, make_lora_model(base, bank))
    after = contents(CACHE)
    assert {name: after.pop(name) for name in before} == before
    # Baselines that are newer than this cache have an entry of their own.
    assert {name.split("/")[0] for name in after} == {"baselines"}
    assert {name.split("/")[0] for name in before} == {
        "banks",
        "baselines",
        "conditions",
        "deltas",
        "multitask",
    }
    assert dict(zip(data.adapter_ids, data.tasks, strict=True)) == {
        f"{topic}_0": topic for topic in TOPICS
    }
    assert data.values_AV.shape == (4, bank.spec.n_values) and data.multitask_V.abs().max() > 0
    for table in (data.loss_deltas, data.shared_deltas, data.generic_deltas):
        assert (
            table.delta_APQD.shape == table.base_APQD.shape and table.delta_APQD.abs().max() > 0.01
        )
    assert data.conditions.train_ANC.shape == (4, 8, 8)
    (kept,) = (name for name in before if name.endswith("/metrics.json"))
    held = json.loads((CACHE / kept).read_text())
    for (
        name,
        numbers,
    ) in held.items():  # measured before texts were read in the order of their lengths
        assert baselines[name] == pytest.approx(numbers, abs=1e-5)


def test_entries_of_an_earlier_version_are_told_of_once_and_left_as_they_are(capsys: Any) -> None:
    before = contents(OLDER_CACHE)
    config, base = study_of(parse_arguments(ARGUMENTS)).worlds[0], load_base(BASE)
    encoder = make_encoder(config.encoder, base)
    for folder in ("bank", "bank-2"):
        build_conditions(OLDER_CACHE, encoder, Bank.open(Path(folder), base), [folder])
    told = [line for line in capsys.readouterr().err.splitlines() if "earlier version" in line]
    (line,) = told
    assert "1 banks, 1 baselines, 1 conditions, 3 deltas, 1 multitask" in line
    assert before.items() <= contents(OLDER_CACHE).items()


def test_cached_deltas_are_those_that_are_measured_today(tmp_path: Path) -> None:
    config, base = study_of(parse_arguments(ARGUMENTS)).worlds[0], load_base(BASE)
    bank = build_bank(CACHE, base, config.suite, config.teachers)
    kept, fresh = (gather_data(cache, config, base, bank) for cache in (CACHE, tmp_path / "new"))
    for name in ("loss_deltas", "shared_deltas", "generic_deltas"):
        old, new = getattr(kept, name), getattr(fresh, name)
        torch.testing.assert_close(old.delta_APQD, new.delta_APQD, rtol=0, atol=1e-5)
        torch.testing.assert_close(old.base_APQD, new.base_APQD, rtol=0, atol=1e-5)


@pytest.fixture
def uri(here: Path) -> str:
    """Restore the store and return its address."""
    return f"sqlite:///{restore_store(here)}"


def test_a_store_gives_its_report_and_its_numbers(uri: str, tmp_path: Path) -> None:
    record = read_study(uri, find_study(uri, "latest").info.run_id)
    wanted = json.loads((STORE / "numbers.json").read_text())
    assert record.study == "tiny" and len(record.study_id) == 12
    assert json.loads(json.dumps(shown_numbers(record))) == wanted
    assert [delta.teacher_JD.shape for delta in record.deltas] == [(1, 8), (1, 8)]
    (tmp_path / "report").mkdir()
    printed = write_report(tmp_path / "report", record)
    for trial in wanted["trials"].values():
        assert (
            trial["config"] in printed
            and f"{trial['metrics']['heldout/delta_cosine']:.3f}" in printed
        )
    assert (tmp_path / "report" / "report.md").is_file()


def test_trials_of_a_store_are_found_by_their_ids_and_by_no_other(uri: str, here: Path) -> None:
    study = study_of(parse_arguments(ARGUMENTS))
    tracker = StudyTracker.open(None, here, "llgbm")
    wanted: dict[str, Any] = json.loads((STORE / "numbers.json").read_text())["trials"]
    # Ids of version 0.1.0 left out part of what numbers depend on: their trials are run again.
    open_trials = trials_to_run(study.trials, tracker.live_runs(), resume=False, retry_failed=False)
    assert list(open_trials) == list(study.trials)
    assert not wanted.keys() & {trial.id for trial in study.trials}
    tracker.begin(study.name, study.id, {}, {})
    assert tracker.target is not None
    for trial_id, known in wanted.items():
        found = finished_result(tracker.target, trial_id)
        assert found is not None and found.metrics == known["metrics"]


def test_the_champion_of_a_store_is_fetched(uri: str) -> None:
    bundle = GeneratorBundle.load(
        fetch_bundle("models:/llgbm-generator-base-base-smoke@champion", uri)
    )
    wanted = load_file(Path("bundles") / "default.safetensors")
    for key, values in bundle.generate(PROMPTS).items():
        torch.testing.assert_close(values, wanted[key], rtol=0, atol=1e-5)
