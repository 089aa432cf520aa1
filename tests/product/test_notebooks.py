"""The notebooks: committed bare, defining next to nothing, and running top to bottom in a kernel on the toy world."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest
from helpers import ROOT

from llgbm.world import World

FOLDER = ROOT / "notebooks"
RENDERED = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PHASES = (
    "phase_0_baseline phase_1_delta phase_2_dataset phase_3_differentiable phase_4_5_ablations phase_4_multitask "
    "phase_5_delta_only phase_6_composition"
).split()
LIMIT = 300_000


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_of(path: Path) -> list[str]:
    return [cell.source for cell in read(path).cells if cell.cell_type == "code"]


def test_all_phases_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == PHASES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_bare(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert path.stat().st_size < LIMIT
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None, (
            "run `make notebooks-clean`"
        )
        assert not cell.metadata, f"cell {cell.id} carries metadata"
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith(
        "# Phase "
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_defines_nothing_and_uses_the_package(path: Path) -> None:
    tree = ast.parse("\n".join(code_of(path)))
    nodes = list(ast.walk(tree))
    assert not [
        n.name
        for n in nodes
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    used = {
        node.module.split(".")[0]
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module
    }
    assert used & {"llgbm", "tuning"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_one_variable_switches_the_base(path: Path) -> None:
    lines = [line for line in "\n".join(code_of(path)).splitlines() if re.match(r"BASE\s*=", line)]
    assert len(lines) == 1


@pytest.mark.whole
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_top_to_bottom(
    path: Path,
    world: World,
    cache: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("LLGBM_OPTIONS", f"--smoke --cache {cache}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if path.stem == "phase_4_5_ablations":
        folder, _ = request.getfixturevalue("finished")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlruns/mlflow.db")
    notebook = read(path)
    client = NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    pictures = [
        o
        for cell in notebook.cells
        for o in cell.get("outputs", ())
        if "image/png" in o.get("data", {})
    ]
    assert len(pictures) >= 2, "a notebook tells its story with plots"


@pytest.mark.parametrize("phase", PHASES)
def test_a_rendered_page_is_in_the_docs(phase: str) -> None:
    page = RENDERED / f"{phase}.md"
    text = page.read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(pictures) >= 2
    for file in (page, *(RENDERED / name for name in pictures)):
        assert 0 < file.stat().st_size < LIMIT, file
    folder = RENDERED / f"{phase}_files"
    assert {file.name for file in folder.iterdir()} == {Path(name).name for name in pictures}


@pytest.mark.parametrize("phase", PHASES)
def test_a_rendered_page_is_of_its_notebook(phase: str) -> None:
    """Its numbers are of one run, but its words and its code, however they are laid out, are those of today."""
    text = (RENDERED / f"{phase}.md").read_text(encoding="utf-8")
    cells = read(FOLDER / f"{phase}.ipynb").cells
    changed = [
        c.source for c in cells if c.cell_type == "markdown" and c.source.strip() not in text
    ]
    shown = [parsed(code) for code in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)]
    assert not changed and shown == [parsed(c.source) for c in cells if c.cell_type == "code"], (
        "the notebook changed: run `make ablation`, then `make notebooks`"
    )


def parsed(code: str) -> str:
    return ast.dump(ast.parse(code))
