"""Name the fixtures of file formats, and copy them to where a test can use them."""

from __future__ import annotations

import gzip
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from tuning.report import StudyRecord

FOLDER = Path(__file__).parent / "data" / "formats"
# Relative to a copy of FOLDER, which is the current folder of whatever reads them.
BASE, DATA, STORE = Path("base"), Path("data"), Path("store")
# Of the first format, which did not say so, and of today.
OLDER_BUNDLES, BUNDLES = Path("bundles"), Path("bundles-2")
# Of the format of generators that read anything but vectors of prompts.
TOKEN_BUNDLES = Path("bundles-3")
# The same entries as version 0.1.0 named them, and under the names of today.
OLDER_CACHE, CACHE = Path("cache"), Path("cache-2")
TOPICS = ("river", "stone", "cloud", "tiger")
PROMPTS = ["What follows river number 3?", "What follows river number 4?"]
ROOT_MARK = "{the folder that the store was made in}"
ARGUMENTS = (
    "--study study.py:tiny --base base --data data --tasks river stone cloud --held-out tiger --rank 1 "
    "--teacher-rate 0.05 --adapters-per-task 1 --encoder base --smoke --seeds 0 --steps 20 --learning-rate 0.02"
).split()


def restore_store(folder: Path) -> Path:
    """Copy the fixtures to `folder` and make the store's database there again; return the database."""
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
    shutil.move(folder / STORE / "mlruns", folder / "mlruns")
    for path in (path for path in (folder / "mlruns").rglob("*") if path.is_file()):
        path.write_bytes(path.read_bytes().replace(ROOT_MARK.encode(), str(folder).encode()))
    statements = gzip.decompress((folder / STORE / "mlflow.sql.gz").read_bytes()).decode()
    database = folder / "mlruns" / "mlflow.db"
    with closing(sqlite3.connect(database)) as connection:
        connection.executescript(statements.replace(ROOT_MARK, str(folder)))
    return database


def shown_numbers(record: StudyRecord) -> dict[str, Any]:
    """Return the numbers that a report is made of: those of trials and of baselines."""
    trials = {
        trial.trial_id: {
            "config": trial.config,
            "seed": trial.seed,
            "status": trial.status,
            "metrics": dict(trial.metrics),
            "loss": trial.curves["loss/total"],
            "by_task": dict(record.by_task[trial.run_id]),
        }
        for trial in record.trials
    }
    return {"trials": trials, "baselines": dict(record.baselines)}
