"""Fetch registered generators.

A copy in the temporary folder has a lock beside it, held for as long as its process lives. A process that is killed
deletes nothing; the next fetch finds its lock free and deletes the copy.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from filelock import FileLock, Timeout

from llgbm.runtime import UserError
from tuning.registry.versions import REGISTERED, download, note_origin, registry_client, resolve

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from llgbm.generator.bundle import GeneratorBundle

BUNDLE_FILE = "generator.json"
COPY, LOCK = "llgbm-generator-", ".lock"


def fetch_bundle(uri: str, tracking_uri: str | None) -> Path:
    """Return the folder with `generator.json` of `models:/name@alias`, `models:/name/3` or a local folder.

    `tracking_uri` None means MLFLOW_TRACKING_URI, or else the store of the current folder. A registered bundle is
    copied to a folder that is deleted when the process ends. Raises UserError if the model, version, alias or folder
    does not exist.
    """
    if not uri.startswith("models:"):
        return checked(Path(uri).expanduser(), uri)
    folder = _own_folder()
    try:
        return _fetch(uri, tracking_uri, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def load_bundle(uri: str, tracking_uri: str | None) -> GeneratorBundle:
    """Load the generator that `fetch_bundle` would copy, and keep no copy. Raises UserError as that."""
    from llgbm.generator.bundle import GeneratorBundle

    if not uri.startswith("models:"):
        return GeneratorBundle.load(fetch_bundle(uri, tracking_uri))
    with tempfile.TemporaryDirectory(prefix=COPY) as folder:
        return GeneratorBundle.load(_fetch(uri, tracking_uri, Path(folder)))


def _fetch(uri: str, tracking_uri: str | None, folder: Path) -> Path:
    with registry_client(tracking_uri) as client:
        version = resolve(client, uri)
        bundle = bundle_of(client, version, folder)
        note_origin(bundle, {**version.tags, REGISTERED: f"{version.name}/{version.version}"})
        return bundle


def _own_folder() -> Path:
    """Make a temporary folder that is deleted when the process ends; delete those of processes that were killed."""
    place = Path(tempfile.gettempdir())
    for file in place.glob(f"{COPY}*{LOCK}"):
        _delete_left(file)
    folder = place / f"{COPY}{uuid4().hex}"
    lock = FileLock(folder.with_suffix(LOCK))
    lock.acquire()
    folder.mkdir(mode=0o700)
    atexit.register(_delete, folder, lock)
    return folder


def _delete_left(file: Path) -> None:
    """Delete a copy whose lock is free; one that is in use, or another user's, stays."""
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except (Timeout, OSError):
        return
    _delete(file.with_suffix(""), lock)


def _delete(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def bundle_of(client: MlflowClient, version: ModelVersion, folder: Path) -> Path:
    """Copy the files of a version below a folder; return the folder of its bundle. Raises UserError if it has none."""
    own = download(client, version, folder)
    bundles = [path.parent for path in sorted(own.rglob(BUNDLE_FILE))]
    return checked(next(iter(bundles), own), f"models:/{version.name}/{version.version}")


def checked(folder: Path, asked: str) -> Path:
    """Return a folder. Raises UserError unless it holds a generator."""
    if not (folder / BUNDLE_FILE).is_file():
        raise UserError(
            f"{asked!r} holds no generator ({BUNDLE_FILE} is missing): give a folder that `llgbm` wrote, or "
            "models:/name@alias."
        )
    return folder
