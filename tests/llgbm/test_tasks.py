from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llgbm.runtime import UserError
from llgbm.tasks import make_suite
from llgbm.tasks.suite import Split
from llgbm.tasks.synthetic import FORMATS, OPERATIONS, SyntheticSuite, answer

SUITE = SyntheticSuite()


def words_of(prompt: str) -> tuple[str, ...]:
    match = re.fullmatch(r"[a-z ]+ : ([a-z ]+) =>", prompt)
    assert match is not None, prompt
    return tuple(match[1].split())


def test_the_suite_is_large_enough_to_generalise_over() -> None:
    names = [task.name for task in SUITE.tasks]
    assert len(names) == len(set(names)) == len(OPERATIONS) * len(FORMATS) >= 96
    assert sorted(SUITE.split.tasks) == sorted(names)
    assert len(SUITE.split.test) >= 24 and len(SUITE.split.val) >= 10


@given(
    seed=st.integers(0, 10**6),
    n_operations=st.integers(6, len(OPERATIONS)),
    n_formats=st.integers(6, len(FORMATS)),
    n_val=st.integers(1, 4),
    n_test=st.integers(1, 8),
)
@settings(max_examples=60, deadline=None)
def test_held_out_tasks_are_new_combinations_of_parts_seen_in_training(
    seed: int, n_operations: int, n_formats: int, n_val: int, n_test: int
) -> None:
    suite = replace(
        SUITE,
        split_seed=seed,
        n_operations=n_operations,
        n_formats=n_formats,
        n_val=n_val,
        n_test=n_test,
    )
    split = suite.split
    train, val, test = set(split.train), set(split.val), set(split.test)
    assert not (train & val or train & test or val & test)
    assert train | val | test == {task.name for task in suite.tasks}
    assert (len(val), len(test)) == (n_val, n_test)
    seen = [{name.split("-")[side] for name in train} for side in (0, 1)]
    for name in val | test:
        assert name.split("-")[0] in seen[0] and name.split("-")[1] in seen[1]


def test_the_full_split_is_covered_for_many_seeds() -> None:
    for seed in range(50):
        split = replace(SUITE, split_seed=seed).split
        for side in (0, 1):
            parts = [{n.split("-")[side] for n in names} for names in (split.train, split.tasks)]
            assert parts[0] == parts[1]
    assert len({replace(SUITE, split_seed=seed).split for seed in range(5)}) == 5


def test_splits_that_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="held out must mean held out"):
        Split(("a", "b"), ("c",), ("a",))
    with pytest.raises(ValueError, match="can be held out"):
        _ = SyntheticSuite(n_operations=3, n_formats=3, n_val=4, n_test=4).split


def test_word_lists_of_evaluation_never_occur_in_training() -> None:
    tasks = [task.name for task in SUITE.tasks][::7]
    drawn = {
        purpose: {
            words_of(example.prompt)
            for task in tasks
            for stream in ("condition", "teacher 0 0", "evaluation")
            for example in SUITE.examples(task, purpose, 60, stream)
        }
        for purpose in ("train", "evaluation")
    }
    assert not drawn["train"] & drawn["evaluation"]
    assert min(map(len, drawn.values())) > 1000
    for words in drawn["train"] | drawn["evaluation"]:
        assert 3 <= len(words) <= 5 and len(set(words)) == len(words)
    rng = random.Random(0)
    pretraining = {words_of(SUITE.pretraining_example(rng, bare=False).prompt) for _ in range(3000)}
    assert not pretraining & drawn["evaluation"]


# Written out by hand, so that a change of meaning shows.
ANSWERS = {
    "first-plain": "a",
    "second-brackets": "[ b ]",
    "third-parentheses": "( c )",
    "last-quotes": '" d "',
    "penultimate-stars": "* c *",
    "ends-commas": "a , d .",
    "tail-dashes": "- b - c - d",
    "init-twice": "a b c a b c",
    "reverse-label": "answer : d c b a",
    "copy-closed": "a b c d done",
    "swap-polite": "sure , b a c d",
    "count-shout": "four !",
    "reverse-commas": "d , c , b , a .",
    "count-twice": "four four",
}


