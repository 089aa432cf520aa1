"""Tasks, their examples and their split into train, validation and test. Knows texts; knows no model."""

from __future__ import annotations

from llgbm.tasks.files import FileSuite
from llgbm.tasks.suite import Example, Split, Suite, Task
from llgbm.tasks.synthetic import SyntheticSuite

__all__ = ["Example", "FileSuite", "Split", "Suite", "SyntheticSuite", "Task", "make_suite"]


def make_suite(name: str) -> Suite:
    """Make a suite by name: of this package, or of another by an entry point. Raises UserError for no such."""
    from llgbm.runtime import UserError
    from llgbm.system.plugins import SUITES, load_plugin, offered

    suites = {"synthetic": SyntheticSuite}
    maker = suites.get(name) or load_plugin(SUITES, name)
    if maker is None:
        known = ", ".join([*suites, *sorted(offered(SUITES))])
        raise UserError(f"unknown suite {name!r}; there are: {known}")
    suite = maker()
    if not isinstance(suite, Suite):
        raise UserError(f"the suite {name!r} is a {type(suite).__name__}, not a subclass of Suite")
    return suite
