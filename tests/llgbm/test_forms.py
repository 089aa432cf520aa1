"""Rows and prompts in the forms that people keep them in, and what is refused, by file and number."""

from __future__ import annotations

import codecs
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import rows, write_rows

from llgbm.lora.adapters import adapter_config, save_adapter
from llgbm.models.encoding import chat_prompt, example_prompt
from llgbm.runtime import UserError
from llgbm.tasks.files import FileSuite, read_dataset
from llgbm.tasks.forms import LONGEST, BadRow, RowRules, read_prompt, read_row
from llgbm.tasks.prompts import check_prompts, read_prompts
from llgbm.tasks.rows import read_rows
from llgbm.tasks.suite import Example
from llgbm.teachers.build import make_bank
from llgbm.teachers.imported import ImportOptions, import_bank
from llgbm.teachers.train import SFTConfig, TeacherConfig, fitted

WANTED = Example("Is 4 even?", "[True]", "Be short.")
ASKED = {"role": "user", "content": "Is 4 even?"}
ANSWERED = {"role": "assistant", "content": "[True]"}
FORMS: dict[str, dict[str, Any]] = {
    "own": {"prompt": "Is 4 even?", "response": "[True]", "system": "Be short."},
    "completion": {"prompt": "Is 4 even?", "completion": "[True]", "system": "Be short."},
    "question": {"question": "Is 4 even?", "answer": "[True]", "system": "Be short."},
    "alpaca": {
        "instruction": "Is 4 even?",
        "input": "",
        "output": "[True]",
        "system": "Be short.",
        "text": "Below is an instruction",
    },
    "sharegpt": {
        "id": "a1",
        "conversations": [
            {"from": "system", "value": "Be short."},
            {"from": "human", "value": "Is 4 even?"},
            {"from": "gpt", "value": "[True]"},
        ],
    },
    "sharegpt system beside": {
        "system": "Be short.",
        "conversations": [
            {"from": "human", "value": "Is 4 even?"},
            {"from": "gpt", "value": "[True]"},
        ],
    },
    "openai": {"messages": [{"role": "system", "content": "Be short."}, ASKED, ANSWERED]},
    "openai parts": {
        "messages": [
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "Is 4 even?"}]},
            ANSWERED,
        ]
    },
    "turns in two fields": {
        "prompt": [{"role": "system", "content": "Be short."}, ASKED],
        "completion": [ANSWERED],
    },
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read_as_the_same_example(name: str) -> None:
    assert read_row(FORMS[name])[0] == WANTED
    assert read_prompt(FORMS[name]) == WANTED.prompt


def test_alpacas_input_follows_its_instruction_and_earlier_turns_are_kept(tiny_base: Any) -> None:
    row = {
        "instruction": "Add.",
        "input": "3 and 4",
        "output": "7",
        "history": [["Add. 1, 1", "2"]],
    }
    example, form = read_row(row)
    assert example == Example("Add.\n3 and 4", "7", "", (("Add. 1, 1", "2"),))
    assert form == "instruction, output"
    said = [
        ASKED,
        ANSWERED,
        {"role": "user", "content": "and 5?"},
        {"role": "assistant", "content": "no"},
    ]
    example, _ = read_row({"messages": said})
    assert (example.prompt, example.answer) == ("and 5?", "no")
    assert example.before == (("Is 4 even?", "[True]"),)
    rendered = example_prompt(tiny_base.tokenizer, example, [("x", "y")])
    assert rendered == "x\ny\nIs 4 even?\n[True]\nand 5?\n"
    assert rendered == chat_prompt(
        tiny_base.tokenizer, "and 5?", "", [("x", "y"), ("Is 4 even?", "[True]")]
    )


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


