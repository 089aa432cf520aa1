"""Tasks, their examples and their split into train, validation and test. Knows texts; knows no model."""

from __future__ import annotations

from llgbm.tasks.files import FileSuite
from llgbm.tasks.suite import Example, Split, Suite, Task
from llgbm.tasks.synthetic import SyntheticSuite

__all__ = ["Example", "FileSuite", "Split", "Suite", "SyntheticSuite", "Task", "make_suite"]


def make_suite(name: str) -> Suite:
    """Make a suite by name. Raises UserError for an unknown one."""
    from llgbm.runtime import UserError

    suites = {"synthetic": SyntheticSuite}
    if name not in suites:
        raise UserError(f"unknown suite {name!r}; there is: {', '.join(suites)}")
    return suites[name]()
