"""The page of answers of a study: each held-out task with base, teacher and generated adapter."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from test_notes import open_trial

from llgbm.generator import make_generator
from llgbm.generator.bundle import GeneratorBundle
from llgbm.generator.networks import Standardiser
from llgbm.lora import LoraBatch
from llgbm.models.scoring import continue_texts, greedy_answers
from llgbm.training import TrainingConfig
from llgbm.world import World
from tuning.report import StudyRecord, read_study, write_report
from tuning.report.answers import EXAMPLES, TOKENS, publish_answers
from tuning.studies.spec import TrialSpec
from tuning.sweep.artifacts import bundle_facts
from tuning.tracking.runs import read_trials
from tuning.tracking.study import StudyTracker


def check_report(record: StudyRecord, folder: Path, rows: list[int]) -> None:
    """The report links a page that lies beside it, and shows it in place: MLflow shows no other artifact from there."""
    write_report(folder, record)
    ((text, link),) = re.findall(r"\[(\w+)\]\((answers[^)]*)\)", (folder / "report.md").read_text())
    assert text == "nano"
    page = (folder / link).read_text()
    assert page.count("<article>") == EXAMPLES * len(rows)
    report = (folder / "report.html").read_text()
    assert f'<a href="{link}" target="_blank" rel="noopener">nano</a>' in report
    (frame,) = re.findall(r'<iframe sandbox [^>]*srcdoc="([^"]*)"', report)
    assert html.unescape(frame) == page


def test_the_page_has_the_answers_of_base_teacher_and_generated_adapter(
    study: StudyTracker, world: World, tmp_path: Path, capsys: Any
) -> None:
    spec = TrialSpec("multitask", TrainingConfig(), world.config)
    # Adapters that move the toy base far, so that no two systems write the same.
    noise = torch.Generator().manual_seed(0)
    values_AV = 0.3 * torch.randn(world.data.values_AV.shape, generator=noise)
    world = replace(world, data=replace(world.data, values_AV=values_AV))
    width = world.data.conditions.train_ANC.shape[-1]
    standardiser = Standardiser(values_AV[0].flip(0), torch.ones_like(values_AV[0]))
    generator = make_generator(spec.config.generator, world.bank.spec, width, standardiser, seed=0)
    trial = open_trial(study)
    trial.log(1, {"val/accuracy": 0.5, "heldout/accuracy": 0.4})
    trial.close()
    study.finish_trial("t1", "FINISHED")
    results = read_trials(study.tracking_uri, study.parent_run_id)
    publish_answers(study, {"t1": world}, results, "val/accuracy")
    assert "were not kept" in capsys.readouterr().err
    (tmp_path / "kept" / "generator").mkdir(parents=True)
    facts = bundle_facts(spec, world)
    GeneratorBundle.save(tmp_path / "kept/generator", generator, spec.config.generator, facts)
    study.client.log_artifacts(trial.run_id, str(tmp_path / "kept"))
    publish_answers(study, {"t1": world}, results, "val/accuracy")
    kept = Path(study.download_artifacts(study.parent_run_id, "answers/nano", tmp_path))
    sections = json.loads((kept / "answers.json").read_text())["sections"]
    rows = list(world.data.rows["test"])
    assert [own["title"] for own in sections] == [world.data.tasks[row] for row in rows]
    check_report(read_study(study.tracking_uri, study.parent_run_id), tmp_path / "report", rows)
    taught = LoraBatch.unflatten(world.bank.spec, world.data.values_AV[rows])
    made = generator.generate(world.data.conditions.evaluation_ANC[rows])
    asked = [[one["prompt"] for one in own["transcripts"]] for own in sections]
    wanted = {
        "teacher": greedy_answers(world.base, world.bank.spec, taught, asked, TOKENS),
        "generated": greedy_answers(world.base, world.bank.spec, made, asked, TOKENS),
        "base": [continue_texts(world.base, own, TOKENS) for own in asked],
    }
    for name, texts in wanted.items():
        got = [[one["answers"][name]["text"] for one in own["transcripts"]] for own in sections]
        assert got == texts
    assert len({str(texts) for texts in wanted.values()}) == 3
