"""Address, look up and download registered models by name, alias and version."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llgbm.runtime import UserError
from tuning.tracking.address import chosen_uri, reap_all
from tuning.tracking.store import (
    all_pages,
    connect,
    quiet_mlflow,
    redact,
    sqlite_path,
    store_errors,
    usable_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

CHAMPION, CHALLENGER = "champion", "challenger"
ORIGIN_FILE = "origin.json"
REGISTERED = "llgbm.registered"
LINEAGE_TAGS = (
    *("llgbm.study", "llgbm.study_id", "llgbm.trial_id", "llgbm.config"),
    REGISTERED,
)
MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class RegisteredVersion:
    """Version of a registered generator, with the alias that it was given."""

    name: str
    version: str
    alias: str

    @property
    def uri(self) -> str:
        """Return the address that `fetch_bundle` and `mlflow.pyfunc.load_model` take."""
        return f"models:/{self.name}/{self.version}"


@contextmanager
def registry_client(tracking_uri: str | None) -> Iterator[MlflowClient]:
    """Open a client of a store, by default of MLFLOW_TRACKING_URI or else of the current folder.

    Raises UserError if there is no such store, and for any error of the store within the block.
    """
    uri = chosen_uri(tracking_uri)
    quiet_mlflow()
    if uri.startswith("sqlite:") and not sqlite_path(uri).is_file():
        raise UserError(
            f"there is no MLflow store at {uri}: give the address of the one you registered in "
            "with --tracking-uri, or run this in the folder of the study."
        )
    uri = usable_uri(uri)
    reap_all(uri)
    with store_errors(uri):
        yield connect(uri)


def check_name(name: str) -> None:
    """Raise UserError unless a model may be called so."""
    if not re.fullmatch(r"[\w.\- ]+", name):
        raise UserError(
            f"a model cannot be named {name!r}: use letters, digits, spaces and the characters . _ -"
        )


def all_models(client: MlflowClient) -> list[RegisteredModel]:
    """Return all registered models, sorted by name."""
    found = all_pages(lambda token: client.search_registered_models(page_token=token))
    return sorted(found, key=lambda model: model.name)


def versions_of(client: MlflowClient, name: str) -> list[ModelVersion]:
    """Return the versions of a model, oldest first; none if there is no such model."""
    found = all_pages(
        lambda token: client.search_model_versions(f"name = '{name}'", page_token=token)
    )
    return sorted(found, key=lambda version: int(version.version))


def aliases_of(client: MlflowClient, name: str) -> dict[str, str]:
    """Return version by alias. The model must exist."""
    return {
        alias: str(number) for alias, number in client.get_registered_model(name).aliases.items()
    }


def by_alias(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """Return the version under an alias, None if there is no such model or alias."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if "not found" in str(error):
            return None
        raise


def resolve(client: MlflowClient, address: str) -> ModelVersion:
    """Return the version at `models:/name@alias` or `models:/name/3`; the prefix `models:/` is optional.

    Raises UserError that names the existing versions and aliases if there is no such version.
    """
    parts = MODEL_URI.fullmatch(f"models:/{address.removeprefix('models:/')}")
    if parts is None:
        raise UserError(
            f"{address!r} is no model address: write models:/name@alias, models:/name/version or a folder."
        )
    name, alias = parts["name"], parts["alias"]
    versions = {str(found.version): found for found in existing_versions(client, name)}
    aliases = aliases_of(client, name)
    wanted = aliases.get(alias or "", parts["version"] or "")
    if wanted in versions:
        return versions[wanted]
    asked = f"version {wanted}"
    if alias:
        asked = f"alias {alias!r}"
    raise UserError(
        f"model {name!r} has no {asked}: it has the versions {', '.join(versions)} and the aliases "
        f"{', '.join(sorted(aliases)) or 'none'}."
    )


def existing_versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    """Return the versions of a model, oldest first. Raises UserError that names the known models if it has none."""
    check_name(name)
    versions = versions_of(client, name)
    if not versions:
        known = ", ".join(model.name for model in all_models(client)) or "none at all"
        raise UserError(f"{redact(client.tracking_uri)} has no model {name!r}: it has {known}.")
    return versions


def download(client: MlflowClient, version: ModelVersion, folder: Path) -> Path:
    """Copy the files of a version to a new folder below `folder` and return it."""
    from mlflow.artifacts import download_artifacts

    # MLflow's own models:/ addresses ask the process-wide registry, whatever store is named.
    source = client.get_model_version_download_uri(version.name, str(version.version))
    own = Path(tempfile.mkdtemp(dir=folder))
    download_artifacts(source, dst_path=str(own), tracking_uri=client.tracking_uri)
    return own


def note_origin(bundle: Path, tags: Mapping[str, str]) -> None:
    """Write beside a bundle what tags say of its origin, for the lineage of its adapters."""
    known = {tag.removeprefix("llgbm."): tags[tag] for tag in LINEAGE_TAGS if tags.get(tag)}
    (bundle / ORIGIN_FILE).write_text(json.dumps(known, indent=1, sort_keys=True))
