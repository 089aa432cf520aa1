"""Read the prompts that come with an adapter of someone else: given by task, or in a file beside it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from llgbm.runtime import UserError
from llgbm.system.documents import read_json
from llgbm.tasks.prompts import check_prompts, read_prompts
from llgbm.teachers.bank import PROMPTS, Prompts

PURPOSES = ("train", "evaluation")
PROMPT_FILES = (PROMPTS, "prompts.jsonl", "prompts.txt")
# A plain list of prompts is parted in two, the second a third of it.
LEAST_PROMPTS = 3


def read_given(path: Path) -> dict[str, Any]:
    """Read a file of prompts: by task, or those of one task, which stand under "". Raises UserError for none."""
    if path.suffix == ".json":
        found = read_json(path, "name a file of prompts")
        if isinstance(found, dict) and not set(found) & {*PURPOSES, "prompts", "prompt"}:
            return found
    return {"": _read_pool(path)}


def _read_pool(path: Path) -> Any:
    """Return the prompts of a file: a list, or a list for each purpose. Raises UserError for a file of none."""
    if path.suffix == ".json":
        found = read_json(path, "name a file of prompts")
        if isinstance(found, dict) and "prompts" not in found:
            return found
        if isinstance(found, list) and all(isinstance(prompt, str) for prompt in found):
            return found
    return read_prompts(path)


def prompts_of(folder: Path, task: str, given: Mapping[str, Any]) -> Prompts:
    """Return an adapter's prompts: those given for its task, or in the file beside it or above it.

    A plain list is parted in two. Raises UserError for none.
    """
    found, source = given.get(task, given.get("")), "--prompts"
    if found is None:
        folders = (folder, *_above(folder, task))
        places = [place / name for place, name in product(folders, PROMPT_FILES)]
        beside = [place for place in places if place.is_file()]
        found, source = (_read_pool(beside[0]), str(beside[0])) if beside else (None, "")
    if isinstance(found, list):
        if len(found) < LEAST_PROMPTS:
            raise UserError(
                f"{source} holds {len(found)} prompts for the adapter in {folder}: {LEAST_PROMPTS} are needed "
                "at least, two to generate from and one to evaluate with"
            )
        known = len(found) - len(found) // 3
        found = {"train": found[:known], "evaluation": found[known:]}
    if not isinstance(found, dict) or not all(_are_prompts(found.get(p)) for p in PURPOSES):
        raise UserError(
            f"the adapter in {folder} has no prompts: put a {PROMPTS} beside it, or name task "
            f'{task!r} in --prompts, as {{"train": [...], "evaluation": [...]}} or one list of at least three'
        )
    for purpose in PURPOSES:
        check_prompts(found[purpose], source)
    if both := set(found["train"]) & set(found["evaluation"]):
        raise UserError(
            f"a prompt of the adapter in {folder} is for training and evaluation both ({min(both)[:60]!r}): "
            "keep them apart"
        )
    return {purpose: list(found[purpose]) for purpose in PURPOSES}


def _above(folder: Path, task: str) -> list[Path]:
    """Return the folders from an adapter's up to the one that bears the name of its task; none without such a one."""
    above: list[Path] = []
    for parent in folder.parents:
        above.append(parent)
        if parent.name == task:
            return above
    return []


def _are_prompts(found: Any) -> bool:
    return (
        isinstance(found, list)
        and bool(found)
        and all(isinstance(p, str) and p.strip() for p in found)
    )
