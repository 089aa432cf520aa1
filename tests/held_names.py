"""Read the signatures of the names that users import, and keep them in `tests/data/signatures.json`.

    python tests/held_names.py            # print what differs from the table; exit status 1 where something does
    python tests/held_names.py --write    # make the signatures of today the held ones

Two kinds are held. The names given from outside are held with their module, which may not move. Those that README,
docs and notebooks import are held by bare name: their module may move, and the documents with it.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from held import TABLES, compare_or_write
from helpers import ROOT

TABLE = TABLES / "signatures.json"
OURS = ("llgbm", "tuning", "dnd")
# By module of the package `llgbm`. People who asked for this project import these.
GIVEN = {
    "lora": "LoraSpec LoraBatch",
    "probes": "create_generic_probes create_domain_probes",
    "delta": "compute_base_activation compute_adapter_delta DeltaCache",
    "dataset": "DeltaAugmentedDataset Text2Qwen25LoRA_DeltaDataset create_dataloader",
    "functional": "FunctionalLoRA compute_delta_differentiable",
    "training": "TrainingConfig MultiTaskLoss DeltaOnlyLoss train evaluate",
}
Signatures = dict[str, str]


def all_names() -> dict[str, Signatures]:
    """Return the whole table: signatures of the given names by module and name, of the documented ones by name."""
    given: Signatures = {}
    for module, names in GIVEN.items():
        for name in names.split():
            given |= signatures(
                f"llgbm.{module}.{name}", getattr(import_module(f"llgbm.{module}"), name)
            )
    documented: Signatures = {}
    for module, name in sorted(documented_names(), key=lambda pair: pair[1]):
        documented |= signatures(name, getattr(import_module(module), name))
    return {"given": given, "documented": documented}


def signatures(name: str, value: Any) -> Signatures:
    """Return the signature of a function, those of a class and of its public methods, or the type of a constant."""
    if not inspect.isclass(value):
        return {name: signature(value) if callable(value) else type(value).__name__}
    found = {name: signature(value)}
    for key, member in vars(value).items():
        if key.startswith("_") and key != "__call__":
            continue
        plain = getattr(member, "__func__", member)
        if inspect.isfunction(plain):
            found[f"{name}.{key}"] = signature(plain)
        elif isinstance(member, property):
            found[f"{name}.{key}"] = "property"
    return found


def signature(function: Any) -> str:
    """Return a signature as text, without what differs from process to process or from Python to Python."""
    text = re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(function)))
    return re.sub(r"ForwardRef\(('[^']*')[^)]*\)", r"\1", text)


def documented_names() -> set[tuple[str, str]]:
    """Return (module, name) of everything that README, docs and notebooks import from this project."""
    return {pair for code in documented_code() for pair in imported(code)}


def documented_code() -> Iterator[str]:
    """Yield the Python of README, docs and notebooks: blocks of Markdown, cells of notebooks."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        yield from re.findall(
            r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.M | re.S
        )
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                yield "".join(line for line in cell["source"] if not line.startswith(("%", "!")))


def imported(code: str) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of what some code imports from this project."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import) and any(
            alias.name.split(".")[0] in OURS for alias in node.names
        ):
            raise ValueError("documents import names, not modules: write `from module import name`")


if __name__ == "__main__":
    sys.exit(compare_or_write(TABLE, all_names(), __doc__))
