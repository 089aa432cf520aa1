"""The tables of planted defects: true to the program, complete, and (in `make soak`) every defect seen by its tests."""

from __future__ import annotations

import pytest
from planted import all_defects, all_tests, places, toothless

# Files whose every test has a defect that it must see: what users bring, and what they have.
HELD = (
    *("cases_adapters", "cases_bases", "cases_data", "cases_elsewhere", "cases_options"),
    *("outputs", "output_commands", "output_banks", "identity", "provenance"),
    *("external_adapters", "imported_bank", "bases", "vision", "forms", "reading"),
    *("extraction", "task_files", "training_fields", "dnd_training", "dnd_banks"),
)
# These read ../shared, and are skipped without it.
OF_SHARED_FILES = {
    "test_the_published_files_are_found",
    "test_every_response_of_the_data_files_is_its_own_answer",
    "test_mistakes_in_the_teachers_command_are_one_sentence",
    "test_teachers_of_real_datasets_by_both_methods",
    "test_a_chat_is_what_the_tokenizers_own_template_makes_of_it_and_only_the_response_is_learnt",
    "test_the_real_files_open_without_a_leak",
}


def test_each_defect_has_its_place_in_the_program_and_its_tests() -> None:
    defects = all_defects()
    for defect in defects:
        defect.check()
        assert defect.right != defect.wrong and defect.tests
    kinds = {(one.table, one.file, one.right, one.wrong) for one in defects}
    assert len(kinds) == len(defects)


@pytest.mark.parametrize("name", HELD)
def test_every_test_of_what_users_bring_has_a_defect_to_see(name: str) -> None:
    named = {test.partition("[")[0] for defect in all_defects() for test in defect.tests}
    own = {test for test in all_tests() if test.startswith(f"{places()[name]}::")}
    assert {test for test in own - named if test.partition("::")[2] not in OF_SHARED_FILES} == set()


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_defect_is_seen_by_the_tests_named_beside_it() -> None:
    assert toothless(all_defects()) == []
