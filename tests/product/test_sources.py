"""Each method says where it comes from: a paper by author, year and title, or this project."""

from __future__ import annotations

import inspect
import re

import pytest

from llgbm.evaluation.baselines import BASELINES
from llgbm.generator import GENERATORS, OF_TOKENS
from llgbm.lora import LoraSpec, external
from llgbm.terms.registry import built_in_terms

METHODS = {
    **GENERATORS,
    **OF_TOKENS,
    **built_in_terms(),
    **BASELINES,
    "lora": LoraSpec,
    "external": external,
}
PAPER = r"[A-Z][\w\-]+(?: et al\.| and [A-Z]\w+)? (?:19|20)\d\d, \"[^\"]+\""


def test_no_method_is_left_out() -> None:
    assert (
        len(METHODS)
        == len(GENERATORS | OF_TOKENS) + len(built_in_terms()) + len(BASELINES) + 2
        > 20
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_its_source(name: str) -> None:
    text = " ".join((inspect.getdoc(METHODS[name]) or "").split())
    _, found, source = text.partition("Source: ")
    assert found and (source.startswith("ours") or re.search(PAPER, source)), text
    # Identifiers of arXiv are year and month, a point, and four digits (until 2014) or five.
    assert all(
        re.fullmatch(r"\d{4}\.\d{4,5}", one) for one in re.findall(r"arXiv ([\d.]+\d)", text)
    )
