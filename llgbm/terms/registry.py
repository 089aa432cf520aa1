"""Find loss terms by name, read their options, and sum them.

A term is known by its name if it stands in this package or in an entry point of the group `llgbm.terms`, and by
`package.module:Class` anywhere else.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import chain
from numbers import Real
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

import llgbm.terms
from llgbm.runtime import UserError
from llgbm.system.plugins import TERMS, load_plugin, offered
from llgbm.terms.names import NAMED
from llgbm.terms.step import Step, TermData
from llgbm.terms.term import Term, check_term_class

Weights = dict[str, float]


@cache
def built_in_terms() -> dict[str, type[Term]]:
    """Return the terms of this package by name: `weight`, `delta`, then the others in alphabetical order."""
    found: dict[str, type[Term]] = {}
    for module in pkgutil.iter_modules(llgbm.terms.__path__):
        content = vars(importlib.import_module(f"llgbm.terms.{module.name}"))
        for value in content.values():
            own = isinstance(value, type) and value.__module__ == content["__name__"]
            if own and issubclass(value, Term) and value is not Term:
                found[value.name] = check_term_class(value, value.__qualname__)
    return {name: found[name] for name in in_order(found)}


def in_order(names: Mapping[str, Any]) -> list[str]:
    """Sort names of terms: those that a configuration has fields for first."""
    return [*(name for name in NAMED if name in names), *sorted(set(names) - set(NAMED))]


@cache
def find_term(name: str) -> type[Term]:
    """Return a term's class by its name or by `package.module:Class`. Raises UserError where there is none."""
    if name in built_in_terms():
        return built_in_terms()[name]
    if ":" in name:
        return _imported(name)
    found = load_plugin(TERMS, name)
    if found is not None:
        return check_term_class(found, name)
    known = ", ".join([*built_in_terms(), *sorted(offered(TERMS))])
    raise UserError(
        f"unknown loss term {name!r}; there are: {known}, or your own as package.module:Class"
    )


def _imported(place: str) -> type[Term]:
    module, _, name = place.partition(":")
    try:
        content = importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"the loss term {place} cannot be imported: {error}") from error
    if not hasattr(content, name):
        raise UserError(f"the module {module} has no {name!r}: write package.module:Class")
    return check_term_class(getattr(content, name), place)


def make_term(name: str, options: Mapping[str, Any]) -> Term:
    """Create a term with options by the names `<term>.<option>`; those of other terms are left alone.

    Raises UserError for an unknown term or option, and for a value of another type.
    """
    kind = find_term(name)
    hints = get_type_hints(kind)
    known = {option.name: hints[option.name] for option in fields(kind)}
    own = {}
    for key, value in options.items():
        term, _, option = key.rpartition(".")
        if term != name:
            continue
        if option not in known:
            there = f"it has: {', '.join(known)}" if known else "it has none"
            raise UserError(f"the loss term {name} has no option {option!r}; {there}")
        own[option] = _read(key, value, known[option])
    return kind(**own)


def _read(key: str, value: Any, kind: Any) -> Any:
    """Convert an option to the type of its field; texts come from the command line."""
    if get_origin(kind) is tuple and isinstance(value, (str, tuple, list)):
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(_read(key, part, get_args(kind)[0]) for part in parts)
    try:
        found = kind(value)
        if kind is int and isinstance(value, Real) and found != value:
            raise ValueError
    except (TypeError, ValueError) as error:
        what = {int: "a whole number", float: "a number"}.get(kind, "of another kind")
        raise UserError(f"the option {key} is {value!r}; it must be {what}") from error
    return found


def split_weights(weights: Mapping[str, Any]) -> tuple[Weights, Weights]:
    """Split weights by term into those with a field of their own and the others, which are above 0 and in order.

    Raises UserError for an unknown term and for a weight that is negative or not finite.
    """
    for name, value in weights.items():
        find_term(name)
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < 0:
            raise UserError(
                f"the weight of the loss term {name} is {value!r}; it must be a finite number of at least 0"
            )
    named = {name: float(weights[name]) for name in NAMED if name in weights}
    rest = set(weights) - set(NAMED)
    return named, {name: float(weights[name]) for name in sorted(rest) if weights[name] > 0}


def used_options(weights: Mapping[str, float], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that differ from their defaults, as their terms hold them, in order.

    Raises UserError for an option of a term without a weight, and as `make_term`.
    """
    for key in options:
        term = key.rpartition(".")[0]
        if term not in weights:
            raise UserError(
                f"the option {key} is of a loss term without a weight: give one ({term or 'TERM'}=1), or leave it out"
            )
    found = {}
    for name in weights:
        made = make_term(name, options)
        for option in fields(made):
            value = getattr(made, option.name)
            if value != option.default:
                found[f"{name}.{option.name}"] = value
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Objective:
    """Sum of weight x term, with what the terms prepared for a training."""

    parts: tuple[tuple[float, Term], ...]
    prepared: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = ()

    @classmethod
    def of(cls, weights: Mapping[str, float], options: Mapping[str, Any]) -> Objective:
        """Create the terms with a weight above 0. Raises UserError where there is none, and for two of one name."""
        names = in_order({name: value for name, value in weights.items() if value > 0})
        parts = tuple((weights[name], make_term(name, options)) for name in names)
        own = [term.name for _, term in parts]
        if twice := sorted({name for name in own if own.count(name) > 1}):
            raise UserError(f"two loss terms are called {twice[0]!r}: rename one of them")
        if not parts:
            raise UserError("no loss term has a weight above 0: there is no loss to train on")
        return cls(parts)

    @property
    def terms(self) -> tuple[Term, ...]:
        return tuple(term for _, term in self.parts)

    @property
    def reads(self) -> frozenset[str]:
        """Union of what the terms read."""
        return frozenset().union(*(term.reads for term in self.terms))

    @property
    def matches(self) -> tuple[str, ...]:
        """Return the kinds of supervision of the terms, each once, in alphabetical order."""
        return tuple(sorted({term.matches for term in self.terms}))

    def prepare(self, data: TermData) -> Objective:
        """Return the objective with what its terms compute once before a training."""
        modules = dict.fromkeys(chain.from_iterable(term.modules(data) for term in self.terms))
        prepared = {term.name: term.prepare(data) for term in self.terms}
        return Objective(self.parts, prepared, tuple(modules))

    def __call__(self, step: Step) -> dict[str, Tensor]:
        """Compute `loss` and the terms that it sums, `loss_<name>`."""
        values = {f"loss_{term.name}": term.value(step) for term in self.terms}
        return {"loss": self.total(values), **values}

    def total(self, values: Mapping[str, Tensor]) -> Tensor:
        """Sum weight x value of the terms, `loss_<name>`."""
        return torch.stack(
            [weight * values[f"loss_{term.name}"] for weight, term in self.parts]
        ).sum()
