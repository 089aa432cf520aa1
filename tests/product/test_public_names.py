"""Hold the names that users import, with their signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import pytest
from held import differences, read_table
from held_names import GIVEN, TABLE, all_names, documented_names, imported, signature, signatures

REMEDY = "where this is meant: python tests/held_names.py --write, and a line in the changelog"


@pytest.mark.parametrize("kind", ["given", "documented"])
def test_every_signature_is_the_held_one(kind: str) -> None:
    changed = list(differences(read_table(TABLE)[kind], all_names()[kind]))
    assert not changed, "\n".join([*changed, REMEDY])


def test_the_table_has_every_name() -> None:
    held = read_table(TABLE)
    assert {
        f"llgbm.{module}.{name}" for module, names in GIVEN.items() for name in names.split()
    } <= set(held["given"])
    documented = {name for _, name in documented_names()}
    assert documented <= set(held["documented"])
    assert {
        "GeneratorBundle",
        "fetch_bundle",
        "make_trials",
        "build_world",
        "study_of",
        "LoraTokenizer2D",
    } <= documented


class Example:
    """Stand for a class of the project."""

    def __init__(self, width: int = 3) -> None:
        self.width = width

    @property
    def double(self) -> int:
        return 2 * self.width

    @classmethod
    def narrow(cls, width: int) -> Example:
        return cls(width)

    def _hidden(self) -> Iterator[int]:
        yield self.width


def test_a_class_is_held_with_its_public_methods() -> None:
    assert signatures("Example", Example) == {
        "Example": "(width: 'int' = 3) -> 'None'",
        "Example.double": "property",
        "Example.narrow": "(cls, width: 'int') -> 'Example'",
    }
    assert signatures("SIZES", {"a": 1}) == {"SIZES": "dict"}


def with_a_callback(report: Callable[[], None] = lambda: None) -> None:
    """Stand for a function whose default has an address."""


def test_a_signature_is_the_same_in_every_process() -> None:
    assert " at 0x" in str(inspect.signature(with_a_callback)) and " at 0x" not in signature(
        with_a_callback
    )


def test_imports_are_found_wherever_they_stand() -> None:
    code = "import os\nfrom os import path\nfrom tuning.a import b, c as d\ndef f():\n    from llgbm import e"
    assert set(imported(code)) == {("tuning.a", "b"), ("tuning.a", "c"), ("llgbm", "e")}
    with pytest.raises(ValueError, match="from module import name"):
        list(imported("import llgbm.world"))
