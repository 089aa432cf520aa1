"""Carry a study from one store to another as a file: its runs, their artifacts and its registered versions.

The file is a ZIP archive of `study.json` and `artifacts/<run id>/…`, `versions/<number>/…`. Curves keep their steps and
times. In the new store the runs have new ids; what refers to a run is renamed.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from llgbm.runtime import UserError, content_hash, say
from llgbm.system.documents import check_format
from llgbm.system.output import disk_errors
from tuning.tracking.curves import read_points
from tuning.tracking.ownership import DRIVER_TAG, HOLD_TAG
from tuning.tracking.runs import (
    CONFIG_TAG,
    FINAL_STATUSES,
    MEMBER_TAG,
    METRICS_PER_CALL,
    PARAMS_PER_CALL,
    PARENT_TAG,
    STUDY_ID_TAG,
    SUPERSEDED_TAG,
    TRIAL_TAG,
    chunks,
    find_runs,
    find_study,
    trial_run,
)
from tuning.tracking.store import connect, existing_uri, store_errors
from tuning.tracking.study import StudyTracker

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

FORMAT_VERSION = 1
FORMAT = "llgbm study"
CONTENT = "study.json"
# Of MLflow's own tags, those that describe a run; the others are of the process that made it.
KEPT_TAGS = ("mlflow.note.content", "mlflow.runName", PARENT_TAG)


def export_study(
    tracking_uri: str, asked: str, out: Path, experiment: str | None = None
) -> dict[str, Any]:
    """Write a study into a new file; return what it holds.

    Raises UserError if there is no such study, the file exists or cannot be written, or the store fails.
    """
    if out.exists():
        raise UserError(f"{out} exists: give the name of a new file with --out")
    uri = existing_uri(tracking_uri)
    parent = find_study(uri, asked, experiment)
    aside = out.with_name(f".{out.name}.writing")
    with disk_errors(out.parent), store_errors(uri), tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
                content = _pack(connect(uri), parent, archive, Path(folder))
            os.replace(aside, out)
        finally:
            aside.unlink(missing_ok=True)
    return _summary(content)


def _pack(
    client: MlflowClient, parent: Run, archive: zipfile.ZipFile, folder: Path
) -> dict[str, Any]:
    experiment_id, run_id = parent.info.experiment_id, parent.info.run_id
    own = list(find_runs(client, experiment_id, {PARENT_TAG: run_id}))
    shared = list(find_runs(client, experiment_id, {MEMBER_TAG + run_id: None}))
    runs = list({run.info.run_id: run for run in (parent, *own, *shared)}.values())
    points = read_points(client, runs)
    for run in runs:
        _pack_folder(client, run.info.run_id, archive, folder)
    versions = _versions_of(client, parent.data.tags[STUDY_ID_TAG])
    packed = [_pack_version(client, one, archive, folder) for one in versions]
    content = {
        "format": f"{FORMAT} {FORMAT_VERSION}",
        "parent": run_id,
        "experiment": client.get_experiment(experiment_id).name,
        "runs": [_described(run, points[run.info.run_id]) for run in runs],
        "versions": [one for one in packed if one is not None],
    }
    archive.writestr(CONTENT, json.dumps(content))
    return content


def _pack_folder(client: MlflowClient, run_id: str, archive: zipfile.ZipFile, folder: Path) -> None:
    own = folder / content_hash(run_id)  # a store may give a run any id
    own.mkdir()
    for item in client.list_artifacts(run_id):
        client.download_artifacts(run_id, item.path, str(own))
    _add(archive, own, f"artifacts/{run_id}")


def _add(archive: zipfile.ZipFile, folder: Path, name: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            archive.write(path, f"{name}/{path.relative_to(folder).as_posix()}")


def _versions_of(client: MlflowClient, study_id: str) -> list[ModelVersion]:
    from tuning.registry.versions import all_models, versions_of

    found = []
    for model in all_models(client):
        versions = versions_of(client, model.name)
        found += [one for one in versions if one.tags.get(STUDY_ID_TAG) == study_id]
    return found


def _pack_version(
    client: MlflowClient, version: ModelVersion, archive: zipfile.ZipFile, folder: Path
) -> dict[str, Any] | None:
    """Pack a version; return None if its files are gone, which must not cost the rest."""
    from mlflow.exceptions import MlflowException

    from tuning.registry.fetch import bundle_of

    name = f"versions/{version.name}-{version.version}"
    try:
        bundle = bundle_of(client, version, folder)
    except (UserError, MlflowException, OSError):
        say(f"the files of {version.name} version {version.version} are gone: it is left out")
        return None
    _add(archive, bundle, name)
    return {"name": version.name, "folder": name, "run": version.run_id, "tags": dict(version.tags)}


def _described(run: Run, points: Mapping[str, list[tuple[int, int, float]]]) -> dict[str, Any]:
    info = run.info
    return {
        "id": info.run_id,
        "name": info.run_name,
        "status": info.status,
        "start": info.start_time,
        "end": info.end_time,
        "params": dict(run.data.params),
        "tags": {key: value for key, value in run.data.tags.items() if _is_kept(key)},
        "metrics": dict(points),
    }


def _is_kept(tag: str) -> bool:
    if tag.startswith((DRIVER_TAG, HOLD_TAG)):
        return False
    return tag in KEPT_TAGS or not tag.startswith("mlflow.")


def _summary(content: Mapping[str, Any]) -> dict[str, Any]:
    (parent,) = [run for run in content["runs"] if run["id"] == content["parent"]]
    return {
        "study": parent["tags"][STUDY_ID_TAG],
        "trials": len(content["runs"]) - 1,
        "versions": len(content["versions"]),
    }


def import_study(
    tracking_uri: str | None, file: Path, root: Path, experiment: str | None = None
) -> dict[str, Any]:
    """Bring a study from a file into a store, SQLite or server; return what was imported.

    A trial that the store has already is shared and not doubled. What an import that was killed left behind counts
    nowhere. Raises UserError if the file is no export, the store has the study already, or the store fails.
    """
    with _opened(file) as archive:
        content = _read(archive, file)
        tracker = StudyTracker.open(tracking_uri, root, experiment or content["experiment"])
        study_id = _summary(content)["study"]
        if tracker.studies(study_id):
            raise UserError(f"the store has study {study_id} already: nothing was imported")
        with store_errors(tracker.tracking_uri), tempfile.TemporaryDirectory() as folder:
            archive.extractall(folder)
            ids = _make_runs(tracker, content, Path(folder))
            for version in content["versions"]:
                _register(tracker, version, ids, Path(folder))
    return _summary(content)


def _opened(file: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} cannot be read as an exported study ({error})") from error


def _read(archive: zipfile.ZipFile, file: Path) -> dict[str, Any]:
    """Return the description. Raises UserError unless the archive is whole and stays in its folder."""
    try:
        content = json.loads(archive.read(CONTENT))
        known = {run["id"] for run in content["runs"]}
        kind, _, version = content["format"].rpartition(" ")
        check_format(int(version), FORMAT_VERSION, str(file))
        whole = kind == FORMAT and content["parent"] in known
        whole = whole and all(map(_is_whole, content["runs"]))
        folders = [str(PurePosixPath("artifacts", run_id)) for run_id in known]
        folders += [version["folder"] for version in content["versions"]]
        _summary(content)
    except UserError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is no exported study of this program ({error!r})") from error
    if not whole or not all(map(_stays_inside, [*archive.namelist(), *folders])):
        raise UserError(f"{file} is no exported study of this program")
    damaged = archive.testzip()
    if damaged:
        raise UserError(f"{file} is damaged at {damaged}: export the study again")
    return content


def _is_whole(run: Mapping[str, Any]) -> bool:
    """Return True if a run has all that describes one, in the right kinds."""
    texts = (run["id"], run["name"], run["status"], *run["tags"].values(), *run["params"].values())
    points = chain.from_iterable(run["metrics"].values())
    numbers = (run["start"], run["end"] or 0, *chain.from_iterable(points))
    known = run["status"] in (*FINAL_STATUSES, "RUNNING", "SCHEDULED")
    return known and _are(str, texts) and _are((int, float), numbers)


def _are(kinds: type | tuple[type, ...], values: Iterable[Any]) -> bool:
    return all(isinstance(value, kinds) for value in values)


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _make_runs(tracker: StudyTracker, content: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Make the runs, superseded until all are whole; return new ids by old."""
    ordered = sorted(content["runs"], key=lambda run: run["id"] != content["parent"])
    ids: dict[str, str] = {}
    made: list[str] = []
    for run in ordered:
        known = _known_trial(tracker, run)
        if known is None:
            ids[run["id"]] = _make_run(tracker, run, ids, folder)
            made.append(ids[run["id"]])
        else:
            ids[run["id"]] = known.info.run_id
    for run in ordered:
        _share(tracker, run, content["parent"], ids, made)
    # The study is the last to count: until then nothing of it is found.
    for run_id in reversed(made):
        tracker.client.delete_tag(run_id, SUPERSEDED_TAG)
    for run in ordered:
        if SUPERSEDED_TAG in run["tags"] and ids[run["id"]] in made:
            tracker.client.set_tag(ids[run["id"]], SUPERSEDED_TAG, run["tags"][SUPERSEDED_TAG])
    return ids


