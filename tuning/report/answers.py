"""A page of answers: on each held-out task what base, teacher and the best generated adapter write."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llgbm.evaluation.benchmark import System
from llgbm.evaluation.transcripts import Section, Transcript, as_json, ask_systems, html_page
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
PAGE, DATA = "answers.html", "answers.json"


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
                out = Path(folder) / "answers" / size
                out.mkdir(parents=True)
                write_answers(out, sections, result)
                tracker.log_artifacts(Path(folder) / "answers", "answers")
        except UserError as error:
            say(f"the page of answers was not written: {error}")


def write_answers(out: Path, sections: Sequence[Section], result: TrialResult) -> None:
    """Write the page and its data into a folder."""
    about = (
        f"Greedy answers on held-out tasks, {EXAMPLES} examples each: the base alone, with the task's teacher, and "
        f"with the adapter that the best trial ({result.config}, seed {result.seed}) generated from other prompts."
    )
    page = html_page("Answers on held-out tasks", about, sections)
    (out / PAGE).write_text(page, encoding="utf-8")
    data = as_json(sections, {"trial": result.trial_id, "config": result.config})
    (out / DATA).write_text(json.dumps(data, indent=1), encoding="utf-8")


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