@pytest.mark.parametrize("task", ANSWERS)
def test_answers_are_those_written_by_hand(task: str) -> None:
    seen = set()
    for example in SUITE.examples(task, "evaluation", 40, "by hand"):
        words = words_of(example.prompt)
        seen.add(len(words))
        assert example.answer.startswith(" ")
        if len(words) == 4:
            letters = dict(zip(words, "abcd", strict=True))
            assert (
                " ".join(letters.get(piece, piece) for piece in example.answer.split())
                == ANSWERS[task]
            )
    assert seen == {3, 4, 5}


def reference(operation: str, words: list[str]) -> list[str]:
    n = len(words)
    places = {
        "first": [0],
        "second": [1],
        "third": [2],
        "last": [n - 1],
        "penultimate": [n - 2],
        "ends": [0, n - 1],
        "tail": range(1, n),
        "init": range(n - 1),
        "reverse": range(n - 1, -1, -1),
        "copy": range(n),
        "swap": [1, 0, *range(2, n)],
    }
    return (
        ["three", "four", "five"][n - 3 : n - 2]
        if operation == "count"
        else [words[i] for i in places[operation]]
    )


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_agree_with_a_reference_on_every_length(operation: str) -> None:
    for example in SUITE.examples(f"{operation}-plain", "train", 60, "reference"):
        assert example.answer.split() == reference(operation, list(words_of(example.prompt)))


def test_every_task_gives_another_answer_to_the_same_words() -> None:
    for words in (list("abc"), list("abcd"), list("abcde")):
        answers: dict[str, list[str]] = {}
        for task in SUITE.tasks:
            answers.setdefault(answer(*task.name.split("-"), words), []).append(task.name)
        alike = {
            tuple(name.split("-")[0] for name in names)
            for names in answers.values()
            if len(names) > 1
        }
        assert alike <= {("second", "penultimate"), ("third", "last"), ("third", "penultimate")}


def test_instructions_name_the_task_and_only_the_instructions_do() -> None:
    phrases: dict[str, str] = {}
    for table in (OPERATIONS, FORMATS):
        for name, (_, paraphrases) in table.items():
            assert len(set(paraphrases)) >= 3
            for phrase in paraphrases:
                assert phrases.setdefault(phrase, name) == name
    for example in SUITE.examples("swap-polite", "train", 30, "instructions"):
        text = example.prompt.split(" : ")[0]
        assert any(text.startswith(p) for p in OPERATIONS["swap"][1])
        assert any(text.endswith(p) for p in FORMATS["polite"][1])


def test_a_stream_is_a_prefix_of_its_longer_self_and_no_other_streams() -> None:
    task = SUITE.split.test[0]
    few, many = (SUITE.examples(task, "train", count, "one") for count in (5, 20))
    assert many[:5] == few
    others = [
        SUITE.examples(task, "train", 5, "two"),
        SUITE.examples(SUITE.split.test[1], "train", 5, "one"),
    ]
    assert all(other != few for other in others)


def test_unknown_names_are_answered_with_near_ones() -> None:
    with pytest.raises(UserError, match="unknown task 'revers-plain'; near it are: reverse-plain"):
        SUITE.examples("revers-plain", "train", 1, "x")
    with pytest.raises(UserError, match="unknown suite 'nosuch'; there is: synthetic"):
        make_suite("nosuch")


def test_fingerprint_follows_what_the_suite_depends_on() -> None:
    changes = [
        {},
        {"split_seed": 1},
        {"n_test": 23},
        {"n_val": 11},
        {"n_formats": 11},
        {"n_operations": 11},
    ]
    assert len({replace(SUITE, **change).fingerprint for change in changes}) == len(changes)


def test_every_process_draws_the_same() -> None:
    code = (
        "from llgbm.tasks import SyntheticSuite as S; import random; s = S();"
        "print(s.fingerprint, s.split, s.vocabulary, s.probe_prompts, s.nonsense_prompts,"
        "[s.examples(t.name, p, 3, 'x') for t in s.tasks for p in ('train', 'evaluation')],"
        "[s.pretraining_example(random.Random(i), bool(i % 2)) for i in range(9)])"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert printed[0] == printed[1] and SUITE.fingerprint in printed[0]
