"""Datasets, prompts and answers from the command line.

Of the inputs that once failed, these are tried elsewhere:
  forms of rows, encodings, bad rows by number            tests/llgbm/test_forms.py
  several hundred answers in the words of real models     tests/llgbm/test_extraction.py, tests/llgbm/test_reading.py
  repeats, leaks between files                            tests/llgbm/test_task_files.py
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from helpers import rows
from output_checks import one_sentence, tree
from safetensors.torch import load_file

from llgbm.__main__ import main
from llgbm.models.load import Base
from llgbm.tasks.extraction import choices, extract

TEACHERS = ["teachers", "--data", "data", "--tasks", "river", "--steps", "1", "--checkpoints", "1"]
TEACHERS += ["--every", "1", "--max-tokens", "2", "--out", "bank", "--base"]
EVALUATE = ["evaluate", "--data", "data", "--tasks", "river", "--max-tokens", "1", "--shots", "0"]


def written(folder: Path, content: Any, name: str = "river.json", mark: bytes = b"") -> None:
    """Write rows as the one dataset of the user: a list of JSON, or a row a line."""
    (folder / "data").mkdir(exist_ok=True)
    text = json.dumps(content)
    if name.endswith("l"):
        text = "\n".join(json.dumps(row) for row in content)
    (folder / "data" / name).write_bytes(mark + text.encode())


def scored(base: Base, capsys: pytest.CaptureFixture[str], *more: str) -> int:
    """Return the number of rows that `evaluate` scores on, a quarter of them all."""
    assert main([*EVALUATE, "--base", base.path, *more]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    return int(result["examples"])


SIGNS = [f"{a} {op} {b} = ?" for a in range(1, 5) for b in range(1, 5) for op in "+-*/"]
SAME_WORDS = {
    "brackets": ["Close " + "".join(own) for own in product("([{<", repeat=3)],
    "signs": SIGNS,
    "places of brackets": [f"({n} + 2) * 3" for n in range(32)]
    + [f"{n} + (2 * 3)" for n in range(32)],
    "factorials": [f"{n}! = ?" for n in range(32)] + [f"{n} = ?" for n in range(32)],
    "case": ["Say " + "".join(own) for own in product("aA", "bB", "cC", "dD", "eE", "fF")],
}


@pytest.mark.parametrize("name", SAME_WORDS)
def test_questions_that_differ_in_signs_are_different(
    name: str, tiny_base: Base, user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = SAME_WORDS[name]
    assert len(set(questions)) == 64
    written(user, [{"prompt": q, "response": "yes"} for q in questions])
    assert scored(tiny_base, capsys) == 16
    written(user, [{"prompt": q, "response": "yes"} for q in [*questions, *questions[:2]]])
    assert scored(tiny_base, capsys) == 16


FORMS: dict[str, Any] = {
    "rows": lambda q, a: {"prompt": q, "response": a},
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "sharegpt": lambda q, a: {
        "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
    },
    "openai": lambda q, a: {
        "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    },
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("file", ["river.json", "river.jsonl"])
def test_every_form_of_rows_makes_the_same_bank(
    name: str, file: str, tiny_base: Base, user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [(f"After {i}?", str(i + 1)) for i in range(32)]
    hashes = []
    for form in ("rows", name):
        mark = b"\xef\xbb\xbf" if form == name else b""
        written(user, [FORMS[form](*pair) for pair in pairs], file, mark)
        arguments = list(TEACHERS)
        arguments[arguments.index("bank")] = f"bank-{len(hashes)}"
        assert main([*arguments, tiny_base.path]) == 0
        hashes.append(json.loads(capsys.readouterr().out)["hash"])
    assert hashes[0] == hashes[1]


BAD = {
    "surrogate": ({"prompt": "\ud800", "response": "[A]"}, "row 41 has bytes in its 'prompt'"),
    "long": ({"prompt": "y" * 200_000, "response": "[A]"}, "row 41 has 200003 characters"),
    "empty": ({"prompt": "y", "response": ""}, "row 41 has an empty 'response'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_cannot_be_read_is_named_or_left_out(
    name: str, tiny_base: Base, user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, words = BAD[name]
    written(user, [*rows("river", 40), row])
    before = tree(user)
    for command in (TEACHERS, [*EVALUATE, "--base"]):
        assert main([*command, tiny_base.path]) == 2
        said = one_sentence(capsys)
        assert words in said and "river.json" in said and "--skip-bad-rows" in said
        assert tree(user) == before
    assert scored(tiny_base, capsys, "--skip-bad-rows") == 10


@pytest.mark.parametrize("count", [24, 63])
def test_few_rows_make_a_bank_of_fewer_prompts(
    count: int, tiny_base: Base, user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(user, rows("river", count))
    assert main([*TEACHERS, tiny_base.path]) == 0
    assert f"has {count // 4} prompts to condition on, not 16" in capsys.readouterr().err
    assert len(json.loads(next(user.rglob("prompts.json")).read_text())["evaluation"]) == count // 4


def test_too_few_rows_are_refused_before_the_base_is_loaded(
    user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(user, rows("river", 3))
    before = tree(user)
    assert main([*TEACHERS, "nowhere/at-all"]) == 2
    assert "river" in one_sentence(capsys) and tree(user) == before


QUESTION = "Which conducts?\nA: wood\nB: copper {}"


def test_prompts_of_several_lines_are_as_many_as_they_are(
    commands: dict[str, list[str]], user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [QUESTION.format(number) for number in range(3)]
    texts = {
        "apart.txt": "\n\n".join(questions),
        "marked.txt": "\ufeff" + "\n\n".join(questions),
        "list.json": json.dumps(questions),
        "lines.jsonl": "\n".join(json.dumps({"prompt": q, "response": "[B]"}) for q in questions),
    }
    command = commands["generate"][:-1]
    made = set()
    for name, text in texts.items():
        (user / name).write_text(text, encoding="utf-8")
        assert main([*command, name, "--out", "made"]) == 0
        assert json.loads(capsys.readouterr().out)["prompts"] == 3
        weights = load_file(user / "made" / "adapter_model.safetensors")
        made.add(b"".join(weights[key].numpy().tobytes() for key in sorted(weights)))
    assert len(made) == 1
    (user / "odd.json").write_text(json.dumps(["a", "\ud800"]))
    assert main([*command, "odd.json", "--out", "other"]) == 2
    assert "prompt 2 of odd.json" in one_sentence(capsys) and not (user / "other").exists()


LAYOUTS = ("[{}] {}", "({}) {}", "{}: {}", "{}. {}", "{}) {}")
ANIMALS = {"A": "a dog", "B": "a cat", "C": "a cow"}
ANSWERS = [
    ("choice", "[B], a cat, as (C) is no pet.", "B"),
    ("choice", "The answer is B, a cat. [A] is a dog.", "B"),
    ("choice", "B is the correct answer.", "B"),
    ("choice", "\\boxed{B}", "B"),
    ("choice", "I would go with B.", "B"),
    ("choice", "B) a cat\nA is a dog.", "B"),
    ("choice", "A.", "A"),
    ("choice", "a cat", "B"),
    ("choice", "A cat.", "B"),
    ("choice", "It is a cat", "B"),
    ("choice", "The answer is 'B'.", "B"),
    ("choice", "The letter is B", "B"),
    ("choice", "Must be B.", "B"),
    ("choice", "Definitely B!", "B"),
    ("choice", "C is not correct, B is.", "B"),
    ("choice", "A. No wait, B.", "B"),
    ("number", "The answer is 20 - 5 = 15.", "15"),
    ("number", "#### 3/4", "3/4"),
    ("truth", "That's right", "True"),
    ("truth", "Yes and no", None),
    ("truth", "Nope", "False"),
    ("truth", "Yep, it is.", "True"),
]


@pytest.mark.parametrize(("kind", "text", "wanted"), ANSWERS, ids=[text for _, text, _ in ANSWERS])
def test_an_answer_is_what_its_sentence_says(kind: str, text: str, wanted: str | None) -> None:
    for layout in LAYOUTS:
        lines = [layout.format(*choice) for choice in ANIMALS.items()]
        asked = "\n".join(["Which is it?", *lines])
        assert choices(asked) == ANIMALS
        assert extract(kind, asked, text) == wanted
