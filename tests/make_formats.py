"""Write one small example of every format that users keep, made by the code as it is now, into `tests/data/formats`.

    python tests/make_formats.py

The examples stay as they are when code changes: they stand for what users made with an earlier version. Run this only
to add a format; then `git add -f tests/data/formats`, since weights are ignored elsewhere, and
`python tests/held_ids.py --write`, since the ids of the examples change with them.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sqlite3
import sys
import tempfile
from contextlib import chdir, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from formats import (
    ARGUMENTS,
    BASE,
    BUNDLES,
    CACHE,
    DATA,
    FOLDER,
    OLDER_BUNDLES,
    PROMPTS,
    ROOT_MARK,
    STORE,
    TOKEN_BUNDLES,
    TOPICS,
    shown_numbers,
)
from helpers import rows, write_rows
from safetensors.torch import save_file

from llgbm.evaluation.baselines import known_baselines
from llgbm.generator import generator_config
from llgbm.generator.bundle import GeneratorBundle, save_generator
from llgbm.models.load import ModelSize, load_base
from llgbm.models.pretrain import make_tokenizer, new_model
from llgbm.tasks.files import FileSuite
from llgbm.teachers.build import build_bank, make_bank
from llgbm.teachers.train import SFTConfig, TeacherConfig
from llgbm.world import World, WorldConfig, gather_data, make_lora_model
from tuning.arguments import parse_arguments, study_of
from tuning.report import find_study, read_study
from tuning.run_ablation import main as run_ablation
from tuning.tracking.store import local_tracking_uri

HERE = Path(__file__).parent
WORDS = ("What", " follows", " number", " nothing", *(f" {topic}" for topic in TOPICS))
# Not kept of a store: pictures, the code that travels with a model, and what names folders of this machine.
LEFT_OUT = (
    "mlflow.db*",
    ".*",
    "*.png",
    "*.svg",
    "*.html",
    "code",
    "*.py",
    "*.yaml",
    "*.txt",
    "*.csv",
    "MLmodel",
)


def main() -> int:
    """Make everything in a temporary folder, then replace the fixtures by it; return the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_all(Path(folder).resolve())
        os.chdir(HERE)
    return 0


def make_all(here: Path) -> None:
    """Write base, data, bank, cache and store into the current folder, and copy what is kept of them."""
    write_base(BASE)
    DATA.mkdir()
    for topic in TOPICS:
        write_rows(DATA, topic, rows(topic, 32))
    for older in ("bank", "bundles"):  # of version 1: nothing writes it any more
        shutil.copytree(FOLDER / older, older)
    write_bank(Path("bank-2"))
    shutil.copy(HERE / "tiny_study.py", "study.py")
    write_cache(study_of(parse_arguments(ARGUMENTS)).worlds[0])
    if status := run_ablation([*ARGUMENTS, "--cache", str(CACHE), "--max-concurrent", "1"]):
        raise SystemExit(status)
    shutil.rmtree(FOLDER, ignore_errors=True)
    for kept in (BASE, DATA, CACHE, Path("bank"), Path("bank-2"), OLDER_BUNDLES):
        shutil.copytree(kept, FOLDER / kept, ignore=shutil.ignore_patterns(".*", "sweeps"))
    keep_store(here)
    keep_bundles(here)
    keep_token_bundle()


def write_base(folder: Path) -> None:
    """Write a random Qwen2 of one layer whose states differ visibly from text to text."""
    tokenizer = make_tokenizer(WORDS)
    model = new_model(
        ModelSize(hidden=8, layers=1, heads=2, kv_heads=1, intermediate=8), tokenizer, seed=0
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_bank(folder: Path) -> None:
    """Write a bank folder of three teachers, as `python -m llgbm teachers` does."""
    teachers = TeacherConfig(
        rank=1,
        alpha=2.0,
        steps=4,
        examples=2,
        condition_train=2,
        condition_evaluation=2,
        trajectories=2,
    )
    config = SFTConfig(teachers, method="batched", checkpoints=1)
    make_bank(load_base(BASE), FileSuite.open(DATA, TOPICS[:3]), config, folder)


def write_cache(config: WorldConfig) -> None:
    """Write the cache of a world with its baselines, the path of the base being a relative one."""
    base = load_base(BASE)
    bank = build_bank(CACHE, base, config.suite, config.teachers)
    world = World(
        config, base, bank, gather_data(CACHE, config, base, bank), make_lora_model(base, bank)
    )
    known_baselines(CACHE, world.data, world.lora_model)


def keep_store(here: Path) -> None:
    """Write the store as SQL and its artifacts as files, `ROOT_MARK` standing where this folder's path was."""
    uri = local_tracking_uri(here)
    record = read_study(uri, find_study(uri, "latest").info.run_id)
    database = here / "mlruns" / "mlflow.db"
    with closing(sqlite3.connect(database)) as connection:
        statements = "\n".join(connection.iterdump())
    (FOLDER / STORE).mkdir(parents=True)
    packed = gzip.compress(statements.replace(str(here), ROOT_MARK).encode(), mtime=0)
    (FOLDER / STORE / "mlflow.sql.gz").write_bytes(packed)
    shutil.copytree("mlruns", FOLDER / STORE / "mlruns", ignore=shutil.ignore_patterns(*LEFT_OUT))
    for twice in (FOLDER / STORE / "mlruns").glob("artifacts/*/artifacts/generator"):
        shutil.rmtree(twice)  # They are among the bundles, and the registered one among the models.
    for path in (path for path in (FOLDER / STORE / "mlruns").rglob("*") if path.is_file()):
        content = path.read_bytes()
        path.write_bytes(content.replace(str(here).encode(), ROOT_MARK.encode()))
    write_json(FOLDER / STORE / "numbers.json", shown_numbers(record))


def keep_bundles(here: Path) -> None:
    """Write each trial's generator with the adapter that it writes for `PROMPTS`."""
    uri = local_tracking_uri(here)
    for trial in read_study(uri, find_study(uri, "latest").info.run_id).trials:
        (own,) = (here / "mlruns").rglob(f"{trial.run_id}/artifacts/generator")
        bundle = GeneratorBundle.load(own)
        relative = replace(bundle, facts={**bundle.facts, "base_path": str(BASE)})
        name = bundle.facts["generator"]["name"]
        shutil.copytree(own, FOLDER / BUNDLES / name)
        write_json(FOLDER / BUNDLES / name / "generator.json", relative.facts)
        save_file(relative.generate(PROMPTS), FOLDER / BUNDLES / f"{name}.safetensors")


def keep_token_bundle() -> None:
    """Write the default generator once more, as one that reads the states of each prompt's last two tokens."""
    bundle = GeneratorBundle.load(FOLDER / BUNDLES / "default")
    facts = {**bundle.facts, "condition": "prompts", "prompt_tokens": 2}
    for made_anew in ("version", "generator_hash"):
        facts.pop(made_anew, None)
    own = FOLDER / TOKEN_BUNDLES / "default"
    own.mkdir(parents=True)
    config = generator_config(**facts.pop("generator"))
    save_generator(own, bundle.generator, config, facts)
    with chdir(FOLDER):
        wrote = GeneratorBundle.load(TOKEN_BUNDLES / "default").generate(PROMPTS)
        save_file(wrote, TOKEN_BUNDLES / "default.safetensors")


def write_json(path: Path, content: Any) -> None:
    """Write a file of JSON, its keys in order."""
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(main())
