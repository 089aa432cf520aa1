"""Names of torch that are used exist in torch 2.5: `tests/data/torch_2_5.txt` lists those looked up in its sources.

A name that is not listed yet is looked up in a wheel of torch 2.5 (its `.py` and `.pyi` files), then added.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from helpers import ROOT

FOLDERS = ("llgbm", "tuning", "dnd_repo/workspace", "benchmarks")
KNOWN = set((ROOT / "tests" / "data" / "torch_2_5.txt").read_text().split())


def torch_names(tree: ast.AST) -> Iterator[str]:
    """Dotted names below `torch`, through whatever name a file imports them by."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {
                (a.asname or a.name.split(".")[0]): (a.name if a.asname else "torch")
                for a in _of_torch(node)
            }
            yield from (a.name for a in _of_torch(node))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            aliases |= {(a.asname or a.name): f"{node.module}.{a.name}" for a in node.names}
            yield from (f"{node.module}.{a.name}" for a in node.names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (found := _dotted(node)).split(".")[0] in aliases:
            start, _, rest = found.partition(".")
            yield f"{aliases[start]}.{rest}"


def _of_torch(node: ast.Import) -> list[ast.alias]:
    return [a for a in node.names if a.name.split(".")[0] == "torch"]


def _dotted(node: ast.AST) -> str:
    return (
        f"{_dotted(node.value)}.{node.attr}"
        if isinstance(node, ast.Attribute)
        else getattr(node, "id", "")
    )


@pytest.mark.parametrize("folder", FOLDERS)
def test_names_of_torch_are_those_of_2_5(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    used = {name: file for file in files for name in torch_names(ast.parse(file.read_text()))}
    new = {name: str(file.relative_to(ROOT)) for name, file in used.items() if name not in KNOWN}
    assert not new, (
        "look these up in a wheel of torch 2.5, then add them to tests/data/torch_2_5.txt"
    )


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import torch\ntorch.accelerator.is_available()", "torch.accelerator.is_available"),
        ("import torch as t\nt.float8", "torch.float8"),
        ("from torch import nn\nnn.Muon()", "torch.nn.Muon"),
        ("from torch.optim import Muon", "torch.optim.Muon"),
        ("import torch.nn.attention.varlen", "torch.nn.attention.varlen"),
    ],
)
def test_the_walk_sees_every_spelling(code: str, name: str) -> None:
    assert name in set(torch_names(ast.parse(code)))
