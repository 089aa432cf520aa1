"""`try` shows what base and adapters answer, in a terminal and on a page that no answer can break out of."""

from __future__ import annotations

import html
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from output_checks import one_sentence
from peft import PeftModel
from transformers import AutoModelForCausalLM

from llgbm.__main__ import main
from llgbm.evaluation.transcripts import (
    FORMAT_VERSION,
    Section,
    Transcript,
    as_table,
    from_json,
    html_page,
    printable,
)
from llgbm.models.load import Base
from llgbm.models.scoring import Continuation

PROMPTS = ["reverse it : guitar piano =>", "count : red green blue =>"]


class Texts(HTMLParser):
    """Tags of a page, and its text as a browser shows it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def peft_answers(base: Base, folder: Path) -> list[str]:
    """Answers to the prompts one by one, by PEFT and the library's own generate."""
    model: Any = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(folder)).eval()
    found = []
    for prompt in PROMPTS:
        ids = base.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            written = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        found.append(base.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def test_answers_are_those_of_peft(source: Path, tiny_base: Base, user: Path, capsys: Any) -> None:
    (user / "prompts.txt").write_text("\n".join(PROMPTS))
    command = ["try", "--adapter", f"first={source / 'one'}", str(source / "two")]
    command += ["--prompts", "prompts.txt", "--max-tokens", "6", "--out", "page"]
    assert main(command) == 0
    table = capsys.readouterr().out
    data = json.loads((user / "page" / "answers.json").read_text())
    assert data["version"] == FORMAT_VERSION
    (section,) = from_json(data) and data["sections"]
    assert [own["prompt"] for own in section["transcripts"]] == PROMPTS
    for name, folder in (("first", source / "one"), ("two", source / "two")):
        got = [own["answers"][name]["text"] for own in section["transcripts"]]
        assert got == peft_answers(tiny_base, folder)
    answers = [own["answers"] for own in section["transcripts"]]
    assert any(own["base"] != own["first"] != own["two"] for own in answers)
    page = Texts((user / "page" / "answers.html").read_text())
    for text in ("base", "first", "two", *PROMPTS, answers[0]["first"]["text"].strip()):
        assert text in page.text and text.split()[0] in table
    assert main(command) == 0


def test_a_chat_is_asked_in_the_template_of_the_base(
    source: Path, tiny_base: Base, user: Path, capsys: Any
) -> None:
    shutil.copytree(tiny_base.path, user / "base")
    config = json.loads((user / "base" / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}reverse it : {{ m.content }} =>{% endfor %}"
    (user / "base" / "tokenizer_config.json").write_text(json.dumps(config))
    (user / "prompts.txt").write_text("guitar piano")
    command = [
        "try",
        "--adapter",
        str(source / "one"),
        "--prompts",
        "prompts.txt",
        "--base",
        "base",
    ]
    command += ["--max-tokens", "6", "--chat", "--out", "page"]
    assert main(command) == 0, capsys.readouterr().err
    data = json.loads((user / "page" / "answers.json").read_text())
    (own,) = data["sections"][0]["transcripts"]
    assert own["answers"]["one"]["text"] == peft_answers(tiny_base, source / "one")[0]


HOSTILE = "<script>alert(1)</script> & \"'</pre>\x1b[31m\u202e"


def test_no_text_can_break_out_of_a_page_or_a_table() -> None:
    answers = {HOSTILE: Continuation(HOSTILE, True), "plain": Continuation(" ", False)}
    one = Transcript(HOSTILE, answers, HOSTILE)
    page = html_page(HOSTILE, HOSTILE, [Section(HOSTILE, [one])])
    read = Texts(page)
    assert "script" not in read.tags and read.text.count("alert(1)") == 8
    assert "(nothing)" in read.text and "[…]" in read.text
    shown = as_table([one], 200)
    assert "[…]" in shown and page.count('<pre class="same">') == 1
    for text in (page, shown):
        assert "\x1b" not in text and "\u202e" not in text
    assert html.unescape(printable("a\nb")) == "a\nb"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--max-tokens", "0"], "at least 1"),
        (["--adapter", "base={one}"], "two systems are called base"),
        (["--adapter", "nowhere"], "nowhere holds no adapter_config.json"),
        (["--prompts", "none.txt"], "none.txt"),
        (["--out", "taken"], "did not write"),
    ],
)
def test_what_cannot_be_tried_is_one_sentence(
    change: list[str], words: str, source: Path, user: Path, capsys: Any
) -> None:
    (user / "prompts.txt").write_text("\n".join(PROMPTS))
    (user / "taken").mkdir()
    (user / "taken" / "answers.html").write_text("mine")
    options = ["--adapter", str(source / "one"), "--prompts", "prompts.txt"]
    given = [word.format(one=source / "one") for word in change]
    assert main(["try", *options, *given]) == 2
    assert words in one_sentence(capsys)
