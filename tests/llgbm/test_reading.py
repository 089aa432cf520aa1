"""Accuracy by reading: what held-out accuracy of datasets in files counts, held against `evaluate`."""

from __future__ import annotations

import json

import pytest

from llgbm.evaluation.benchmark import System, measure
from llgbm.lora import LoraBatch, LoraSpec
from llgbm.models.encoding import EncodedPairs
from llgbm.models.load import Base
from llgbm.models.reading import ANSWER_TOKENS, Question, Questions, suite_accuracy
from llgbm.models.scoring import encode_examples, exact_match
from llgbm.tasks.extraction import READING_VERSION
from llgbm.tasks.files import FileSuite
from llgbm.tasks.suite import Example
from llgbm.tasks.synthetic import SyntheticSuite
from llgbm.teachers.train import TeacherConfig, train_teachers

GOLDS = {
    "sums": [{"prompt": f"What is {i}?", "response": "2 + 2 = 4\n#### 4"} for i in range(16)],
    "pick": [{"prompt": f"Number {i}?\nA: river\nB: stone", "response": "[A]"} for i in range(16)],
    "code": [{"prompt": f"Say {i}.", "response": "the river"} for i in range(16)],
}
SAID = {"sums": "so 4", "pick": "river", "code": "river"}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> FileSuite:
    folder = tmp_path_factory.mktemp("golds")
    for name, content in GOLDS.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return FileSuite.open(folder, test=list(GOLDS))


@pytest.fixture(scope="module")
def taught(tiny_base: Base, suite: FileSuite) -> tuple[LoraSpec, LoraBatch]:
    """One adapter a task, each of which says the right answer in other words than the reference."""
    spec = LoraSpec.from_model(tiny_base.model, 4, 16.0)
    config = TeacherConfig(4, 16.0, steps=60, examples=4, learning_rate=3e-2)

    def at(step: int) -> EncodedPairs:
        shown: list[Example] = []
        for task, said in SAID.items():
            own = suite.examples(task, "evaluation", 4, f"shown {step}")
            shown += [Example(e.prompt, said, e.system) for e in own]
        return encode_examples(tiny_base, shown)

    return spec, train_teachers(tiny_base, spec, config, at)


def test_an_answer_in_other_words_is_right_as_evaluate_reads_it(
    tiny_base: Base,
    suite: FileSuite,
    taught: tuple[LoraSpec, LoraBatch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for kind in ANSWER_TOKENS:
        monkeypatch.setitem(ANSWER_TOKENS, kind, 8)
    spec, batch = taught
    tasks = list(GOLDS)
    examples = [suite.examples(task, "evaluation", 4, "benchmark") for task in tasks]
    found = suite_accuracy(tiny_base, suite, tasks, examples, taught).tolist()
    assert exact_match(tiny_base, spec, batch, examples).tolist() == [0.0, 0.0, 0.0]
    assert found == [1.0, 1.0, 0.0]  # "text" counts by exact match
    for row, task in enumerate(tasks):
        system = System("taught", batch.select([row]), spec)
        told = measure(tiny_base, suite, task, [system], 4)["systems"]["taught"]
        assert told["accuracy"] == found[row]
    alone = suite_accuracy(tiny_base, suite, tasks, examples)
    assert alone.tolist() == [
        measure(tiny_base, suite, task, [System("base")], 4)["systems"]["base"]["accuracy"]
        for task in tasks
    ]


def test_each_adapter_answers_its_own_questions(
    tiny_base: Base, suite: FileSuite, taught: tuple[LoraSpec, LoraBatch]
) -> None:
    spec, batch = taught
    turned = batch.select([1, 0])
    examples = [suite.examples(task, "evaluation", 2, "benchmark") for task in ("sums", "pick")]
    adapters = (spec, turned)
    assert suite_accuracy(tiny_base, suite, ["sums", "pick"], examples, adapters).tolist() == [0, 0]


def test_questions_are_read_by_kind_and_a_reference_without_an_answer_by_exact_match(
    tiny_base: Base, suite: FileSuite
) -> None:
    examples = [Example("How many?", "#### 4", ""), Example("How many?", "none", "")]
    questions = Questions.of(tiny_base.tokenizer, suite, ["sums"], examples)
    assert questions.items == (Question("number", "How many?\n", "How many?", "4"), None)
    assert questions.items[0].is_answered("It is 8/2.") and not questions.items[0].is_answered("5")
    assert questions.select([0], 1).items == questions.items[:1]
    synthetic = SyntheticSuite()
    assert synthetic.answer_kind(synthetic.tasks[0].name) == "text"
    assert not any(Questions.of(None, synthetic, ["a"], examples).items)


def test_how_answers_are_read_is_part_of_a_suites_name(
    suite: FileSuite, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = suite.fingerprint
    monkeypatch.setattr("llgbm.tasks.files.READING_VERSION", READING_VERSION + 1)
    del suite.__dict__["fingerprint"]
    assert suite.fingerprint != known
    monkeypatch.undo()
    del suite.__dict__["fingerprint"]
    assert suite.fingerprint == known
