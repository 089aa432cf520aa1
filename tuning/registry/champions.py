"""Decide which version of a registered generator is the champion, and keep the order of champions.

A new version becomes `champion` if its validation score is above that of the best baseline, and if the paired test on
the same validation tasks shows that it is better than the champion, the selection of the new one among its study's
trials accounted for. Otherwise it is the `challenger`, and its description says why. Figures by task are kept with the
version and those of the champion with the model too, so that run and version may be deleted. The order of champions
is a tag of the model, for `rollback`; the alias is authoritative, and entries that a kill left after it are cut off.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llgbm.runtime import UserError
from tuning.registry.turns import turn
from tuning.registry.versions import (
    CHALLENGER,
    CHAMPION,
    RegisteredVersion,
    aliases_of,
    by_alias,
    existing_versions,
    resolve,
)
from tuning.tracking.runs import finite

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

SCORE_TAG = "llgbm.val_score"
METRIC_TAG = "llgbm.val_metric"
DATA_TAG = "llgbm.val_data"
PER_TASK_TAG = "llgbm.val_per_task"
FIGURE_TAGS = (SCORE_TAG, METRIC_TAG, DATA_TAG, PER_TASK_TAG)
SETTLED_TAG = "llgbm.registered_as"
HISTORY_TAG = "llgbm.champions"
LAST_CHAMPION_TAG = "llgbm.last_champion"
HISTORY_LENGTH = 200
TAG_LENGTH = 5000  # of a model's tag, in MLflow's databases


@dataclass(frozen=True)
class Measured:
    """Version with its figures on validation data; empty if none were kept."""

    version: str
    score: float
    metric: str
    val_data: str
    per_task: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, version: ModelVersion) -> Measured:
        """Read the figures from the tags of a version."""
        return cls.from_tags(str(version.version), version.tags)

    @classmethod
    def from_tags(cls, version: str, tags: Mapping[str, str]) -> Measured:
        """Read the figures from tags."""
        return cls(
            version,
            float(tags.get(SCORE_TAG, "nan")),
            tags.get(METRIC_TAG, ""),
            tags.get(DATA_TAG, ""),
            finite(json.loads(tags.get(PER_TASK_TAG, "{}"))),
        )


@dataclass(frozen=True)
class Rivals:
    """Rivals of a new version: the other candidates of its study, and the best baseline.

    `candidates` are values by task of the trials that the new one was picked from; `baseline` is a name and its score
    on validation tasks, None if baselines do not count (smoke runs).
    """

    candidates: Sequence[Mapping[str, float]] = ()
    baseline: tuple[str, float] | None = None


@dataclass(frozen=True)
class Decision:
    """Alias of a new version, and one sentence that gives the reason."""

    alias: str
    reason: str


def decide_alias(champion: Measured | None, new: Measured, rivals: Rivals = Rivals()) -> Decision:
    """Return `champion` for a version that is above the best baseline and better than the champion, if there is one.

    A score that is not finite makes no champion.
    """
    if not math.isfinite(new.score):
        return Decision(CHALLENGER, f"Its {new.metric} is {new.score}.")
    if rivals.baseline is not None and not new.score > rivals.baseline[1]:
        name, score = rivals.baseline
        return Decision(
            CHALLENGER,
            f"Its {new.metric} is not above that of the best baseline, {name} ({score:.4f}).",
        )
    if champion is None:
        return Decision(CHAMPION, "There was no champion before.")
    named = f"The champion at that time, version {champion.version},"
    why_not = _not_comparable(champion, new)
    if why_not:
        return Decision(CHALLENGER, f"{named} {why_not}: the two cannot be compared.")
    from tuning.significance import paired_comparison  # SciPy takes a second to import

    test = paired_comparison(new.per_task, champion.per_task, rivals.candidates)
    reason = f"{named} had {new.metric} = {champion.score:.4f}; this one is {test.verdict}."
    if test.is_better:
        return Decision(CHAMPION, reason)
    return Decision(CHALLENGER, reason)


def _not_comparable(champion: Measured, new: Measured) -> str:
    if champion.val_data != new.val_data:
        return f"was measured on other validation data ({champion.val_data or 'unknown'})"
    if champion.metric != new.metric:
        return f"was chosen by another metric ({champion.metric or 'unknown'})"
    if champion.per_task.keys() != new.per_task.keys() or not new.per_task:
        return "kept no figures of the same validation tasks"
    return ""


def settle(
    client: MlflowClient, name: str, version: ModelVersion, introduction: str, rivals: Rivals
) -> str:
    """Give a new version its alias and the reason as description; return the alias that it was registered as.

    A version that was settled before keeps its alias; one whose settling was cut short is settled again.
    """
    if SETTLED_TAG in version.tags:
        return version.tags[SETTLED_TAG]
    with turn(client, name):
        return _settle(client, name, version, introduction, rivals)


def _settle(
    client: MlflowClient, name: str, version: ModelVersion, introduction: str, rivals: Rivals
) -> str:
    number = str(version.version)
    if aliases_of(client, name).get(CHAMPION) == number:
        decision = Decision(CHAMPION, "")
    else:
        standing = standing_champion(client, name, number)
        decision = decide_alias(standing, Measured.of(version), rivals)
        text = f"{introduction} Registered as {decision.alias}. {decision.reason}"
        client.update_model_version(name, number, description=text)
    give_alias(client, name, number, decision.alias)
    client.set_model_version_tag(name, number, SETTLED_TAG, decision.alias)
    return decision.alias


def standing_champion(client: MlflowClient, name: str, new: str) -> Measured | None:
    """Return the champion with its figures, or the last one if it was deleted; None if there never was one.

    A settling of `new` that was cut short may have noted it in the history already: that note does not count.
    """
    champion = by_alias(client, name, CHAMPION)
    if champion is not None:
        return Measured.of(champion)
    history = [number for number in champion_history(client, name) if number != new]
    if not history:
        return None
    kept = json.loads(client.get_registered_model(name).tags.get(LAST_CHAMPION_TAG, "{}"))
    figures = {}
    if kept.get("version") == history[-1]:
        figures = kept["figures"]
    return Measured.from_tags(f"{history[-1]} (deleted since)", figures)


def give_alias(client: MlflowClient, name: str, number: str, alias: str) -> None:
    """Move an alias to a version; a new champion is no challenger any more and is noted in the history first."""
    aliases = aliases_of(client, name)
    if alias == CHAMPION and aliases.get(CHALLENGER) == number:
        client.delete_registered_model_alias(name, CHALLENGER)
    history = champion_history(client, name)
    if alias == CHAMPION and aliases.get(CHAMPION) != number and history[-1:] != [number]:
        _write_history(client, name, [*history, number])
    if alias == CHAMPION:
        _keep_figures(client, name, number)
    client.set_registered_model_alias(name, alias, number)


def _keep_figures(client: MlflowClient, name: str, number: str) -> None:
    tags = client.get_model_version(name, number).tags
    figures = {key: tags[key] for key in FIGURE_TAGS if key in tags}
    record: dict[str, Any] = {"version": number, "figures": figures}
    if len(json.dumps(record)) > TAG_LENGTH:
        del figures[PER_TASK_TAG]
    client.set_registered_model_tag(name, LAST_CHAMPION_TAG, json.dumps(record))


def champion_history(client: MlflowClient, name: str) -> list[str]:
    """Return versions in the order in which they became champion; the last is the present one, unless deleted."""
    model = client.get_registered_model(name)
    present = str(model.aliases.get(CHAMPION, ""))
    known = json.loads(model.tags.get(HISTORY_TAG, "[]"))
    if not present:
        return known
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
    with turn(client, version.name):
        give_alias(client, version.name, number, CHAMPION)
    return RegisteredVersion(version.name, number, CHAMPION)


def rollback(client: MlflowClient, name: str) -> RegisteredVersion:
    """Give the alias back to the champion before the present one, or to the last that exists if that was deleted.

    Raises UserError if there is no such model or no earlier champion.
    """
    there = {str(version.version) for version in existing_versions(client, name)}
    with turn(client, name):
        return _roll_back(client, name, there)


def _roll_back(client: MlflowClient, name: str, there: Collection[str]) -> RegisteredVersion:
    present = aliases_of(client, name).get(CHAMPION)
    earlier = [n for n in champion_history(client, name) if n in there and n != present]
    if not earlier:
        raise UserError(
            f"model {name!r} has no earlier champion to go back to: use `models promote`."
        )
    _write_history(client, name, earlier)
    _keep_figures(client, name, earlier[-1])
    client.set_registered_model_alias(name, CHAMPION, earlier[-1])
    return RegisteredVersion(name, earlier[-1], CHAMPION)
