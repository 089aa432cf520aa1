"""Plant defects in a copy of the program and see that the tests named beside each fail.

The tables in `tests/data/planted` take away, one by one, the mechanisms that make a case right. A test that passes
without its mechanism holds nothing.

    python tests/planted.py                  # every defect; a second or a few each
    python tests/planted.py adapters pissa   # those of a table, or with a word in their place or tests
"""

from __future__ import annotations

import ast
import functools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "tests" / "data" / "planted"
COPIED = ("llgbm", "tuning", "dnd_repo", "tests", "benchmarks", "pyproject.toml", "README.md")
# It builds the toy world that others find in the cache.
OF_THE_WORLD = "llgbm/test_identity.py::test_a_bank_that_was_built_is_named_by_its_weights"
# It makes the tables of an MLflow store, which others copy.
OF_THE_STORE = "tuning/test_resume.py::test_only_what_did_not_finish_is_run_again"
MADE_ONCE = ("cache", "empty-store")
# What every run would import again; none of it is this program.
LIBRARIES = ("torch", "transformers", "peft", "pytest", "safetensors.torch")
OF_STORES = (
    *("mlflow", "mlflow.store.tracking.sqlalchemy_store", "mlflow.server.handlers"),
    *("optuna", "matplotlib.figure", "scipy.stats", "hypothesis"),
)


@dataclass(frozen=True)
class Defect:
    """A text of the program, the wrong one in its place, and the tests that must then fail."""

    table: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.file}: {self.right.strip().splitlines()[0][:70]}"

    def check(self) -> None:
        """Raise ValueError where the program or the tests have moved on."""
        found = (ROOT / self.file).read_text(encoding="utf-8").count(self.right)
        if found != 1:
            raise ValueError(f"{self.table}: {found} places of {self.file} hold\n{self.right}")
        if unknown := [test for test in self.tests if test.partition("[")[0] not in all_tests()]:
            raise ValueError(f"{self.table}: there is no {unknown[0]}")

    @contextmanager
    def planted(self, copy: Path) -> Iterator[None]:
        """Change the copy while the block runs."""
        place = copy / self.file
        text, stamp = place.read_text(encoding="utf-8"), place.stat()
        place.write_text(text.replace(self.right, self.wrong), encoding="utf-8")
        try:
            yield
        finally:
            place.write_text(text, encoding="utf-8")
            os.utime(
                place, ns=(stamp.st_atime_ns, stamp.st_mtime_ns)
            )  # what was compiled holds again


@functools.cache
def places() -> dict[str, str]:
    """Return the files of tests by what follows `test_` in their names, which no two share."""
    found = (ROOT / "tests").rglob("test_*.py")
    return {
        path.stem.removeprefix("test_"): str(path.relative_to(ROOT / "tests")) for path in found
    }


@functools.cache
def all_tests() -> frozenset[str]:
    """Return the ids of all test functions, without their cases."""
    found = []
    for file in places().values():
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        found += [f"{file}::{name}" for name in names if name.startswith("test_")]
    return frozenset(found)


def read_table(path: Path) -> list[Defect]:
    """Read a table: below each file of the program its defects, with tests as `cases_data::an_answer_is_read[case]`."""
    found = []
    for file, rows in tomllib.loads(path.read_text(encoding="utf-8")).items():
        for row in rows:
            named = (name.partition("::") for name in row["tests"])
            tests = tuple(f"{places()[short]}::test_{name}" for short, _, name in named)
            found.append(Defect(path.stem, file, row["right"], row["wrong"], tests))
    return found


def all_defects() -> list[Defect]:
    return [defect for path in sorted(TABLES.glob("*.toml")) for defect in read_table(path)]


class Outcomes:
    """A pytest plugin that writes what became of each test into a file, test by test: a later one may hang."""

    def __init__(self, told: Path) -> None:
        self.told = told
        self.of: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.removeprefix("tests/")
        if report.outcome != "passed" or name not in self.of:
            self.of[name] = report.outcome
            part = self.told.with_suffix(".part")
            part.write_text(json.dumps(self.of), encoding="utf-8")
            os.replace(part, self.told)