BAD: list[tuple[Any, str]] = [
    ({"instruction": "x", "output": ""}, "has an empty 'output'"),
    ({"instruction": "x"}, "has no 'output'"),
    ({"instruction": "x", "input": 3, "output": "y"}, "has an 'input' that is no text"),
    ({"instruction": "x", "output": "y", "history": ["z"]}, "'history' that is no list of pairs"),
    ({"question": "x", "answer": 3}, "has an 'answer' that is no text"),
    ({"question": "x", "choices": ["a", "b"], "answer": "a"}, "has 'choices' beside its question"),
    (turns("user"), "do not go from user to assistant"),
    (turns("assistant", "user"), "do not go from user to assistant"),
    (turns("user", "user", "assistant"), "do not go from user to assistant"),
    (turns("user", "system", "user", "assistant"), "do not go from user to assistant"),
    (turns(), "do not go from user to assistant"),
    (turns("user", "tool", "assistant"), "a turn of 'tool'"),
    ({"messages": ["x"]}, "a turn that is a str"),
    ({"messages": [ASKED, {"role": "assistant", "content": None}]}, "'turn' that is no text"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWERED]},
        "'turn' that is no text",
    ),
    ({"prompt": "\ud800", "response": "y"}, "bytes in its 'prompt' that are no text"),
    ({"prompt": "x", "response": "y", "system": "\udfff"}, "bytes in its 'system'"),
    ({"prompt": "x\0", "response": "y"}, "bytes in its 'prompt' that are no text .* or a NUL"),
    ({"prompt": "x" * LONGEST, "response": "y"}, "has 20001 characters, 20000 is the limit"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "none of system, user, assistant"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_is_named_by_file_and_number(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadRow, match=message):
        read_row(row)
    file = tmp_path / "odd.jsonl"
    good = [json.dumps(one) for one in rows("river", 3)]
    file.write_text("\n".join([*good, json.dumps(row), "", good[0]]), encoding="utf-8")
    with pytest.raises(UserError, match=f"odd.jsonl has 1 bad rows: row 4 .*{message}"):
        read_rows(file)
    found, notes = read_rows(file, RowRules(skip_bad=True))
    assert [row.number for row in found] == [1, 2, 3, 6] and notes[-1].startswith("row 4 of odd")


def test_lines_lists_marks_and_suffixes_are_told_apart_by_content(tmp_path: Path) -> None:
    content = rows("caf\u00e9", 12)
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in content)
    texts = {
        "list.json": json.dumps(content),
        "lines.jsonl": f"{lines}\r\n\r\n",
        "lines_in.json": lines,
        "list_in.jsonl": json.dumps(content, indent=1),
        "separator.jsonl": lines.replace("number", "number\u2028"),
    }
    for name, text in texts.items():
        for mark in ("", "\ufeff"):
            (tmp_path / name).write_text(mark + text, encoding="utf-8", newline="")
            found = read_rows(tmp_path / name)[0]
            assert len(found) == 12 and "caf\u00e9" in found[0].example.prompt
        (tmp_path / name).write_bytes(codecs.BOM_UTF16_LE + text.encode("utf-16-le"))
        assert len(read_rows(tmp_path / name)[0]) == 12
    dataset = read_dataset(tmp_path, "lines")
    assert dataset.kind == "choice" and sum(map(len, dataset.rows.values())) == 12


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", "[" * 100_000, "nested too deeply"),
        ("x.json", "[" + "9" * 5000 + "]", "cannot be read as JSON"),
        ("x.json", '[{"prompt": "a", "resp', "cannot be read as JSON"),
        ("x.json", '{"prompt": "a", "response": "b"}', "holds no list"),
        ("x.jsonl", '{"prompt": "a", "resp', "row 1 is no JSON"),
        ("x.jsonl", '"a"\n3', "row 1 is a str and no object, row 2 is a int"),
        ("x.json", codecs.BOM_UTF16_LE.decode("latin-1") + "\x00\xd8", "cannot be read as JSON"),
    ],
)
def test_files_that_hold_no_rows_are_refused(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / name)


def test_bytes_that_are_no_utf8_are_bad_rows(tmp_path: Path) -> None:
    text = json.dumps(
        [*rows("river", 2), {"prompt": "caf\u00e9", "response": "x"}], ensure_ascii=False
    )
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="x.json has 1 bad rows: row 3 has bytes in its 'prompt'"):
        read_rows(tmp_path / "x.json")


