from __future__ import annotations

import ast
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, write_minilm_bundle

# A module imports only from those before it. A new module gets its place here.
ORDER = (
    "runtime system probes losses tasks client lora models teachers delta functional generator dataset world "
    "evaluation terms training estimate commands __main__"
).split()
SOURCES = sorted((ROOT / "llgbm").rglob("*.py"))
SHIPPED = (
    SOURCES + sorted((ROOT / "tuning").rglob("*.py")) + sorted((ROOT / "dnd_repo").rglob("*.py"))
)


def module_of(path: Path) -> str:
    return path.relative_to(ROOT / "llgbm").with_suffix("").parts[0]


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names of all imports of a file, those inside functions too; relative ones are made absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(
                [*package[: len(package) - node.level + 1], node.module or ""] if node.level else []
            )
            yield from (
                f"{start or node.module}.{alias.name}".replace("..", ".") for alias in node.names
            )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_those_before_it(path: Path) -> None:
    own = module_of(path)
    if own == "__init__":
        return
    assert own in ORDER, f"give llgbm/{own} its place in ORDER"
    used = {name.split(".")[1] for name in imports_of(path) if name.startswith("llgbm.")}
    later = used - set(ORDER[: ORDER.index(own)]) - ({own} if path.parent.name == own else set())
    assert not later, f"{own} imports from {sorted(later)}, which stand after it"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_names_neither_ray_nor_mlflow_nor_what_knows_them(path: Path) -> None:
    allowed = {"tuning"} if module_of(path) in ("commands", "__main__") else set()
    assert (
        not {name.split(".")[0] for name in imports_of(path)}
        & {"ray", "mlflow", "tuning"} - allowed
    )


def owners(module: str) -> set[str]:
    """Files of the project that import a package, relative to its root."""
    named = {path.relative_to(ROOT).as_posix(): set(imports_of(path)) for path in SHIPPED}
    return {path for path, names in named.items() if any(n.split(".")[0] == module for n in names)}


def test_dnd_imports_nothing_of_ours() -> None:
    assert not [path for path in owners("llgbm") | owners("tuning") if path.startswith("dnd_repo/")]


def test_one_file_of_the_core_knows_the_registry() -> None:
    found = {path for path in owners("tuning") if path.startswith("llgbm/")}
    assert found == {"llgbm/commands/generators.py"}


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize(
    ("own", "expected"), [({}, ["PASSIVE", "10000"]), ({"GOMP_SPINCOUNT": "7"}, ["PASSIVE", "7"])]
)
def test_waiting_threads_spin_for_a_moment_unless_the_user_says_how_long(
    own: dict[str, str], expected: list[str]
) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    code = f"import os, llgbm; print(*(os.environ[name] for name in {names}))"
    environment = {name: value for name, value in os.environ.items() if name not in names} | own
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == expected


def test_importing_the_package_loads_next_to_nothing() -> None:
    code = "import sys, llgbm; print([m for m in ('ray', 'mlflow', 'torch', 'transformers') if m in sys.modules])"
    assert run(code) == "[]"


HEAVY = (
    "torch transformers sentence_transformers mlflow ray peft scipy.stats optuna matplotlib".split()
)


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["--help"], set()),
        (["generate", "--help"], set()),
        (["models", "list"], {"mlflow"}),
        (["generate", "--model", "bundle", "--prompts", "prompts.txt", "--out", "out"], {"torch"}),
    ],
    ids=["help", "help of generate", "models list", "generate"],
)
def test_a_command_loads_the_libraries_that_it_needs(
    arguments: list[str], needed: set[str], tmp_path: Path
) -> None:
    """MLflow, Ray, transformers and PEFT take seconds each; what a command does not use it does not load."""
    write_minilm_bundle(tmp_path / "bundle")
    (tmp_path / "prompts.txt").write_text("give the last word: red green blue")
    (tmp_path / "mlruns").mkdir()
    sqlite3.connect(tmp_path / "mlruns" / "mlflow.db").close()
    code = (
        "import sys; from llgbm.__main__ import main\ntry: main(sys.argv[1:])\nfinally: "
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    loaded = set(ast.literal_eval(done.stdout.splitlines()[-1]))
    assert done.returncode == 0 and loaded == needed, (loaded, done.stderr)


def test_every_core_module_imports_where_ray_and_mlflow_are_not_installed() -> None:
    code = (
        "import sys, pkgutil, importlib; sys.modules.update(ray=None, mlflow=None, tuning=None); import llgbm;"
        "names = [m.name for m in pkgutil.walk_packages(llgbm.__path__, 'llgbm.')];"
        "[importlib.import_module(n) for n in names];"
        "print(len(names), [m for m in sys.modules if m.split('.')[0] in ('ray', 'mlflow') and sys.modules[m]])"
    )
    count, loaded = run(code).split(" ", 1)
    assert loaded == "[]" and int(count) >= len(ORDER)


def dotted(node: ast.AST) -> str:
    return (
        f"{dotted(node.value)}.{node.attr}"
        if isinstance(node, ast.Attribute)
        else getattr(node, "id", "")
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_edits_the_path_changes_folder_or_runs_what_it_reads(path: Path) -> None:
    tree = ast.parse(path.read_text())
    used = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | set(
        imports_of(path)
    )
    assert not used & {
        "sys.path",
        "os.chdir",
        "site.addsitedir",
        "pickle",
        "dill",
        "joblib",
        "pickle.load",
    }
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        given = {word.arg: getattr(word.value, "value", word.value) for word in call.keywords}
        assert given.get("trust_remote_code", False) is False
        assert given.get("allow_pickle", False) is False
        if dotted(call.func) in ("torch.load", "load_state_dict_from_url"):
            assert given.get("weights_only") is True


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("def f():\n    from llgbm.world import World", {"llgbm.world.World"}),
        ("from llgbm import world", {"llgbm.world"}),
        ("from . import world", {"llgbm.world"}),
        ("from .world import World", {"llgbm.world.World"}),
        ("import llgbm.world as w", {"llgbm.world"}),
    ],
)
def test_the_walk_sees_every_spelling_of_an_import(
    code: str, names: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "llgbm").mkdir()
    (tmp_path / "llgbm" / "example.py").write_text(code)
    assert set(imports_of(tmp_path / "llgbm" / "example.py")) == names
