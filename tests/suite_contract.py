"""Contract of every suite of tasks; a subclass gives a fixture and inherits the tests."""

from __future__ import annotations

import pickle
import random
from itertools import chain

import pytest

from llgbm.runtime import UserError, content_hash
from llgbm.tasks.suite import WHOLE, Example, Purpose, Suite

COUNT = 8


class SuiteContract:
    """The subclass gives the fixture `suite`, and says if bases are built for it."""

    builds_a_base = True

    def ask(
        self, suite: Suite, task: str, purpose: Purpose = "train", stream: str = "s"
    ) -> list[Example]:
        return suite.examples(task, purpose, min(COUNT, suite.available(purpose)), stream)

    def test_every_task_of_a_part_is_a_task_of_the_suite(self, suite: Suite) -> None:
        names = [task.name for task in suite.tasks]
        assert len(names) == len(set(names)) and all(suite.split.train)
        assert len(suite.split.train) >= 2 and suite.split.val and suite.split.test
        assert set(suite.split.tasks) <= set(names)
        levels = chain.from_iterable(level.tasks for level in suite.levels)
        assert set(levels) <= set(names)
        assert [suite.task(name).name for name in names] == names

    def test_sealed_tasks_stand_nowhere_else(self, suite: Suite) -> None:
        open_ones, sealed = set(suite.split.tasks), set[str]()
        for level in suite.levels:
            (sealed if level.is_sealed else open_ones).update(level.tasks)
        assert not open_ones & sealed

    def test_a_stream_gives_the_same_examples_again(self, suite: Suite) -> None:
        for task in suite.split.tasks[:4]:
            assert self.ask(suite, task) == self.ask(suite, task)
            assert all(e.prompt and e.answer for e in self.ask(suite, task))

    def test_no_training_example_is_asked_at_evaluation(self, suite: Suite) -> None:
        for task in suite.split.tasks[:4]:
            streams = ("a", "b", "c")
            taught = {e.prompt for s in streams for e in self.ask(suite, task, "train", s)}
            for purpose in ("prompts", "evaluation"):
                asked = {e.prompt for s in streams for e in self.ask(suite, task, purpose, s)}
                assert asked and not taught & asked

    def test_shares_of_the_training_examples_are_apart(self, suite: Suite) -> None:
        task, count = suite.split.train[0], min(COUNT, suite.available("train") // 2)
        first, second = (suite.examples(task, "train", count, "s", (k, 2)) for k in (0, 1))
        assert len(first) == len(second) == count > 0
        assert first != second

    def test_levels_have_examples(self, suite: Suite) -> None:
        for level in suite.levels:
            for purpose in ("prompts", "evaluation"):
                assert len(suite.level_examples(level.name, level.tasks[0], purpose, 3)) == 3
            assert level.meaning

    def test_an_unknown_task_is_one_sentence(self, suite: Suite) -> None:
        for refused in (suite.task, lambda name: suite.examples(name, "train", 1, "s", WHOLE)):
            with pytest.raises(UserError, match="no-such-task"):
                refused("no-such-task")

    def test_it_is_a_value(self, suite: Suite) -> None:
        again = pickle.loads(pickle.dumps(suite))
        assert again == suite and again.fingerprint == suite.fingerprint
        assert content_hash(again) == content_hash(suite)
        task = suite.split.train[0]
        assert self.ask(again, task) == self.ask(suite, task)

    def test_its_probes_and_nonsense_are_texts(self, suite: Suite) -> None:
        assert all(suite.probe_prompts) and len(suite.nonsense_prompts) >= 16
        assert all(isinstance(example, Example) for example in suite.probe_examples)
        known = {e.prompt for task in suite.split.tasks[:4] for e in self.ask(suite, task)}
        assert not known & set(suite.nonsense_prompts)

    def test_a_base_can_learn_its_language(self, suite: Suite) -> None:
        if not self.builds_a_base:
            with pytest.raises(UserError, match="no base is built"):
                _ = suite.vocabulary
            return
        known = {word.strip() for word in suite.vocabulary}
        rng = random.Random(0)
        learnt = [suite.pretraining_example(rng, bare) for bare in (True, False)]
        told = suite.told_examples(1)
        assert not told or list(told) == [task.name for task in suite.tasks]
        asked = self.ask(suite, suite.split.test[0], "evaluation")
        for example in [*learnt, *chain.from_iterable(told.values()), *asked]:
            assert set(f"{example.prompt}{example.answer}".split()) <= known

    def test_toy_settings_keep_the_kind(self, suite: Suite) -> None:
        toy = suite.toy()
        assert type(toy) is type(suite) and len(toy.tasks) <= len(suite.tasks)
        assert type(suite.with_seed(3)) is type(suite)
