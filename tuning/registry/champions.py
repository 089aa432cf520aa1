"""Which version of a registered generator is the champion, why, and who was it before.

A new version becomes `champion` only if the paired test on the same validation tasks says that it is better; else it
is the `challenger`, and its description says how the comparison went. Figures by task are kept with the version, so
the run that they are from may be deleted. The order of champions is kept in a tag of the model, for `rollback`; the
alias itself is the truth, and a list that was left behind by a kill is cut back to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llgbm.runtime import UserError
from tuning.registry.versions import (
    CHALLENGER,
    CHAMPION,
    RegisteredVersion,
    aliases_of,
    by_alias,
    existing_versions,
    resolve,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

SCORE_TAG = "llgbm.val_score"
METRIC_TAG = "llgbm.val_metric"
DATA_TAG = "llgbm.val_data"
PER_TASK_TAG = "llgbm.val_per_task"
SETTLED_TAG = "llgbm.registered_as"
HISTORY_TAG = "llgbm.champions"
HISTORY_LENGTH = 200


@dataclass(frozen=True)
class Measured:
    """A version with what is known of it on its validation data; empty where nothing was kept."""

    version: str
    score: float
    metric: str
    val_data: str
    per_task: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, version: ModelVersion) -> Measured:
        """Read it off the tags of a version."""
        tags = version.tags
        return cls(
            str(version.version),
            float(tags.get(SCORE_TAG, "nan")),
            tags.get(METRIC_TAG, ""),
            tags.get(DATA_TAG, ""),
            json.loads(tags.get(PER_TASK_TAG, "{}")),
        )


@dataclass(frozen=True)
class Decision:
    """The alias that a version deserves, and one sentence that says why."""

    alias: str
    reason: str


def decide_alias(champion: Measured | None, new: Measured) -> Decision:
    """`champion` if there is none yet or the paired test over validation tasks says better, else `challenger`."""
    if champion is None:
        return Decision(CHAMPION, "There was no champion before.")
    named = f"The champion at that time, version {champion.version},"
    why_not = _not_comparable(champion, new)
    if why_not:
        return Decision(CHALLENGER, f"{named} {why_not}: the two cannot be compared.")
    from tuning.significance import paired_comparison  # SciPy takes a second

    test = paired_comparison(new.per_task, champion.per_task)
    alias = CHAMPION if test.is_better else CHALLENGER
    return Decision(
        alias, f"{named} had {new.metric} = {champion.score:.4f}; this one is {test.verdict}."
    )


def _not_comparable(champion: Measured, new: Measured) -> str:
    if champion.val_data != new.val_data:
        return f"was measured on other validation data ({champion.val_data or 'unknown'})"
    if champion.metric != new.metric:
        return f"was chosen by another metric ({champion.metric or 'unknown'})"
    if champion.per_task.keys() != new.per_task.keys() or not new.per_task:
        return "kept no figures of the same validation tasks"
    return ""


def settle(client: MlflowClient, name: str, version: ModelVersion, introduction: str) -> str:
    """Give a new version its alias and say why in its description; return the alias that it was registered as.

    A version that was settled before keeps what it has; one whose settling was cut short is settled again.
    """
    number = str(version.version)
    if SETTLED_TAG in version.tags:
        return version.tags[SETTLED_TAG]
    champion = by_alias(client, name, CHAMPION)
    if champion is not None and str(champion.version) == number:
        decision = Decision(CHAMPION, "")
    else:
        decision = decide_alias(Measured.of(champion) if champion else None, Measured.of(version))
        text = f"{introduction} Registered as {decision.alias}. {decision.reason}"
        client.update_model_version(name, number, description=text)
    give_alias(client, name, number, decision.alias)
    client.set_model_version_tag(name, number, SETTLED_TAG, decision.alias)
    return decision.alias


def give_alias(client: MlflowClient, name: str, number: str, alias: str) -> None:
    """Move an alias to a version; a new champion is a challenger no more and is noted in the history first."""
    aliases = aliases_of(client, name)
    if alias == CHAMPION and aliases.get(CHALLENGER) == number:
        client.delete_registered_model_alias(name, CHALLENGER)
    if alias == CHAMPION and aliases.get(CHAMPION) != number:
        _write_history(client, name, [*champion_history(client, name), number])
    client.set_registered_model_alias(name, alias, number)


def champion_history(client: MlflowClient, name: str) -> list[str]:
    """Versions in the order in which they became champion, the present one last; empty if there is no champion."""
    model = client.get_registered_model(name)
    present = str(model.aliases.get(CHAMPION, ""))
    if not present:
        return []
    known = json.loads(model.tags.get(HISTORY_TAG, "[]"))
    if present not in known:
        return [*known, present]
    return known[: len(known) - known[::-1].index(present)]


def _write_history(client: MlflowClient, name: str, history: list[str]) -> None:
    client.set_registered_model_tag(name, HISTORY_TAG, json.dumps(history[-HISTORY_LENGTH:]))


def promote(client: MlflowClient, address: str) -> RegisteredVersion:
    """Make the version at `name/3` or `name@challenger` the champion, whatever the numbers say.

    Raises UserError if there is no such version or it is the champion already.
    """
    version = resolve(client, address)
    number = str(version.version)
    if aliases_of(client, version.name).get(CHAMPION) == number:
        raise UserError(
            f"version {number} of {version.name!r} is the champion already: name another version."
        )
    give_alias(client, version.name, number, CHAMPION)
    return RegisteredVersion(version.name, number, CHAMPION)


def rollback(client: MlflowClient, name: str) -> RegisteredVersion:
    """Give the alias back to the champion before the present one; versions deleted since are passed over.

    Raises UserError if there is no such model or no earlier champion.
    """
    there = {str(version.version) for version in existing_versions(client, name)}
    history = champion_history(client, name)
    earlier = [number for number in history[:-1] if number in there and number != history[-1]]
    if not earlier:
        raise UserError(
            f"model {name!r} has no earlier champion to go back to: use `models promote`."
        )
    client.set_registered_model_alias(name, CHAMPION, earlier[-1])
    _write_history(client, name, earlier)
    return RegisteredVersion(name, earlier[-1], CHAMPION)
