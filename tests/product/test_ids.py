"""Hold the ids of trials, worlds and cache entries: code may move, what users have must be found again."""

from __future__ import annotations

import pytest
from held import differences, read_table
from held_ids import COMMANDS, TABLE, all_ids

from tuning.studies import STUDIES


def test_every_id_is_the_held_one() -> None:
    held = read_table(TABLE)
    changed = list(differences(held, all_ids()))
    assert not changed, "\n".join(
        [*changed[:20], "where this is meant: python tests/held_ids.py --write"]
    )


def test_the_table_has_every_study_and_every_kind_of_entry() -> None:
    held = read_table(TABLE)
    assert list(held["studies"]) == list(COMMANDS)
    assert all(
        f"--study {name}{smoke}" in COMMANDS for name in STUDIES for smoke in ("", " --smoke")
    )
    assert all(study["trials"] and study["worlds"] for study in held["studies"].values())
    assert set(held["cache"]) == {"conditions", "deltas", "multitask"}
    ids = [i for study in held["studies"].values() for i in study["trials"].values()]
    assert len(set(ids)) > 100 and {len(i) for i in ids} == {12}


@pytest.mark.parametrize(
    ("held", "found", "lines"),
    [
        ({"a": {"b": "1"}}, {"a": {"b": "1"}}, []),
        ({"a": {"b": "1"}}, {"a": {"b": "2"}}, ["a / b: held 1, found 2"]),
        ({"a": "1"}, {"c": "1"}, ["a: held 1, found None", "c: held None, found 1"]),
        ({"a": ["1", "2"]}, {"a": ["1"]}, ["a: held ['1', '2'], found ['1']"]),
    ],
)
def test_a_difference_is_named_by_its_place(held: dict, found: dict, lines: list[str]) -> None:
    assert list(differences(held, found)) == lines
