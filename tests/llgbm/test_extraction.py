"""What responses say: a table written by reading real ones, invariants, and every row of the data files."""

from __future__ import annotations

import json
import string
from fractions import Fraction

import base_answers
import pytest
from answer_cases import CHOICE, DIALOGUE, DIGITS, METALS, NUMBER, NUMBERED, PAIR, TRUTH
from helpers import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from llgbm.tasks.extraction import (
    answer_kind,
    choices,
    extract,
    extract_number,
    in_form,
    question_key,
    rivals,
)

KINDS = ("truth", "number", "text")
TABLE = [
    ("choice", prompt, response, wanted)
    for table in (CHOICE, base_answers.CHOICE)
    for prompt, cases in table.items()
    for response, wanted in cases
]
for kind, cases in zip(
    KINDS,
    (TRUTH + base_answers.TRUTH, NUMBER + base_answers.NUMBER, base_answers.TEXT),
    strict=True,
):
    TABLE += [(kind, "is snow cold?", response, wanted) for response, wanted in cases]


def test_the_table_is_large_and_names_no_case_twice() -> None:
    assert len(TABLE) >= 450
    assert len({case[:3] for case in TABLE}) == len(TABLE)


@pytest.mark.parametrize(("kind", "prompt", "response", "wanted"), TABLE)
def test_the_answer_is_what_a_careful_reader_takes(
    kind: str, prompt: str, response: str, wanted: str | None
) -> None:
    assert extract(kind, prompt, response) == wanted


def test_choices_are_those_of_the_question_and_not_of_its_story() -> None:
    assert choices(DIALOGUE) == {"A": "cold", "B": "bacteria", "C": "light", "D": "salt"}
    assert list(choices(DIGITS)) == list("1234") and list(choices(PAIR)) == ["A", "B"]
    assert choices("is house tax and property tax the same?") == {}
    assert choices("A: alone is no choice") == {}


def test_a_question_is_the_same_in_another_order_and_spelling_and_another_with_other_choices() -> (
    None
):
    shuffled = "Which material conducts\u00a0electricity best? \n1: glass\n2: rubber\n3: copper  wire\n4: dry wood"
    closed = f"\ufeff{METALS}\nPlease answer the question choosing from A/B/C/D."
    assert question_key(METALS) == question_key(shuffled) == question_key(closed)
    assert question_key("caf\u00e9?") == question_key("cafe\u0301?")
    assert question_key(METALS) != question_key(METALS.replace("glass", "gold"))
    assert question_key("What is 3 + 4?") != question_key("What is 3 - 4?")
    for one, other in (
        ("(1+2)*3", "1+(2*3)"),
        ("5! = ?", "5 = ?"),
        ("[()]", "([])"),
        ("is US", "is us"),
    ):
        assert question_key(one) != question_key(other)
    brackets = {
        question_key(f"close: {bits:06b}".translate({48: "(", 49: "["})) for bits in range(60)
    }
    assert len(brackets) == 60
    assert question_key("\u4f60\u597d") != question_key("\u518d\u89c1")


@pytest.mark.parametrize(
    ("responses", "kind"),
    [
        (["[A]", "[3]"], "choice"),
        (["[True]", "[False] "], "truth"),
        (["6 - 2 = 4\nSo 4.\n#### 4", "#### -1,200"], "number"),
        (["The answer is 3.", "The value of x is -1.5."], "number"),
        (["[A]", "[True]"], "text"),
        (["print(1)"], "text"),
        ([], "text"),
    ],
)
def test_the_kind_of_a_dataset_is_read_off_its_responses(responses: list[str], kind: str) -> None:
    assert answer_kind(responses) == kind


def test_form_is_stricter_than_having_an_answer() -> None:
    assert (
        in_form("choice", "[C]\n")
        and not in_form("choice", "C")
        and not in_form("choice", "[C] since")
    )
    assert in_form("truth", "[True]") and not in_form("truth", "true")
    assert in_form("number", "2+2=4\n#### 4") and not in_form("number", "so 4")
    assert in_form("text", "anything")


def test_rivals_are_the_responses_that_a_question_allows() -> None:
    assert rivals("choice", PAIR) == ["[A]", "[B]"] and rivals("choice", DIGITS) == [
        "[1]",
        "[2]",
        "[3]",
        "[4]",
    ]
    assert rivals("truth", "is it?") == ["[True]", "[False]"] and not rivals("number", "how many?")
    for response in rivals("choice", NUMBERED):
        assert extract("choice", NUMBERED, response) == response[1]


@given(st.text(alphabet=string.printable + "\u2212\u2019", max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_has_at_most_one_answer_of_those_allowed(response: str) -> None:
    assert extract("choice", METALS, response) in {None, *"ABCD"}
    assert extract("truth", "is it?", response) in {None, "True", "False"}
    number = extract("number", "how many?", response)
    assert number is None or str(Fraction(number)) == str(Fraction(number))


@given(
    st.integers(-(10**9), 10**9),
    st.sampled_from(["#### {}", "The answer is {}.", "{}", "so it is {} dollars"]),
)
def test_whole_numbers_are_read_with_and_without_digit_groups(value: int, sentence: str) -> None:
    assert (
        extract_number(sentence.format(value))
        == extract_number(sentence.format(f"{value:,}"))
        == str(value)
    )


FILES = sorted(
    path for path in SHARED.glob("data/*.json") if path.stem not in ("dataset_info", "Human_Eval")
)


def test_every_response_of_the_data_files_is_its_own_answer() -> None:
    if not FILES:
        pytest.skip("../shared/data is absent: no real responses to read")
    for path in FILES:
        rows = [row for row in json.loads(path.read_text(encoding="utf-8")) if row["response"]]
        kind = answer_kind(row["response"] for row in rows)
        for row in rows[::4] if kind != "text" else []:
            last = (
                row["response"].strip().removesuffix(".").split()[-1].strip("[]").replace(",", "")
            )
            found = extract(kind, row["prompt"], row["response"])
            assert found is not None, (path.name, row)
            assert (float(found) == float(last)) if kind == "number" else (found == last), (
                path.name,
                row,
            )
