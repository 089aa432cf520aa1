"""A wheel built from the sources, installed apart: its commands run outside the repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers import ROOT

PACKAGES = ("llgbm", "tuning", "dnd_repo/workspace/dnd")

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a wheel was installed into, beside the libraries of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=skipped)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "./source", "--no-deps", "--no-build-isolation", "-w", "."]
    subprocess.run(build, cwd=folder, check=True)
    (wheel,) = folder.glob("*.whl")
    place = [*pip, "install", "--no-deps", "--target", "site", f"./{wheel.name}"]
    subprocess.run(place, cwd=folder, check=True)
    return folder


def run(installed: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed / "site")}
    program = str(installed / "site" / "bin" / command[0])
    return subprocess.run(
        [program, *command[1:]], cwd=folder, env=environment, capture_output=True, text=True
    )


def modules(names: Sequence[str]) -> set[str]:
    return {name for name in names if name.endswith(".py")}


def test_a_wheel_holds_every_module_and_nothing_else(installed: Path) -> None:
    (wheel,) = installed.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    wanted = {
        path.relative_to((ROOT / package).parent).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    assert modules(names) == wanted
    assert {Path(name).suffix for name in names if ".dist-info/" not in name} == {".py"}


def test_the_commands_of_a_wheel_run_outside_the_repository(
    installed: Path, tmp_path: Path
) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == {"llgbm", "llgbm-ablation"}
    said = run(installed, tmp_path, "llgbm", "--help")
    assert said.returncode == 0 and said.stdout.startswith("usage: llgbm "), said.stderr
    plan = run(installed, tmp_path, "llgbm-ablation", "--smoke", "--dry-run")
    assert plan.returncode == 0 and len(re.findall(r"^[0-9a-f]{12} ", plan.stdout, re.M)) == 3
    wrong = run(installed, tmp_path, "llgbm", "show", "nowhere")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    assert not list(tmp_path.iterdir())


def like_pip() -> dict[str, str]:
    """Return an environment in which uv asks the indexes that pip asks here, and finds nothing of the repository."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    known = dict(re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", listed.stdout, re.M))
    own = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_"))
    }
    own.pop("VIRTUAL_ENV", None)
    named = {
        "index-url": "UV_DEFAULT_INDEX",
        "extra-index-url": "UV_INDEX",
        "find-links": "UV_FIND_LINKS",
        "cert": "SSL_CERT_FILE",
    }
    found = {named[key]: value for key, value in known.items() if key in named}
    if "UV_FIND_LINKS" in found:  # pip parts several by spaces
        found["UV_FIND_LINKS"] = ",".join(found["UV_FIND_LINKS"].split())
    return own | found


@pytest.fixture(scope="module")
def fresh(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of a new environment that holds the wheel and what it asks for; skips where no index answers."""
    folder = tmp_path_factory.mktemp("fresh")
    (wheel,) = installed.glob("*.whl")
    uv, python = [sys.executable, "-m", "uv", "--quiet"], folder / "env" / "bin" / "python"
    environment = like_pip()
    make = [*uv, "venv", "--python", sys.executable, "env"]
    subprocess.run(make, cwd=folder, env=environment, check=True)
    # As pip does, the highest version of any index is taken: that of torch is the build for this machine.
    options = ["--python", str(python), "--index-strategy", "unsafe-best-match"]
    install = [*uv, "pip", "install", *options, "-c", str(ROOT / "constraints.txt"), str(wheel)]
    done = subprocess.run(install, cwd=folder, env=environment, capture_output=True, text=True)
    unreachable = re.search("error sending request|dns error|timed out", done.stderr)
    if done.returncode and unreachable:
        pytest.skip(f"no index of packages can be reached: {unreachable[0]}")
    assert done.returncode == 0, done.stderr
    return python.parent


@pytest.mark.timeout(900)
def test_a_wheel_in_a_fresh_environment_passes_the_smoke_run(fresh: Path, tmp_path: Path) -> None:
    """The whole pipeline in an empty folder: study, registration, and an adapter of the champion."""

    def run(*command: str) -> str:
        arguments = [str(fresh / command[0]), *command[1:]]
        done = subprocess.run(
            arguments, cwd=tmp_path, env=like_pip(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = "import sys, dnd, llgbm, torch, tuning; print(llgbm.__file__, *sys.path); print(torch.__version__)"
    paths, version = run("python", "-c", code).splitlines()
    assert str(fresh.parent) in paths.split()[0] and str(ROOT) not in paths
    assert version == torch.__version__
    assert run("llgbm", "--help").startswith("usage: llgbm ")
    said = run("llgbm-ablation", "--smoke")
    assert json.loads(said.splitlines()[-1])["registered"]
    assert (tmp_path / "mlruns" / "mlflow.db").is_file()  # in the current folder, as documented
    (tmp_path / "prompts.txt").write_text("give the last word : red green blue =>\n")
    model = "models:/llgbm-generator-nano-smoke@champion"
    options = ["--model", model, "--prompts", "prompts.txt", "--out", "adapter"]
    run("llgbm", "generate", *options)
    lineage = json.loads(run("llgbm", "show", "adapter", "--json"))["lineage"]
    assert lineage["generator"]["registered"] == "llgbm-generator-nano-smoke/1"
    assert lineage["heldout"]["tasks"] == 4
