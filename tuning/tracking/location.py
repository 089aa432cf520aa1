"""Find a local store's artifacts beside its database, wherever the two were moved or copied to.

MLflow keeps the absolute address of every run's artifacts in the database. A folder that is renamed or copied would go
on reading and writing at the old place.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

ARTIFACTS = "artifacts"  # the folder beside the database
SCHEME = "file://"
# Columns of MLflow's tables that hold addresses of artifacts.
COLUMNS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}


def artifacts_beside(database: Path) -> str:
    """Return the address of the artifacts of a local store."""
    return (database.parent / ARTIFACTS).as_uri()


def follow_move(database: Path) -> None:
    """Make a store that was moved or copied name the artifacts beside it.

    Nothing changes if there are none, as for the copy of a database alone, or where an experiment keeps its artifacts
    elsewhere by intention: not in a folder of this name. Raises sqlite3.Error if the database cannot be changed.
    """
    if not (database.parent / ARTIFACTS).is_dir() or not database.is_file():
        return
    here = artifacts_beside(database)
    with closing(sqlite3.connect(database, timeout=30)) as connection, connection:
        for old in _other_places(connection, here):
            for table, columns in COLUMNS.items():
                for column in set(columns) & _columns(connection, table):
                    _replace_prefix(connection, table, column, old, here)


def _other_places(connection: sqlite3.Connection, here: str) -> Iterator[str]:
    if "artifact_location" not in _columns(connection, "experiments"):
        return
    for (place,) in connection.execute("SELECT artifact_location FROM experiments").fetchall():
        if place and place.startswith(SCHEME) and place.endswith(f"/{ARTIFACTS}") and place != here:
            yield place


def _columns(connection: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}


def _replace_prefix(
    connection: sqlite3.Connection, table: str, column: str, old: str, new: str
) -> None:
    connection.execute(
        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
        f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
        (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
    )
