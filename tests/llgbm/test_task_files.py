"""Datasets in files: what is read, how rows are parted, what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from helpers import SHARED, SYSTEM, rows, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from llgbm.models.encoding import chat_prompt, encode_pairs
from llgbm.runtime import UserError
from llgbm.tasks.files import FileSuite, dataset_files, datasets_in, plan_split, read_dataset
from llgbm.tasks.forms import RowRules
from llgbm.tasks.rows import read_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path, "river_train", rows("river", 40))
    write_rows(tmp_path, "river_test", rows("river", 20, start=100))
    write_rows(tmp_path, "stone", rows("stone", 60))
    write_rows(
        tmp_path,
        "cloud_validation",
        [{"prompt": f"is {i} even?", "response": f"[{i % 2 == 0}]"} for i in range(50)],
    )
    write_rows(
        tmp_path,
        "sums",
        [{"prompt": f"What is {i} + 1?", "response": f"The answer is {i + 1}."} for i in range(50)],
    )
    write_rows(tmp_path, "tiger_train", rows("tiger", 30))
    write_rows(tmp_path, "tiger_test", rows("tiger", 30, start=100))
    return tmp_path


def open_all(folder: Path, **more: Any) -> FileSuite:
    return FileSuite.open(folder, ["river", "cloud", "sums"], ["stone"], ["tiger"], **more)


def test_datasets_are_found_by_their_files(folder: Path) -> None:
    assert datasets_in(folder) == ["cloud", "river", "stone", "sums", "tiger"]
    assert [p and p.name for p in dataset_files(folder, "river")] == [
        "river_train.json",
        "river_test.json",
    ]
    assert [p and p.name for p in dataset_files(folder, "cloud")] == ["cloud_validation.json", None]
    write_rows(
        folder, "cloud_test", [{"prompt": f"is {i} odd?", "response": "[True]"} for i in range(20)]
    )
    assert [p and p.name for p in dataset_files(folder, "cloud")] == [
        "cloud_validation.json",
        "cloud_test.json",
    ]


def test_no_row_serves_two_purposes_and_no_limit_moves_one(folder: Path) -> None:
    for name in datasets_in(folder):
        whole = read_dataset(folder, name)
        keys = [{row.key for row in found} for found in whole.rows.values()]
        assert not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])
        assert sum(map(len, whole.rows.values())) == sum(len(set(own)) for own in keys)
        part = read_dataset(folder, name, limit=16)
        assert [len(found) for found in part.rows.values()] == [8, 4, 4]
        assert all(set(part.rows[purpose]) <= set(whole.rows[purpose]) for purpose in part.rows)


def test_shares_of_the_training_rows_do_not_overlap_and_cover_all(folder: Path) -> None:
    suite = open_all(folder)
    shares = [
        {e.prompt for e in suite.examples("river", "train", 200, "teacher", (k, 3))}
        for k in range(3)
    ]
    assert not (shares[0] & shares[1] or shares[0] & shares[2] or shares[1] & shares[2])
    assert set.union(*shares) == {
        row.example.prompt for row in suite.datasets["river"].rows["train"]
    }


@given(st.integers(1, 150), st.integers(1, 150), st.text(max_size=5))
@settings(max_examples=30, deadline=None)
def test_more_examples_begin_with_the_fewer_and_every_round_gives_each_row_once(
    first: int, second: int, stream: str
) -> None:
    suite = SUITE_OF_REAL_SHAPE[0]
    few, many = (suite.examples("river", "train", n, stream) for n in sorted((first, second)))
    assert many[: len(few)] == few
    counts = [few.count(e) for e in {e.prompt: e for e in few}.values()]
    assert max(counts) - min(counts) <= 1


SUITE_OF_REAL_SHAPE: list[FileSuite] = []


@pytest.fixture(scope="module", autouse=True)
def opened(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("datasets")
    write_rows(folder, "river", rows("river", 40))
    SUITE_OF_REAL_SHAPE[:] = [FileSuite.open(folder, ["river"])]


def test_a_suite_is_a_value_that_its_folder_takes_no_part_in(
    folder: Path, tmp_path_factory: Any
) -> None:
    other = tmp_path_factory.mktemp("moved")
    for path in folder.glob("*.json"):
        (other / path.name).write_bytes(path.read_bytes())
    here, there = open_all(folder), open_all(other)
    assert here == there and hash(here) == hash(there) and here.fingerprint == there.fingerprint
    assert here.examples("river", "train", 5, "x") == there.examples("river", "train", 5, "x")
    assert here.fingerprint != open_all(folder, limit=16).fingerprint
    assert (
        here.fingerprint
        != FileSuite.open(folder, ["river", "cloud", "sums"], ["tiger"], ["stone"]).fingerprint
    )
    carried = pickle.dumps(here)
    assert len(carried) < 2000 and pickle.loads(carried).fingerprint == here.fingerprint
    write_rows(other, "river_test", rows("river", 21, start=100))
    assert open_all(other).fingerprint != here.fingerprint
    with pytest.raises(UserError, match="changed since"):
        _ = pickle.loads(pickle.dumps(there)).datasets


def test_kinds_prompts_and_limits(folder: Path) -> None:
    suite = open_all(folder)
    assert {t.name: t.family for t in suite.tasks} == {
        "river": "choice",
        "cloud": "truth",
        "sums": "number",
        "stone": "choice",
        "tiger": "choice",
    }
    assert suite.available("evaluation") == 10
    with pytest.raises(UserError, match="11 rows of river asked for"):
        suite.examples("river", "evaluation", 11, "x")
    held_out = {
        row.example.prompt
        for n in ("stone", "tiger")
        for r in suite.datasets[n].rows.values()
        for row in r
    }
    assert len(suite.probe_prompts) == 8 and not set(suite.probe_prompts) & held_out
    assert {e.system for e in suite.probe_examples} == {SYSTEM, ""}
    assert not any(
        "tiger" in p or "stone" in p for p in (*suite.nonsense_prompts, *suite.probe_prompts)
    )


@pytest.mark.parametrize("ending", ["valid", "val", "dev"])
def test_a_validation_file_by_another_name_is_no_dataset_of_its_own(
    folder: Path, ending: str
) -> None:
    (folder / "cloud_validation.json").rename(folder / f"cloud_{ending}.json")
    assert f"cloud_{ending}" not in datasets_in(folder)
    found = dataset_files(folder, "cloud")
    assert [p and p.name for p in found] == [f"cloud_{ending}.json", None]


def test_validation_is_picked_among_those_answered_alike(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = plan_split(folder, ["river", "stone", "cloud"], ["tiger"], None)
    assert (split.train, split.val, split.test) == (("river", "cloud"), ("stone",), ("tiger",))
    assert "stone" in capsys.readouterr().err
    assert plan_split(folder, ["river", "cloud"], ["tiger"], ["cloud"]).train == ("river",)
    for tasks, held_out, validation, message in (
        (["river", "stone"], [], None, "--held-out"),
        (["river"], ["tiger"], None, "too few"),
        ([], ["tiger"], None, "too few"),
        (["river", "tiger", "stone"], ["tiger"], ["stone"], "held out and trained"),
    ):
        with pytest.raises(UserError, match=message):
            plan_split(folder, tasks, held_out, validation)


BAD = [
    ({"response": "[A]"}, "has no 'prompt'"),
    ({"prompt": "x", "system": ""}, "has no 'response'"),
    ({"prompt": " ", "response": "[A]"}, "has an empty 'prompt'"),
    ({"prompt": "x", "response": ""}, "has an empty 'response'"),
    ({"prompt": "x", "response": 3}, "has a 'response' that is no text"),
    ({"prompt": "x", "response": "[A]", "system": 3}, "has a 'system' that is no text"),
    ("x", "is a str and no object"),
    (None, "is a NoneType and no object"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_rows_are_named_with_file_and_number_or_left_out_on_demand(
    row: Any, message: str, folder: Path
) -> None:
    write_rows(folder, "river_train", [*rows("river", 20), row, *rows("river", 20, start=20)])
    with pytest.raises(UserError, match=f"river_train.json has 1 bad rows: row 21 {message}"):
        read_dataset(folder, "river")
    found, notes = read_rows(folder / "river_train.json", RowRules(skip_bad=True))
    assert len(found) == 40 and notes == [f"row 21 of river_train.json {message}: left out"]
    assert found[20].number == 22


@pytest.mark.parametrize(
    ("content", "message"), [("{", "JSON"), ("{}", "no list"), ("[]", "0 \\+ 0"), ("\xff", "JSON")]
)
def test_files_that_are_no_dataset_are_refused(content: str, message: str, folder: Path) -> None:
    (folder / "stone.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        read_dataset(folder, "stone")


def test_what_is_not_there_is_named_with_what_is_near(folder: Path) -> None:
    with pytest.raises(UserError, match="'rivers'.*river"):
        FileSuite.open(folder, ["rivers"])
    with pytest.raises(UserError, match="no folder"):
        FileSuite.open(folder / "nothing", ["river"])
    with pytest.raises(UserError, match="named twice"):
        FileSuite.open(folder, ["river"], ["river"])


def reworded(row: dict[str, str]) -> dict[str, str]:
    """The same question, its choices in another order, with other blanks and other labels."""
    stem, *offered = row["prompt"].splitlines()
    turned = [f"{label}: {line[3:]}" for label, line in zip("1234", reversed(offered), strict=True)]
    spaced = stem.replace(" ", "\u00a0\t ")
    return {**row, "prompt": "\n".join([f"\ufeff{spaced}", *turned]), "response": "[1]"}


@pytest.mark.parametrize("change", [dict, reworded])
@pytest.mark.parametrize(
    ("source", "target"),
    [("river_train", "tiger_test"), ("river_test", "stone"), ("stone", "tiger_train")],
)
def test_a_question_in_two_parts_of_the_split_is_refused(
    source: str, target: str, change: Any, folder: Path
) -> None:
    leaked = json.loads((folder / f"{source}.json").read_text())[7]
    write_rows(
        folder, target, [*json.loads((folder / f"{target}.json").read_text()), change(leaked)]
    )
    with pytest.raises(
        UserError, match=f"row 8 of {source}.json and row .* of {target}.json ask the same"
    ):
        open_all(folder, limit=8)


def test_files_with_the_same_questions_are_refused(folder: Path) -> None:
    write_rows(folder, "river_validation", [reworded(row) for row in rows("river", 20, start=100)])
    with pytest.raises(
        UserError, match="river_test.json and river_validation.json hold the same questions"
    ):
        open_all(folder)
    (folder / "river_validation.json").unlink()
    write_rows(folder, "river_test", rows("river", 30, start=5))
    with pytest.raises(
        UserError, match="river_train.json and river_test.json hold the same questions"
    ):
        open_all(folder)


def test_a_few_repeated_questions_are_left_out_and_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(
        folder,
        "river_test",
        [*rows("river", 20, start=100), *rows("river", 2), rows("river", 1, start=100)[0]],
    )
    suite = open_all(folder)
    assert "3 rows of river_test.json repeat an earlier question" in capsys.readouterr().err
    assert (
        len(suite.datasets["river"].rows["evaluation"])
        + len(suite.datasets["river"].rows["prompts"])
        == 20
    )


def test_the_real_files_open_without_a_leak() -> None:
    if not (SHARED / "data").is_dir():
        pytest.skip("../shared/data is absent: no real datasets to open")
    suite = FileSuite.open(
        SHARED / "data", ["ARC-e", "BoolQ", "GSM8K"], ["OBQA"], ["ARC-c", "WinoGrande"], limit=64
    )
    assert [t.family for t in suite.tasks] == [
        "choice",
        "truth",
        "number",
        "choice",
        "choice",
        "choice",
    ]
    with pytest.raises(
        UserError, match="CodeAlpaca-20K.json has 2 bad rows: row 7955 has an empty 'response'"
    ):
        read_dataset(SHARED / "data", "CodeAlpaca-20K")


def test_a_chat_is_what_the_tokenizers_own_template_makes_of_it_and_only_the_response_is_learnt() -> (
    None
):
    if not (SHARED / "qwen2.5").is_dir():
        pytest.skip("../shared/qwen2.5 is absent: no real tokenizer to render a chat with")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "qwen2.5")
    text = chat_prompt(tokenizer, "is 4 even?", SYSTEM, [("is 3 even?", "[False]")])
    assert text == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nis 3 even?<|im_end|>\n"
        "<|im_start|>assistant\n[False]<|im_end|>\n<|im_start|>user\nis 4 even?<|im_end|>\n<|im_start|>assistant\n"
    )
    turns = [{"role": "user", "content": "is 4 even?"}, {"role": "assistant", "content": "[True]"}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    pairs = encode_pairs(tokenizer, [(chat_prompt(tokenizer, "is 4 even?", ""), "[True]")])
    ids = tokenizer(whole.removesuffix("\n"), add_special_tokens=False)["input_ids"]
    assert pairs.input_ids_ST[0].tolist() == ids[:-1]
    learnt = [i for i in pairs.targets_ST[0].tolist() if i >= 0]
    assert tokenizer.decode(learnt) == "[True]<|im_end|>" and learnt == ids[-len(learnt) :]
    assert chat_prompt(tokenizer, "bare", None) == "bare"


def test_a_tokenizer_without_a_template_gets_lines(tiny_base: Any) -> None:
    assert chat_prompt(tiny_base.tokenizer, "q", "s", [("p", "a")]) == "s\np\na\nq\n"
    assert chat_prompt(tiny_base.tokenizer, "q", None, [("p", "a")]) == "paq"
