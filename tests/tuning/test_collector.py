"""The garbage collector is spared what libraries load: while they load, while worlds are built, and at the end."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKES_GARBAGE = """
import os
{first}
class Cycle:
    def __init__(self):
        self.me = self
    def __del__(self, say=os.write):
        say(1, b"collected")
Cycle()
"""
BEGUN = "from llgbm.runtime import begin_program; begin_program()"


def output_of(text: str, folder: Path | None = None) -> str:
    """Output of a program that is given as a text."""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("first", "printed"), [("", "collected"), (BEGUN, "")])
def test_a_program_ends_without_looking_for_garbage(first: str, printed: str) -> None:
    assert output_of(MAKES_GARBAGE.format(first=first)) == printed


STOPS_AT_THE_WORLDS = """
import gc, runpy
main = runpy.run_path({program!r})["main"]
def stop(study, options):
    print(sum(own["collections"] for own in gc.get_stats()), gc.get_freeze_count())
    raise KeyboardInterrupt
main.__globals__["build_worlds"] = stop
assert main(["--smoke"]) == 130
"""


def test_the_main_job_hardly_collects_until_all_is_loaded_and_then_sets_it_aside(
    tmp_path: Path, empty_store: Path
) -> None:
    shutil.copytree(empty_store, tmp_path / "mlruns")
    text = STOPS_AT_THE_WORLDS.format(program=str(ROOT / "tuning" / "run_ablation.py"))
    collections, frozen = map(int, output_of(text, tmp_path).split())
    assert collections < 100 and frozen > 100_000