def test_the_limit_of_a_row_is_an_option_and_part_of_the_suite(tmp_path: Path) -> None:
    long = {"prompt": "y" * 200_000, "response": "[A]"}
    write_rows(tmp_path, "river", [*rows("river", 20), long])
    with pytest.raises(UserError, match="row 21 has 200003 characters.*--longest-row"):
        FileSuite.open(tmp_path, ["river"])
    skipping, whole = RowRules(skip_bad=True), RowRules(longest=300_000)
    suites = [FileSuite.open(tmp_path, ["river"], rules=rules) for rules in (skipping, whole)]
    assert [sum(map(len, s.datasets["river"].rows.values())) for s in suites] == [20, 21]
    assert suites[0].fingerprint != suites[1].fingerprint
    with pytest.raises(UserError, match="at least 1"):
        RowRules(longest=0)


def test_a_dataset_in_two_formats_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path, "river", rows("river", 20))
    (tmp_path / "river.jsonl").write_text("{}")
    with pytest.raises(UserError, match="holds river.json and river.jsonl"):
        read_dataset(tmp_path, "river")


ARC = "Which conducts?\nA: wood\nB: copper\nC: glass"
PROMPTS: dict[str, tuple[str, list[str], str]] = {
    "lines": ("one\ntwo\n\n", ["one", "two"], "one a line"),
    "lines apart": ("one\n\ntwo\n \nthree", ["one", "two", "three"], "one a line"),
    "marks": ("\ufeffone\r\ntwo\r\n", ["one", "two"], "one a line"),
    "numbered": ("1. one\n2. two\n3. three", ["1. one", "2. two", "3. three"], "one a line"),
    "paragraphs": (f"{ARC}\n\n{ARC}2\n\n\n{ARC}3", [ARC, f"{ARC}2", f"{ARC}3"], "blank lines"),
    "one question": (f"{ARC}\n", [ARC], "with its choices"),
    "list": (json.dumps([ARC, "two"]), [ARC, "two"], "of JSON"),
    "rows": (json.dumps([{"prompt": ARC, "response": "[B]"}]), [ARC], "of JSON"),
    "named": (json.dumps({"prompts": [ARC, "two"]}), [ARC, "two"], "of JSON"),
    "json lines": (f"{json.dumps(ARC)}\n{json.dumps('two')}\n", [ARC, "two"], "JSON value a line"),
    "object lines": (
        '{"instruction": "a", "input": "b"}\n{"prompt": "c"}',
        ["a\nb", "c"],
        "a line",
    ),
    "turns": (json.dumps([{"messages": [ASKED]}]), ["Is 4 even?"], "of JSON"),
    "bracket lines": (
        "[3, 1] sort =>\n[2] sort =>",
        ["[3, 1] sort =>", "[2] sort =>"],
        "one a line",
    ),
    "a list of numbers": ("[3, 1, 2]", ["[3, 1, 2]"], "one a line"),
    "separator": ("one\u2028still one\ntwo", ["one\u2028still one", "two"], "one a line"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_parted_as_their_file_says(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, wanted, how = PROMPTS[name]
    file = tmp_path / "prompts.txt"
    file.write_text(text, encoding="utf-8", newline="")
    assert read_prompts(file) == wanted
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{len(wanted)} prompts" in said and how in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no prompt"),
        (b" \n\n", "no prompt"),
        (b"[]", "no prompt"),
        (b'["", " "]', "no prompt"),
        (b'["a", "\\ud800"]', "prompt 2 of .* holds bytes that are no text"),
        (b"a\nb\xff\n", "prompt 2 of .* holds bytes that are no text"),
        ("first\nsecond".encode("utf-16-le"), "prompt 1 of .* or a NUL"),
        (b'["a", "b\\u0000"]', "prompt 2 of .* or a NUL"),
        (b'{"prompts": "a b"}', "the 'prompts' of .* is a str: give a list"),
        (b'{"prompts": "a", "instruction": 3}', "prompt 1 of .* 'instruction' that is no text"),
        (b'["a", 3]', "prompt 2 of .* is a int"),
        (b'[{"response": "a"}]', "prompt 1 of .* has no 'prompt'"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "no turn of a user"),
        (b'["' + b"x" * 200_000 + b'"]', "prompt 1 of .* has 200000 characters"),
        (f"{ARC}\n{ARC}".encode(), "put a blank line between two"),
        (codecs.BOM_UTF16_LE + b"a", "no UTF-8 text"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused_by_number(
    content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / "prompts.txt")


def test_a_torn_json_file_is_no_list_of_lines(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text('["a",\n"b')
    for path in (tmp_path / "prompts.json", tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match="cannot (be )?read"):
            read_prompts(path)


@pytest.mark.parametrize("content", ["3", "null", "[3, 1, 2]", '[["a", "b"], ["c"]]', "true"])
def test_a_json_file_without_a_text_holds_no_prompt(content: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(content)
    with pytest.raises(UserError, match="is JSON without a prompt"):
        read_prompts(tmp_path / "prompts.json")


def test_a_text_is_no_list_of_prompts() -> None:
    for given, message in (("one", "is a str"), ([], "no prompt"), ([3], "prompt 1 .* is a int")):
        with pytest.raises(UserError, match=message):
            check_prompts(given)
    assert check_prompts(["\ufeffone \n", " "]) == ["one"]


def test_prompts_beside_an_adapter_and_for_one_task_may_have_many_lines(
    tiny_base: Any, tiny_spec: Any, tiny_adapters: Any, tmp_path: Path
) -> None:
    source = tmp_path / "one"
    save_adapter(
        source, tiny_adapters.to_state_dicts()[0], adapter_config(tiny_spec, tiny_base.path)
    )
    questions = [f"{ARC}{number}" for number in range(3)]
    wanted = {"train": questions[:2], "evaluation": questions[2:]}
    options = ImportOptions(trajectories=1, max_tokens=1)
    given = tmp_path / "given.txt"
    given.write_text("\ufeff" + "\n\n".join(questions), encoding="utf-8")
    bank = import_bank([str(source)], tiny_base, tmp_path / "bank-0", options, given)
    assert bank.prompts("one_0") == wanted
    files = {
        "prompts.txt": given.read_text(encoding="utf-8"),
        "prompts.jsonl": "\n".join(map(json.dumps, questions)),
        "prompts.json": json.dumps([{"prompt": question} for question in questions]),
    }
    for number, (name, text) in enumerate(files.items(), 1):
        (source / name).write_text(text, encoding="utf-8")
        bank = import_bank([str(source)], tiny_base, tmp_path / f"bank-{number}", options)
        assert bank.prompts("one_0") == wanted
        (source / name).unlink()
    (source / "prompts.json").write_text('["a", "b", "\\ud800"]')
    with pytest.raises(UserError, match="prompt 1 of .*prompts.json holds bytes"):
        import_bank([str(source)], tiny_base, tmp_path / "bank", options)
    shutil.copytree(source, tmp_path / "two")
    with pytest.raises(UserError, match="holds the prompts of one task, and there are one, two"):
        sources = [str(source), str(tmp_path / "two")]
        import_bank(sources, tiny_base, tmp_path / "bank", options, given)
    assert not (tmp_path / "bank").exists()


def test_too_few_rows_for_teachers_are_said_before_anything_is_trained(
    tiny_base: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path, "river", rows("river", 24))
    suite = FileSuite.open(tmp_path, ["river"])
    teachers = TeacherConfig(1, 2.0, per_task=13, steps=1, examples=1)
    lowered = fitted(teachers, suite)
    assert lowered.condition_evaluation == 6 and "has 6 prompts" in capsys.readouterr().err
    assert fitted(lowered, suite) == lowered and not capsys.readouterr().err
    out = tmp_path / "bank"
    for config, message in (
        (replace(teachers, per_task=2), "16 rows of river asked for"),
        (lowered, "13 runs a dataset .* has 12 rows"),
    ):
        with pytest.raises(UserError, match=message):
            make_bank(tiny_base, suite, SFTConfig(config, checkpoints=1, every=1), out)
        assert not out.exists()
