"""Answer `python -m llgbm models list|show|promote|rollback`: a table for people, JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import chain
from typing import TYPE_CHECKING, Any

from tuning.registry import champions
from tuning.registry.champions import Measured, champion_history
from tuning.registry.versions import (
    CHAMPION,
    RegisteredVersion,
    aliases_of,
    all_models,
    existing_versions,
    registry_client,
    resolve,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def list_models(tracking_uri: str | None, name: str | None = None) -> list[dict[str, Any]]:
    """Return a row per version of one model or of all, newest first. Raises UserError for an unknown name or store."""
    with registry_client(tracking_uri) as client:
        if name is not None:
            return _rows(client, name)
        return list(chain.from_iterable(_rows(client, model.name) for model in all_models(client)))


def show_model(tracking_uri: str | None, address: str) -> dict[str, Any]:
    """Return all facts of a version; a bare name means its champion. Raises UserError if there is none."""
    if "/" not in address and "@" not in address:
        address = f"{address}@{CHAMPION}"
    with registry_client(tracking_uri) as client:
        version = resolve(client, address)
        facts = {key.removeprefix("llgbm."): value for key, value in sorted(version.tags.items())}
        per_task = dict(Measured.of(version).per_task)
        facts.pop("val_per_task", None)
        return {
            **_row(version, aliases_of(client, version.name)),
            "description": version.description or "",
            "champions_so_far": champion_history(client, version.name),
            "val_per_task": per_task,
            "facts": facts,
        }


def promote_model(tracking_uri: str | None, address: str) -> dict[str, str]:
    """Make a version the champion. Raises UserError if there is no such version or it is the champion already."""
    with registry_client(tracking_uri) as client:
        return _moved(champions.promote(client, address))


def roll_back_model(tracking_uri: str | None, name: str) -> dict[str, str]:
    """Make the champion before the present one the champion again. Raises UserError if there is none."""
    with registry_client(tracking_uri) as client:
        return _moved(champions.rollback(client, name))


def _moved(version: RegisteredVersion) -> dict[str, str]:
    return {"model": version.name, "version": version.version, "alias": version.alias}


def _rows(client: MlflowClient, name: str) -> list[dict[str, Any]]:
    versions = existing_versions(client, name)
    aliases = aliases_of(client, name)
    return [_row(version, aliases) for version in reversed(versions)]


def _row(version: ModelVersion, aliases: dict[str, str]) -> dict[str, Any]:
    measured, number = Measured.of(version), str(version.version)
    return {
        "model": version.name,
        "version": number,
        "alias": ", ".join(sorted(alias for alias, holder in aliases.items() if holder == number)),
        "configuration": version.tags.get("llgbm.config", ""),
        "metric": measured.metric,
        "score": _rounded(measured.score),
        "study": version.tags.get("llgbm.study", ""),
        "trial": version.tags.get("llgbm.trial_id", ""),
        "registered": datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).isoformat(
            timespec="seconds"
        ),
    }


def _rounded(score: float) -> float | None:
    if not math.isfinite(score):
        return None
    return round(score, 4)


COMMANDS: dict[str, Callable[[str | None, Any], Any]] = {
    "list": list_models,
    "show": show_model,
    "promote": promote_model,
    "rollback": roll_back_model,
}


def as_text(answer: Any) -> str:
    """Format the answer of a command for people: a list as a table, a dictionary as lines."""
    from tabulate import tabulate

    if answer == []:
        return "no generator is registered"
    if isinstance(answer, list):
        return tabulate(answer, headers="keys", disable_numparse=True)
    return tabulate(_lines(answer), tablefmt="plain", disable_numparse=True)


def _lines(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in facts.items():
        if isinstance(value, dict):
            found += _lines({f"{key}: {name}": part for name, part in value.items()})
        elif isinstance(value, list):
            found.append((key, " → ".join(value)))
        else:
            found.append((key, value))
    return found
