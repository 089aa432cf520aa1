"""Compute every id that users' stores and caches are named by, and keep them in `tests/data/ids.json`.

    python tests/held_ids.py            # print what differs from the table; exit status 1 where something does
    python tests/held_ids.py --write    # make the ids of today the held ones

An id that changes makes every trial, bank or delta with the old one be run, trained or measured again. Where that is
meant (a `VERSION` is raised, numbers change), write the table anew and say so in the changelog. None of the ids depends
on the machine: they are of recipes, and of the weights in `tests/data/formats`.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import asdict
from pathlib import Path
from typing import Any

from formats import BASE, DATA, FOLDER, TOPICS
from held import TABLES, compare_or_write

from llgbm.models.cost import BaseShape
from llgbm.models.load import BaseSource, load_base
from llgbm.models.pretrain import PretrainConfig
from llgbm.probes import create_generic_probes
from llgbm.tasks.files import FileSuite
from llgbm.teachers.bank import BankSource
from llgbm.teachers.build import bank_key
from llgbm.teachers.peft import PeftRun, peft_adapter
from llgbm.teachers.train import Run, SFTConfig, TeacherConfig
from llgbm.training import TrainingConfig
from llgbm.world import WorldConfig, base_key, build_world
from tuning.arguments import parse_arguments, study_of
from tuning.studies import STUDIES, Study

TABLE = TABLES / "ids.json"
ANY_BASE = (
    "0" * 16
)  # The hash of a base whose weights are made here differs from processor to processor.
OWN_DATA = "--base base --data data --tasks river stone cloud --held-out tiger"
COMMANDS = (
    *(f"--study {name}{smoke}" for name in STUDIES for smoke in ("", " --smoke")),
    "--model-size micro --seeds 7 --steps 50 --batch-size 8",
    "--generator hyperconv --learning-rate 0.001 0.004 --seeds 0",
    "--lambda-weight 0 0.5 --lambda-delta 0 2 --seeds 0 --encoder base --delta-probes domain",
    "--activation-checkpointing --probe-chunk 4 --seeds 0",
    "--search random --objectives val/accuracy val/delta_cosine --lambda-weight 0.1 0.5 --learning-rate 0.002",
    "--base base --rank 2 --alpha 6 --teacher-steps 9 --teacher-rate 0.001 --seeds 0",
    "--base base --dtype bfloat16 --seeds 0",
    f"{OWN_DATA} --seeds 0",
    f"{OWN_DATA} --seeds 0 --rows 30 --adapters-per-task 2 --smoke",
    f"{OWN_DATA} --seeds 0 --bank bank",
)


def all_ids() -> dict[str, Any]:
    """Return the whole table: by command line, of what a world keeps, and of folders that users make."""
    with chdir(FOLDER), tempfile.TemporaryDirectory() as cache:
        studies = {command: study_of(parse_arguments(command.split())) for command in COMMANDS}
        worlds = {
            world.hash: world_ids(world) for study in studies.values() for world in study.worlds
        }
        return {
            "studies": {command: study_ids(study) for command, study in studies.items()},
            "worlds": worlds,
            "cache": cache_ids(Path(cache)),
            "folders": folder_ids(),
            "defaults": json.loads(json.dumps(default_settings())),
        }


def study_ids(study: Study) -> dict[str, Any]:
    """Return the ids of a study, of its trials by name and seed, and of its worlds; of a search one point's trials."""
    trials = list(study.trials)
    if study.space is not None:
        trials += study.space.trials(
            {name: math.sqrt(low * high) for name, (low, high) in study.space.ranges.items()}
        )
    return {
        "study": study.id,
        "trials": {trial.label: trial.id for trial in trials},
        "worlds": [world.hash for world in study.worlds],
    }


def world_ids(world: WorldConfig) -> dict[str, str]:
    """Return what the parts of a world are named by, without building any."""
    return {
        "size": world.size,
        "suite": world.suite.fingerprint,
        "base": base_key(world) if world.base is None else world.base.hash,
        "bank": bank_key(ANY_BASE, world.suite, world.teachers)
        if world.bank is None
        else world.bank.hash,
    }


def cache_ids(cache: Path) -> dict[str, list[str]]:
    """Build a world on base and bank of the fixtures; return the names of all that is cached then.

    Baselines are left out: they are named by the weights of a multi-task LoRA, which differ between processors.
    """
    teachers = TeacherConfig(1, 2.0, steps=1, examples=1)
    river, stone, cloud = TOPICS[:3]
    for encoder in ("minilm", "base"):
        config = WorldConfig(
            "base-base",
            FileSuite.open(DATA, [river], [stone], [cloud]),
            teachers=teachers,
            encoder=encoder,
            eval_examples=2,
            base=BaseSource.find(str(BASE)),
            bank=BankSource.find("bank"),
        )
        build_world(cache, config, "cpu")
    kinds = (kind for kind in sorted(cache.iterdir()) if kind.is_dir())
    return {kind.name: sorted(entries(kind)) for kind in kinds}


def default_settings() -> dict[str, Any]:
    """Return all fields of the default configurations: ids leave them out, so that a changed default shows here."""
    configs = (TrainingConfig(), PretrainConfig(), TeacherConfig(), SFTConfig())
    found = {type(config).__name__: asdict(config) for config in configs}
    world = asdict(WorldConfig())
    # Its content is that of a package, whose version is pinned elsewhere.
    del world["encoder_hash"]
    return {**found, "WorldConfig": world}


def entries(kind: Path) -> Iterator[str]:
    """Yield the names of the entries of one kind in a cache."""
    return (entry.name for entry in kind.iterdir() if not entry.name.startswith("."))


def folder_ids() -> dict[str, str]:
    """Return the hashes of bases, banks, probes and shapes, and the name of the state of a teacher in training."""
    base = load_base(BASE)
    config = SFTConfig(TeacherConfig(1, 2.0, per_task=2, steps=20, examples=2))
    suite = FileSuite.open(DATA, TOPICS)
    spec = BankSource.find("bank").open(base, FileSuite.open(DATA, TOPICS[:3])).spec
    with peft_adapter(base, spec) as model:
        state = PeftRun(
            Run(TOPICS[0], 0, config, suite, base), model, spec, BaseShape.of(base.model, spec)
        ).key
    return {
        "base": BaseSource.find(str(BASE)).hash,
        "base in bfloat16": BaseSource.find(str(BASE), "bfloat16").hash,
        "bank": BankSource.find("bank").hash,
        "two tasks of the bank": BankSource.find("bank")
        .open(base, FileSuite.open(DATA, TOPICS[:2]))
        .hash,
        "shapes": spec.hash,
        "generic probes": create_generic_probes().hash,
        "state of a teacher": state,
    }


if __name__ == "__main__":
    sys.exit(compare_or_write(TABLE, all_ids(), __doc__))
