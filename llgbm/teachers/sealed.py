"""Teachers of the sealed tasks: trained when the tasks are opened, to say what could be reached on them."""

from __future__ import annotations

import json
from pathlib import Path

from llgbm.lora.adapters import LoraSpec
from llgbm.models.load import Base
from llgbm.models.scoring import exact_match
from llgbm.runtime import content_hash
from llgbm.system.cache import build_entry
from llgbm.tasks.suite import Suite
from llgbm.teachers.build import pupils_of
from llgbm.teachers.rounds import Classroom
from llgbm.teachers.train import TEACHERS_VERSION, TeacherConfig


def sealed_teachers(
    cache: Path, base: Base, spec: LoraSpec, suite: Suite, config: TeacherConfig, count: int
) -> dict[str, dict[str, float]]:
    """Return the accuracy of a teacher on `count` examples by sealed level and task; trained, or found in the cache."""
    key = content_hash(
        "sealed", TEACHERS_VERSION, base.hash, suite, config, count, spec.target_modules
    )

    def write(folder: Path) -> None:
        found = {}
        for level in suite.levels:
            if not level.is_sealed:
                continue
            pupils = pupils_of(level.tasks, config)[:: config.per_task]
            trained = Classroom(base, spec, config, suite).train(pupils)
            examples = [
                suite.level_examples(level.name, task, "evaluation", count) for task in level.tasks
            ]
            accuracy_A = exact_match(base, spec, trained.adapters, examples)
            found[level.name] = dict(zip(level.tasks, accuracy_A.tolist(), strict=True))
        (folder / "accuracy.json").write_text(json.dumps(found, indent=1))

    return json.loads((build_entry(cache, "sealed", key, write) / "accuracy.json").read_text())
