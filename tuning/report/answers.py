"""Answers on each held-out task by base, teacher and the best generated adapter: kept with a study, shown as a page."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llgbm.evaluation.benchmark import System
from llgbm.evaluation.transcripts import (
    Section,
    Transcript,
    as_json,
    ask_systems,
    from_json,
    html_page,
)
from llgbm.generator.bundle import GeneratorBundle
from llgbm.lora import LoraBatch
from llgbm.models.encoding import example_prompt
from llgbm.runtime import UserError, say
from llgbm.world import World
from tuning.sweep.artifacts import best_trials
from tuning.tracking.runs import TrialResult

if TYPE_CHECKING:
    from tuning.tracking.study import StudyTracker

EXAMPLES, TOKENS = 2, 48  # of a task; of an answer
FOLDER, DATA = "answers", "answers.json"


def publish_answers(
    tracker: StudyTracker, worlds: Mapping[str, World], results: Sequence[TrialResult], metric: str
) -> None:
    """Log the answers of the best trial of each size with the study; say so where its generator is gone.

    `worlds` by trial id.
    """
    for result in best_trials(results, metric, 1):
        size = result.params.get("model_size", "")
        try:
            with tempfile.TemporaryDirectory() as folder:
                kept = tracker.download_artifacts(result.run_id, "generator", folder)
                sections = answers_of(GeneratorBundle.load(Path(kept)), worlds[result.trial_id])
                out = Path(folder) / FOLDER / size
                out.mkdir(parents=True)
                facts = {
                    "size": size,
                    "trial": result.trial_id,
                    "config": result.config,
                    "seed": result.seed,
                }
                data = json.dumps(as_json(sections, facts), indent=1)
                (out / DATA).write_text(data, encoding="utf-8")
                tracker.log_artifacts(Path(folder) / FOLDER, FOLDER)
        except UserError as error:
            say(f"the answers on held-out tasks were not kept: {error}")


@dataclass(frozen=True)
class StudyAnswers:
    """Answers by the best trial of one size, as a study keeps them."""

    size: str
    config: str
    seed: int
    sections: Sequence[Section]

    @classmethod
    def read(cls, file: Path) -> StudyAnswers:
        """Read what `publish_answers` kept. Raises ValueError, KeyError or TypeError for a file that is torn."""
        data = json.loads(file.read_text(encoding="utf-8"))
        sections = from_json(data)
        return cls(str(data["size"]), str(data["config"]), int(data["seed"]), sections)

    def page(self) -> str:
        """Return the answers as one self-contained page."""
        about = (
            f"Greedy answers on held-out tasks, {EXAMPLES} examples each: the base alone, with the task's teacher, and "
            f"with the adapter that the best trial ({self.config}, seed {self.seed}) generated from other prompts."
        )
        return html_page("Answers on held-out tasks", about, self.sections)


def answers_of(bundle: GeneratorBundle, world: World) -> list[Section]:
    """Return the answers on each held-out task by base, teacher and generated adapter."""
    data, spec = world.data, world.bank.spec
    rows = list(data.rows["test"])
    generator = bundle.generator.to(data.device)
    with torch.no_grad():
        made = generator.generate(data.conditions.evaluation_ANC[rows])
    taught = LoraBatch.unflatten(spec, data.teachers(rows))
    return [
        Section(data.tasks[row], _task_answers(world, row, taught.select([at]), made.select([at])))
        for at, row in enumerate(rows)
    ]


def _task_answers(
    world: World, row: int, teacher: LoraBatch, generated: LoraBatch
) -> list[Transcript]:
    base, spec, task = world.base, world.bank.spec, world.data.tasks[row]
    systems = [
        System("base"),
        System("teacher", teacher, spec),
        System("generated", generated, spec),
    ]
    examples = world.config.suite.examples(task, "evaluation", EXAMPLES, "answers")
    asked = [example_prompt(base.tokenizer, example) for example in examples]
    answers = ask_systems(base, systems, asked, TOKENS)
    return [
        Transcript(example.prompt, own, example.answer)
        for example, own in zip(examples, answers, strict=True)
    ]
