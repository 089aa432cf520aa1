"""Suites under one contract: the embedded one, datasets in files, and one that another package offers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from own_package import write_package
from suite_contract import SuiteContract

from llgbm.runtime import UserError
from llgbm.system.plugins import offered
from llgbm.tasks import FileSuite, SyntheticSuite, make_suite
from llgbm.tasks.suite import Suite
from llgbm.world import WorldConfig
from tuning.arguments import parse_arguments
from tuning.studies.own_world import custom_worlds


@pytest.fixture
def offering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a package of somebody else be found."""
    write_package(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    offered.cache_clear()
    yield
    sys.modules.pop("own_suite", None)
    offered.cache_clear()


class TestSynthetic(SuiteContract):
    @pytest.fixture(params=[0, 3])
    def suite(self, request: pytest.FixtureRequest) -> Suite:
        return SyntheticSuite().with_seed(request.param)


class TestToySynthetic(SuiteContract):
    @pytest.fixture
    def suite(self) -> Suite:
        return SyntheticSuite().toy()


class TestFiles(SuiteContract):
    builds_a_base = False

    @pytest.fixture
    def suite(self, tmp_path: Path) -> Suite:
        for task in ("river", "cloud", "stone", "tiger"):
            for part, count in (("train", 60), ("test", 40)):
                rows = [{"prompt": f"{task} {part} {i}?", "response": str(i)} for i in range(count)]
                (tmp_path / f"{task}_{part}.json").write_text(json.dumps(rows))
        return FileSuite.open(tmp_path, ["river", "cloud"], ["stone"], ["tiger"])


class TestOfAnotherPackage(SuiteContract):
    @pytest.fixture
    def suite(self, offering: None) -> Suite:
        return make_suite("repeats")


def test_a_suite_is_named_on_the_command_line(offering: None) -> None:
    def worlds(text: str) -> tuple[WorldConfig, ...]:
        return custom_worlds(parse_arguments(text.split()).study)

    (own,) = worlds("--suite repeats")
    assert own.suite == make_suite("repeats") and own.base is None and own.size == "nano"
    assert own.hash != WorldConfig().hash
    assert worlds("--suite synthetic") == (WorldConfig(),)
    assert [w.size for w in worlds("--suite repeats --model-size nano micro")] == ["nano", "micro"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "--suite nowhere",
            "unknown suite 'nowhere'; there are: synthetic, absent, plain, repeats",
        ),
        ("--suite plain", "'plain' is a Random, not a subclass of Suite"),
        ("--suite absent", "'absent' is offered as own_suite:Nothing, which cannot be imported"),
        ("--suite repeats --data .", "--suite and --data both name the tasks"),
    ],
)
def test_a_suite_that_cannot_be_is_refused(offering: None, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        custom_worlds(parse_arguments(text.split()).study)
