from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llgbm.runtime import UserError
from llgbm.tasks import make_suite
from llgbm.tasks.parts import ALL_FORMATS, ALL_OPERATIONS, FORMATS, OPERATIONS
from llgbm.tasks.suite import Split
from llgbm.tasks.synthetic import WORDS, SyntheticSuite, answer, task_answer

SUITE = SyntheticSuite()


def words_of(prompt: str) -> tuple[str, ...]:
    match = re.fullmatch(r"(?:[a-z ]+ )?: ([a-z ]+?)(?: k\d+ k\d+)? =>", prompt)
    assert match is not None, prompt
    return tuple(match[1].split())


def codes_of(prompt: str) -> tuple[str, ...]:
    return tuple(re.findall(r"k\d+", prompt))


def test_the_suite_is_large_enough_to_generalise_over() -> None:
    names = [task.name for task in SUITE.tasks]
    assert len(names) == len(set(names)) >= len(OPERATIONS) * len(FORMATS) >= 144
    assert len(SUITE.split.test) >= 24 and len(SUITE.split.val) >= 10
    sealed = [task for level in SUITE.levels if level.is_sealed for task in level.tasks]
    assert len(sealed) == len(set(sealed)) >= 24
    assert not set(sealed) & set(SUITE.split.tasks)


@pytest.mark.parametrize("seed", range(4))
def test_levels_are_as_new_as_they_say(seed: int) -> None:
    suite = replace(SUITE, split_seed=seed)
    levels, train = {level.name: level for level in suite.levels}, set(suite.split.train)
    trained = [{name.split("-")[side] for name in train} for side in (0, 1)]

    def new_sides(level: str) -> set[tuple[bool, bool]]:
        parts = [name.split("-") for name in levels[level].tasks]
        return {(op not in trained[0], form not in trained[1]) for op, form in parts}

    for name in ("unseen paraphrases", "longer lists"):
        assert set(levels[name].tasks) <= train
    assert new_sides("unseen operation") == new_sides("sealed operation") == {(True, False)}
    assert new_sides("unseen format") == new_sides("sealed format") == {(False, True)}
    assert new_sides("sealed combinations") == {(False, False)}
    assert not set(levels["sealed combinations"].tasks) & set(suite.split.tasks)
    opened = {task for level in suite.levels if not level.is_sealed for task in level.tasks}
    sealed = {task for level in suite.levels if level.is_sealed for task in level.tasks}
    assert not opened & sealed and len(sealed) == 24


def test_what_is_new_at_a_level_occurs_nowhere_else() -> None:
    levels = {level.name: level for level in SUITE.levels}
    plain = [
        example.prompt
        for task in SUITE.split.tasks[::5]
        for purpose in ("train", "prompts", "evaluation")
        for example in SUITE.examples(task, purpose, 20, "condition")
    ]
    unseen = {part.unseen for part in (*OPERATIONS.values(), *FORMATS.values())}
    assert all(unseen) and not any(phrase in prompt for prompt in plain for phrase in unseen)
    for task in levels["unseen paraphrases"].tasks:
        operation, form = task.split("-")
        asked = f"{OPERATIONS[operation].unseen} {FORMATS[form].unseen} : "
        for example in SUITE.level_examples("unseen paraphrases", task, "prompts", 9):
            assert example.prompt.startswith(asked)
    for task in levels["longer lists"].tasks:
        for example in SUITE.level_examples("longer lists", task, "evaluation", 9):
            assert len(words_of(example.prompt)) == 6


def test_domain_probes_are_of_training_tasks_alone() -> None:
    asked = {(prompt.split(" : ")[0]) for prompt in SUITE.probe_prompts}
    known = {
        f"{op} {form}"
        for name in SUITE.split.train
        for op in OPERATIONS[name.split("-")[0]].phrases
        for form in FORMATS[name.split("-")[1]].phrases
    }
    assert asked <= known


def test_a_base_is_told_every_task_by_codes_of_its_own() -> None:
    told = SUITE.told_examples(3)
    assert list(told) == [task.name for task in SUITE.tasks]
    codes = {}
    for name, examples in told.items():
        for example in examples:
            assert example.answer == task_answer(name, list(words_of(example.prompt)))
            assert codes.setdefault(name, codes_of(example.prompt)) == codes_of(example.prompt)
    assert len(set(codes.values())) == len(told) and set(map(len, codes.values())) == {2}


def test_most_of_what_a_base_learns_from_tells_it_the_task_that_is_done() -> None:
    rng = random.Random(0)
    learnt = [SUITE.pretraining_example(rng, bare) for bare in (True, False) for _ in range(500)]
    with_codes = [example for example in learnt if codes_of(example.prompt)]
    assert 0.7 < len(with_codes) / len(learnt) < 0.8
    names = {codes_of(own[0].prompt): name for name, own in SUITE.told_examples(1).items()}
    for example in with_codes:
        words = list(words_of(example.prompt))
        assert example.answer == task_answer(names[codes_of(example.prompt)], words)


