"""Loss terms on the command line: their weights and options, and the variants that they make."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llgbm.runtime import UserError
from llgbm.terms.names import NAMED
from llgbm.terms.registry import find_term, in_order, split_weights, used_options

TermWeights = dict[str, tuple[float, ...]]
# After the name of a configuration that is a reference.
LABELLED = " (true labels)"


def read_weights(texts: Sequence[str]) -> TermWeights:
    """Read `name=weight[,weight...]`. Raises UserError for anything else, an unknown term, or a term given twice."""
    found: TermWeights = {}
    for text in texts:
        name, values = _split(text, "a term's weight is written name=1, or name=0.3,1 for several")
        if name in found:
            raise UserError(f"the loss term {name} is given twice: write {name}=0.3,1 for several")
        found[name] = tuple(_number(name, value) for value in values.split(","))
        for value in found[name]:
            split_weights({name: value})
    return found


def read_options(texts: Sequence[str]) -> dict[str, str]:
    """Read `term.option=value`. Raises UserError for anything else, an unknown term, or an option given twice."""
    found: dict[str, str] = {}
    for text in texts:
        key, value = _split(text, "a term's option is written term.option=value")
        if key in found:
            raise UserError(f"the option {key} is given twice")
        used_options({key.rpartition(".")[0]: 1.0}, {key: value})
        found[key] = value
    return found


def _split(text: str, how: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise UserError(f"{text!r} cannot be read: {how}")
    return name, value


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"the weight of the loss term {name} is {text!r}, no number") from error


def weight_grid(axes: Mapping[str, Iterable[float]]) -> list[dict[str, float]]:
    """Return every combination of weights by term, without those that are 0 throughout if there are others."""
    points = itertools.product(*axes.values())
    grid = [dict(zip(axes, point, strict=True)) for point in points]
    if len(grid) > 1:
        grid = [weights for weights in grid if any(weights.values())]
    return grid


def weights_name(weights: Mapping[str, float]) -> str:
    """Name a combination: `delta=1 kl=0.3`; of `weight` and `delta` alone as they were always named."""
    if set(used(weights)) <= set(NAMED):
        weight, delta = weights.get("weight", 0.0), weights.get("delta", 0.0)
        kinds = {(True, True): "multitask", (True, False): "weight-only"}
        kind = kinds.get((bool(weight), bool(delta)), "delta-only")
        return f"{kind} w={weight:g} d={delta:g}"
    uses_labels = any(find_term(name).matches == "labels" for name in used(weights))
    return weights_text(weights) + LABELLED * uses_labels


def weights_text(weights: Mapping[str, float]) -> str:
    """Write weights above 0 as `delta=1 kl=0.3`."""
    return " ".join(f"{short_name(name)}={value:g}" for name, value in used(weights).items())


def used(weights: Mapping[str, float]) -> dict[str, float]:
    """Return the weights above 0, in one order, however they were given."""
    return {name: weights[name] for name in in_order(weights) if weights[name]}


def short_name(name: str) -> str:
    """Return what a term calls itself, which is shorter than `package.module:Class`."""
    return find_term(name).name


def changes_of(weights: Mapping[str, float]) -> dict[str, Any]:
    """Return the fields of a configuration with these weights, and no other terms."""
    fields: dict[str, Any] = {field: weights.get(name, 0.0) for name, field in NAMED.items()}
    others = {name: value for name, value in used(weights).items() if name not in NAMED}
    if others:
        fields["terms"] = others
    return fields


def why_of(weights: Mapping[str, float]) -> str:
    """Return the reason for a combination: what it matches."""
    kinds = {find_term(name).matches for name in used(weights)} - {"size"}
    if "labels" in kinds:
        return "True labels are used: a reference for what behaviour alone can reach, no method to compare with."
    if kinds == {"weights", "behaviour"}:
        return "Weights and behaviour are matched together: is that better than either alone?"
    if kinds == {"weights"}:
        return "Only weights are matched, as Drag-and-Drop LLMs does: the reference that behaviour must beat."
    if kinds == {"behaviour"}:
        return "Only behaviour is matched; no weight of a teacher is ever looked at."
    return "No teacher is matched at all."