def _known_trial(tracker: StudyTracker, run: Mapping[str, Any]) -> Run | None:
    """Return the store's own run of a trial, if it has one that finished."""
    trial_id = run["tags"].get(TRIAL_TAG)
    if trial_id is None or SUPERSEDED_TAG in run["tags"]:
        return None
    found = trial_run(tracker.client, tracker.experiment_id, trial_id)
    if found is None or found.info.status != "FINISHED":
        return None
    return found


def _make_run(
    tracker: StudyTracker, run: Mapping[str, Any], ids: Mapping[str, str], folder: Path
) -> str:
    from mlflow.entities import Metric, Param

    client = tracker.client
    tags = {key: value for key, value in run["tags"].items() if not key.startswith(MEMBER_TAG)}
    if PARENT_TAG in tags:
        # The parent comes first; it takes the trials of studies that are not in the file, too.
        tags[PARENT_TAG] = next(iter(ids.values()))
    tags[SUPERSEDED_TAG] = "being imported"
    made = client.create_run(tracker.experiment_id, run["start"], tags, run["name"])
    run_id = made.info.run_id
    for part in chunks([Param(*pair) for pair in run["params"].items()], PARAMS_PER_CALL):
        client.log_batch(run_id, params=part)
    points = [
        Metric(key, value, time, step)
        for key, curve in run["metrics"].items()
        for step, time, value in curve
    ]
    for batch in chunks(points, METRICS_PER_CALL):
        client.log_batch(run_id, metrics=batch)
    artifacts = folder / "artifacts" / run["id"]
    if artifacts.is_dir():
        client.log_artifacts(run_id, str(artifacts))
    # A run that was going on where it came from is carried on by nobody here.
    status = {"RUNNING": "KILLED", "SCHEDULED": "KILLED"}.get(run["status"], run["status"])
    client.set_terminated(run_id, status, run["end"])
    return run_id


