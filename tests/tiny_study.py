"""Provide a study of both generators at toy width: the store among the fixtures of formats was made by it."""

from __future__ import annotations

from llgbm.generator import GENERATORS, GeneratorConfig
from tuning.studies import (
    MULTITASK,
    Study,
    StudyOptions,
    Variant,
    crossed,
    make_trials,
    rate_variants,
)


def tiny(options: StudyOptions) -> Study:
    """Return the study `tiny`: the default weights of the losses, each generator 8 wide."""
    widths = [
        Variant(name, {"generator": GeneratorConfig(name, hidden=8, blocks=1)})
        for name in GENERATORS
    ]
    trials = make_trials(options, crossed([MULTITASK], rate_variants(options), widths))
    return Study("tiny", trials, note="Files of today's formats.")