def _child(copy: Path, base: Path, tests: Sequence[str], told: Path) -> None:
    """Run tests of the copy in this process, which ends with them."""
    import pytest

    os.setpgrp()
    log = os.open(base / "log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(copy)
    roots = [str(copy), str(copy / "dnd_repo" / "workspace")]
    sys.path[:0] = roots
    os.environ["PYTHONPATH"] = os.pathsep.join(roots)
    options = ["-n", "0", "-m", "", "-p", "no:cacheprovider", f"--basetemp={base / 'tmp' / 'gw0'}"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins that are loaded
    pytest.main([*options, *(f"tests/{test}" for test in tests)], plugins=[Outcomes(told)])
    sys.stdout.flush()
    os._exit(0)


class Field:
    """A copy of the program in a folder of its own, and runs of tests in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.copy = folder, folder / "copy"
        self.copy.mkdir()
        for name in COPIED:
            one = ROOT / name
            if one.is_dir():
                shutil.copytree(one, self.copy / name)
            else:
                shutil.copy(one, self.copy / name)
        if (ROOT.parent / "shared").exists():
            (folder / "shared").symlink_to(ROOT.parent / "shared")

    def run(self, tests: Sequence[str], seconds: float = 900) -> dict[str, str]:
        """Run tests in a process forked from this one; a defect may hang or kill it."""
        told = self.folder / "told.json"
        told.unlink(missing_ok=True)
        temporary = self.folder / "tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name in MADE_ONCE:  # by the program as it is
            if (self.folder / name).is_dir():
                shutil.copytree(self.folder / name, temporary / name)
        context = multiprocessing.get_context("fork")
        process = context.Process(target=_child, args=(self.copy, self.folder, tests, told))
        process.start()
        process.join(seconds)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)  # with the programs that it started
            process.join()
        return json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}

    def keep(self, test: str) -> None:
        """Run a test and keep what takes long to make for those that follow: the toy world, the tables of a store."""
        self.run([test])
        for name in MADE_ONCE:
            if (self.folder / "tmp" / name).is_dir() and not (self.folder / name).exists():
                shutil.copytree(self.folder / "tmp" / name, self.folder / name)

    def survivors(self, defect: Defect) -> list[str]:
        """Return the tests that do not fail with a defect planted; one that this machine skips is none."""
        with defect.planted(self.copy):
            outcomes = self.run(defect.tests)
        kinds = {test: kinds_of(test, outcomes) for test in defect.tests}
        return [test for test, own in kinds.items() if "failed" not in own and own != {"skipped"}]


def kinds_of(test: str, outcomes: Mapping[str, str]) -> set[str]:
    """Return the outcomes of a test in all its cases, or of the one case named."""
    return {own for case, own in outcomes.items() if case == test or case.startswith(f"{test}[")}


def source_of(test: str) -> str:
    return (ROOT / "tests" / test.partition("::")[0]).read_text(encoding="utf-8")


def prepare(more: Sequence[str] = ()) -> None:
    """Import the libraries once for all runs, and set what every run needs."""
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["PYTEST_XDIST_WORKER"] = "gw0"  # one cache for all runs, beside their own folders
    sys.dont_write_bytecode = True
    for name in (*LIBRARIES, *more):
        __import__(name)
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "Qwen2ForCausalLM"):
        getattr(sys.modules["transformers"], name)  # loaded when they are first asked for


def toothless(defects: Iterable[Defect], say: Any = print) -> list[str]:
    """Return what is wrong: tests that fail on the program as it is, and tests that pass on a wrong one."""
    defects = list(defects)
    for defect in defects:
        defect.check()
    tests = sorted({test for defect in defects for test in defect.tests})
    stores = any(test.startswith("tuning/") for test in tests)
    prepare(OF_STORES if stores else ())
    wrong = []
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        field = Field(Path(folder))
        if any("world: World" in source_of(test) for test in tests):
            field.keep(OF_THE_WORLD)
        if stores:
            field.keep(OF_THE_STORE)
        for number, defect in enumerate(defects, 1):
            lived = field.survivors(defect)
            say(f"{number}/{len(defects)} {'NOT SEEN' if lived else 'seen'} {defect.name}", *lived)
            wrong += [f"{test} passes with a defect in {defect.name}" for test in lived]
        outcomes = field.run(tests, seconds=1800)
        for test in tests:
            own = kinds_of(test, outcomes)
            if not own or "failed" in own:
                wrong.append(f"{test}: {own or 'did not run'} without a defect")
    return wrong


def main(words: Sequence[str]) -> int:
    defects = all_defects()
    if words:
        defects = [one for one in defects if any(w in f"{one.table} {one!r}" for w in words)]
    wrong = toothless(defects, functools.partial(print, flush=True))
    print("\n".join(wrong) or f"{len(defects)} defects, all seen", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