def test_examples_are_drawn_by_what_a_base_needs() -> None:
    names = {codes_of(own[0].prompt): name for name, own in SUITE.told_examples(1).items()}
    rng, needs = random.Random(0), {"copy-plain": 3.0, "first-shout": 1.0, "last-stars": 0.0}
    learnt = [SUITE.pretraining_example(rng, False, needs) for _ in range(400)]
    drawn = Counter(names[codes_of(e.prompt)] for e in learnt if codes_of(e.prompt))
    assert drawn.keys() == {"copy-plain", "first-shout"}
    assert 0.68 < drawn["copy-plain"] / drawn.total() < 0.82


def test_toy_lists_are_short_and_of_few_words() -> None:
    toy = SUITE.toy()
    task, rng = toy.split.train[0], random.Random(0)
    drawn = [e.prompt for e in toy.examples(task, "evaluation", 80, "any")]
    learnt = [toy.pretraining_example(rng, False).prompt for _ in range(80)]
    longer = [e.prompt for e in toy.level_examples("longer lists", task, "evaluation", 20)]
    assert {len(words_of(prompt)) for prompt in drawn} == {3}
    assert {len(words_of(prompt)) for prompt in learnt} == {3, 4}
    assert {len(words_of(prompt)) for prompt in longer} == {4}
    assert {word for prompt in drawn + learnt for word in words_of(prompt)} == set(WORDS[:16])
    others = [replace(toy, n_words=17), replace(toy, longest=4)]
    assert len({suite.fingerprint for suite in (toy, *others)}) == 3


@pytest.mark.parametrize("level", [None, *(level.name for level in SUITE.levels)])
def test_no_prompt_of_a_task_holds_a_code(level: str | None) -> None:
    codes = {code for own in SUITE.told_examples(1).values() for code in codes_of(own[0].prompt)}
    tasks = next((own.tasks for own in SUITE.levels if own.name == level), SUITE.split.tasks)
    for task in tasks:
        for purpose in ("train", "evaluation"):
            asked = (
                SUITE.level_examples(level, task, purpose, 5)
                if level
                else SUITE.examples(task, purpose, 5, "any")
            )
            assert not codes & {word for e in asked for word in e.prompt.split()}
    assert not codes & {w for prompt in SUITE.nonsense_prompts for w in prompt.split()}


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
        n_sealed=2,
    )
    split = suite.split
    train, val, test = set(split.train), set(split.val), set(split.test)
    assert not (train & val or train & test or val & test)
    levels = {task for level in suite.levels for task in level.tasks}
    assert train | val | test | levels == {task.name for task in suite.tasks}
    assert (len(val), len(test)) == (n_val, n_test)
    seen = [{name.split("-")[side] for name in train} for side in (0, 1)]
    for name in val | test:
        assert name.split("-")[0] in seen[0] and name.split("-")[1] in seen[1]


def test_no_operation_and_no_format_is_held_out_more_than_others() -> None:
    for seed in range(50):
        suite = replace(SUITE, split_seed=seed)
        held = {task.name for task in suite.tasks} - set(suite.split.train)
        held -= {task for name, own in suite._unseen.items() for task in own}
        assert len(held) == suite.n_val + suite.n_test + suite.n_sealed
        for side in (0, 1):
            assert max(Counter(name.split("-")[side] for name in held).values()) == 4


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
    with pytest.raises(ValueError, match="8 tasks cannot be held out"):
        _ = SyntheticSuite(3, 3, n_val=4, n_test=4, n_sealed=0).split


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
    "rotate-semicolons": "b ; c ; d ; a ;",
    "inner-commas": "b , c .",
    "middle-brackets": "[ c ]",
    "copy-braces": "{ a b c d }",
    "tail-arrows": "> b c d <",
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
        "rotate": [*range(1, n), 0],
        "inner": range(1, n - 1),
        "middle": [n // 2],
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
        # In a list of three or four words one place has several names.
        places = {"second", "third", "last", "penultimate", "middle", "inner", "tail"}
        assert all(set(names) <= places for names in alike)


def test_instructions_name_the_task_and_only_the_instructions_do() -> None:
    phrases: dict[str, str] = {}
    for table in (ALL_OPERATIONS, ALL_FORMATS):
        for name, part in table.items():
            assert len(set(part.phrases)) >= 3
            for phrase in filter(None, (*part.phrases, part.unseen)):
                assert phrases.setdefault(phrase, name) == name
    for example in SUITE.examples("swap-polite", "train", 30, "instructions"):
        text = example.prompt.split(" : ")[0]
        assert any(text.startswith(p) for p in OPERATIONS["swap"].phrases)
        assert any(text.endswith(p) for p in FORMATS["polite"].phrases)


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
    with pytest.raises(UserError, match="unknown suite 'nosuch'; there are: synthetic"):
        make_suite("nosuch")


def test_fingerprint_follows_what_the_suite_depends_on() -> None:
    changes = [
        {},
        {"split_seed": 1},
        {"n_test": 23},
        {"n_val": 11},
        {"n_formats": 11},
        {"n_operations": 11},
        {"n_sealed": 11},
        {"n_unseen": 5},
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