def _share(
    tracker: StudyTracker,
    run: Mapping[str, Any],
    parent: str,
    ids: Mapping[str, str],
    made: Sequence[str],
) -> None:
    """Make a run count in the imported study that another study of the store made, or that was shared before."""
    name = run["tags"].get(MEMBER_TAG + parent)
    if ids[run["id"]] not in made:
        name = name or run["tags"].get(CONFIG_TAG, run["name"])
    if name is not None:
        tracker.client.set_tag(ids[run["id"]], MEMBER_TAG + ids[parent], name)


def _register(
    tracker: StudyTracker, version: Mapping[str, Any], ids: Mapping[str, str], folder: Path
) -> None:
    from tuning.registry.champions import Measured
    from tuning.registry.register import Score, register_generator

    run_id = ids.get(version["run"])
    bundle = folder / version["folder"]
    if run_id is None or not bundle.is_dir():
        say(f"version of {version['name']} is left out: its run is not of this study")
        return
    figures = Measured.from_tags("", version["tags"])
    score = Score(figures.score, figures.metric, figures.per_task)
    kept = {key: value for key, value in version["tags"].items() if key != "llgbm.registered_as"}
    made = register_generator(tracker.tracking_uri, run_id, bundle, version["name"], kept, score)
    say(f"registered {made.name} version {made.version} as {made.alias}")
