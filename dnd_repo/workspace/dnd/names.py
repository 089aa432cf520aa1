"""Names of tasks, files and folders as Drag-and-Drop LLMs spells them, and where its public code keeps them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dnd.errors import DndError

# The folder that the public scripts run in; theirs is named after the repository.
HOME = Path(__file__).resolve().parents[2]
DATA, MODELS = "prepare/data", "models"
# What may follow a task's name in the name of a file or folder.
PART = re.compile(r"(?i)[-_. ](train|test|validation|evaluation|finetune|pretrain|\d+)$")
ENDINGS = {"train": ("_train", ""), "evaluation": ("_test", "_validation", "_evaluation", "")}


def spelling(name: str) -> str:
    """Return a name without case and without what joins its words: Human_Eval and HumanEval are one."""
    return re.sub(r"[-_. ]", "", name).casefold()


def is_of_task(name: str, tasks: Iterable[str]) -> bool:
    """Return whether a folder's name is that of one of the tasks, however spelled and numbered."""
    wanted = {spelling(task) for task in tasks}
    shorter = PART.sub("", name)
    while shorter != name and spelling(name) not in wanted:
        name, shorter = shorter, PART.sub("", shorter)
    return spelling(name) in wanted


def data_file(folder: Path, task: str, purpose: str) -> Path:
    """Find the file of a task's texts, such as `ARC-c_test.json` or `Human_Eval.json`.

    Raises DndError where there is none, or where two are equally good.
    """
    found = sorted(folder.glob("*.json"))
    for ending in ENDINGS[purpose]:
        alike = [path for path in found if spelling(path.stem) == spelling(task + ending)]
        exact = [path for path in alike if path.stem == task + ending]
        if len(alike) > 1 and not exact:
            names = " and ".join(path.name for path in alike)
            raise DndError(f"{folder} has {names} for {task}: leave one there")
        if alike:
            return (exact or alike)[0]
    names = ", ".join(f"{task}{ending}.json" for ending in ENDINGS[purpose])
    raise DndError(f"{folder} has none of {names}: conditions need the task's texts")


def in_place(name: str, places: Sequence[Path] | None = None) -> Path:
    """Find what the public scripts name, here or in the folder that they run in; as it is where there is nothing."""
    for place in (Path(), HOME) if places is None else places:
        if (place / name).exists():
            return place / name
    return Path(name)


def model_in_place(name: str) -> str:
    """Return the folder below `models/` that holds a hub's model, or the name where there is none."""
    if Path(name).exists():
        return name
    own = in_place(f"{MODELS}/{name.rsplit('/', 1)[-1]}")
    return str(own) if own.is_dir() else name
