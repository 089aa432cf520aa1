"""The README's commands do what it says, run in its own words."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def with_toy_generator(text: str) -> str:
    """The generator that the smoke run registers stands in for that of the full run."""
    return re.sub(r"llgbm-generator-nano\b(?!-)", "llgbm-generator-nano-smoke", text)


def run(command: list[str], folder: Path) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


MADE = [
    line.split("#")[0].split()
    for block in blocks("bash")
    for line in block.splitlines()
    if line.startswith("make")
]
SCRIPTS = [block for block in blocks("bash") if not block.startswith("make")]


@pytest.mark.parametrize("command", MADE, ids=" ".join)
def test_make_has_the_targets(command: list[str]) -> None:
    wanted = {"ablation": "tuning/run_ablation.py", "test": "-m pytest", "ui": "-m tuning.ui"}
    assert wanted[command[1]] in run([command[0], "-n", *command[1:]], ROOT)


def test_the_make_commands_are_there() -> None:
    assert {command[1] for command in MADE} == {"ablation", "test", "ui"}


@pytest.mark.whole
def test_every_command_and_every_python_example_runs(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    smoke = "python tuning/run_ablation.py --smoke"
    assert SCRIPTS[0].strip() == smoke, (
        "the fixture runs the README's first script; keep the two alike"
    )
    for script in SCRIPTS[1:]:
        run(["bash", "-euc", with_toy_generator(script)], folder)
    for example in blocks("python"):
        run([sys.executable, "-c", with_toy_generator(example)], folder)
    assert (folder / "my_adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "my_second_adapter" / "adapter_model.safetensors").is_file()


def test_links_point_at_files() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def map_of(package: str) -> dict[str, str]:
    """Entries of a package in the README's tree: name to its line."""
    block = README.partition("## Where things are")[2].split("```")[1]
    start = block.index(f"\n{package}/ ")
    unwrapped = re.sub(r"\n│ +", " ", block[start + 1 :])
    lines = itertools.takewhile(str.strip, unwrapped.splitlines()[1:])
    parsed = [re.match(r"[├└]── (\S+)\s+(.*)", line) for line in lines]
    return {found[1]: found[2] for found in parsed if found}


def sources(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py") if not path.stem.startswith("__")}


@pytest.mark.parametrize("package", ["llgbm", "tuning"])
def test_the_map_names_every_file_and_folder(package: str) -> None:
    root, entries = ROOT / package, map_of(package)
    folders = {f"{path.name}/" for path in root.iterdir() if (path / "__init__.py").is_file()}
    files = {path.name for path in root.glob("*.py") if path.name != "__init__.py"}
    assert set(entries) == folders | files
    for folder in folders:
        named = set(re.findall(r"\w+", entries[folder]))
        assert sources(root / folder) <= named, f"{package}/{folder}"
