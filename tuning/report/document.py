"""Write the report of a study: Markdown with its pictures, one self-contained HTML page, CSV and JSON."""

from __future__ import annotations

import csv
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llgbm.runtime import UserError, say
from llgbm.system.output import Output
from llgbm.terms.names import NAMED, PREFIX
from tuning.report import plots, tables
from tuning.report.amounts import plot_amounts
from tuning.report.delta_map import plot_delta_map
from tuning.report.groups import CHOOSING, MAIN, Group, size_of
from tuning.report.names import escaped, file_name, label
from tuning.report.page import html_page
from tuning.report.record import StudyRecord, read_study
from tuning.report.seconds import ABOUT as ABOUT_SECONDS
from tuning.report.seconds import seconds_table
from tuning.report.summaries import keep_summaries
from tuning.report.words import caveats, count, headlines
from tuning.tracking.study import StudyTracker

FORMAT_VERSION = 1  # of results.json
# Final metrics of the best trial that its study shows, too.
NUMBERS = ("heldout/", "val/", "train/")
PICTURES = (
    "outcomes.png",
    "learning_curves.png",
    "heat_map.png",
    "amounts.png",
    "memorisation.png",
    "delta_map*.png",
)
PAGES = "answers_*.html"
REPORT_PATTERNS = (*PICTURES, PAGES, "results.csv", "results.json", "report.html", "report.md")
NOVELTY = (
    "Accuracy on tasks that are new in other ways than the held-out ones. Those are new combinations of an operation "
    "and a format that both occur in training (recombination). No level chooses anything."
)
OPENED = "Accuracy on tasks that nothing read before they were opened: no training, no selection, no report."
TESTS = (
    "Paired over seeds and held-out tasks: the 95 % interval and p are the wider and larger of two tests, one that "
    "takes seeds and tasks both as drawn at random (min F' of Clark 1973), one over seeds alone. p (Holm) is corrected "
    "for all comparisons of this table. The effect size is the mean difference over its standard deviation over tasks."
)


def write_report(out: Path, record: StudyRecord) -> str:
    """Write `report.md` with its plots, `report.html`, `results.csv` and `results.json` into `out`.

    Return the summary. Raises UserError if `out` cannot be written or holds files of these names by others.
    """
    with Output(out, REPORT_PATTERNS).writing() as stage:
        write_report_files(stage, record)
    return summary(record)


def write_report_files(out: Path, record: StudyRecord) -> None:
    """Write the report into an empty folder."""
    shown = record.as_markdown
    sections = _sections(shown, _plots(out, record.renamed(label)))
    sections["Answers"] = _answers(out, record)
    notes = "**What cannot be concluded**\n\n" + bullets(caveats(shown))
    parts = [f"# Study {shown.study}", *headlines(shown), notes, _origin(shown)]
    for title, own in sections.items():
        if any(own):
            parts += [f"## {title}", *own]
    text = "\n\n".join(filter(None, parts)) + "\n"
    (out / "report.md").write_text(text, encoding="utf-8")
    (out / "report.html").write_text(html_page(text, out), encoding="utf-8")
    (out / "results.json").write_text(
        json.dumps({"version": FORMAT_VERSION, **result_json(record)}, indent=1, allow_nan=False),
        encoding="utf-8",
    )
    _write_csv(out / "results.csv", record)


def summary(record: StudyRecord) -> str:
    """Return the sentence, its caveats and the main tables, in Markdown."""
    shown = record.as_markdown
    parts = (
        *headlines(shown),
        bullets(caveats(shown)),
        tables.metric_table(shown.by_rank, tables.SHORT),
        tables.baseline_table(shown.baselines),
    )
    return "\n\n".join(filter(None, parts))


def _origin(record: StudyRecord) -> str:
    complete = sum(trial.is_complete for trial in record.trials)
    parts = [f"{complete} of {count(len(record.trials), 'trial')} counted"]
    if record.study_id:
        parts.append(f"study id {record.study_id}")
    if record.run_id:
        parts.append(f"MLflow run {record.run_id}")
    return f"*{', '.join(parts)}*"


def _sections(record: StudyRecord, pictures: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the paragraphs of each section by title; a section without any text is left out."""
    groups = record.by_rank
    notable = tables.notable(groups)
    return {
        "Results": [
            "Mean ± sample standard deviation over seeds, the 95 % interval of the mean by Student's t; the best "
            "first, baselines beneath, in italics.",
            tables.result_table(groups, record.baselines),
            pictures["outcomes"],
        ],
        f"Differences in {MAIN}": _with(TESTS, tables.comparison_table(record.comparisons)),
        "λ_w × λ_d": [pictures["heat_map"]],
        "Accuracy by amount": [pictures["amounts"]],
        "Learning curves": [pictures["learning_curves"]],
        "At equal seconds": _with(ABOUT_SECONDS, seconds_table(notable)),
        "Held-out tasks": _with(
            "Accuracy by task, mean over seeds." + _of_how_many(notable, groups),
            tables.task_table(notable),
        ),
        "Levels of novelty": _with(NOVELTY, tables.novelty_table(groups)),
        "Sealed tasks": _with(
            " ".join([OPENED, *map(opening, record.openings)]), tables.sealed_table(groups)
        ),
        "Delta maps": [pictures["delta_maps"]],
        "Memorisation": [tables.memorisation_table(groups), pictures["memorisation"]],
        "Seconds and memory": [tables.cost_table(groups)],
        "Baselines": [tables.baseline_table(record.baselines)],
        "Trials": [tables.trial_table(record.trials)],
        "What the metrics mean": [bullets(tables.metric_list(groups))],
    }


def opening(entry: Mapping[str, Any]) -> str:
    """Return one sentence on who opened sealed tasks when."""
    return f"Opened for {count(len(entry['trials']), 'trial')} by {entry['by']}, {entry['at']}."


def _with(text: str, body: str) -> list[str]:
    """Return a text with what it introduces, nothing if that is empty."""
    if not body:
        return []
    return [text, body]


def _of_how_many(notable: Sequence[Group], groups: Sequence[Group]) -> str:
    if len(notable) == len(groups):
        return ""
    return (
        f" Shown are {len(notable)} of {len(groups)} configurations, the best of each size and what they are compared "
        "with; results.csv has all."
    )


def _plots(out: Path, record: StudyRecord) -> dict[str, str]:
    """Draw the pictures; return them as Markdown by name, "" for one without data."""
    groups = record.by_rank
    notable = tables.notable(groups)
    curves = _picture(out, "learning_curves.png", plots.plot_curves, notable)
    if curves:
        curves += _of_how_many(notable, groups)
    return {
        "outcomes": _picture(out, "outcomes.png", plots.plot_outcomes, groups, record.baselines),
        "learning_curves": curves,
        "amounts": _picture(out, "amounts.png", plot_amounts, groups),
        "heat_map": _picture(out, "heat_map.png", plots.plot_heat_map, groups),
        "memorisation": _picture(out, "memorisation.png", plots.plot_memorisation, groups),
        "delta_maps": "\n\n".join(filter(None, _delta_maps(out, record))),
    }


def _delta_maps(out: Path, record: StudyRecord) -> Iterator[str]:
    sizes = list(dict.fromkeys(one.size for one in record.deltas))
    for place, size in enumerate(sizes, 1):
        name = "delta_map.png"
        if len(sizes) > 1:
            name = f"delta_map_{place}_{file_name(size)}.png"
        own = [one for one in record.deltas if one.size == size]
        yield _picture(out, name, plot_delta_map, own)


def _answers(out: Path, record: StudyRecord) -> list[str]:
    """Write a page of answers for each size; return a sentence that links it, for each."""
    links = []
    for place, own in enumerate(record.answers, 1):
        name = f"answers_{place}_{file_name(own.size)}.html"
        (out / name).write_text(own.page(), encoding="utf-8")
        links.append(
            f"Greedy answers on held-out tasks by base, teacher and best generated adapter: "
            f"[{escaped(own.size)}]({quote(name)})"
        )
    return links


def _picture(out: Path, name: str, draw: Callable[..., str], *what: Any) -> str:
    caption = draw(out / name, *what)
    if not caption:
        return ""
    title = caption.partition(":")[0]
    return f"![{title}]({name})\n\n*{caption}*"


def result_json(record: StudyRecord) -> dict[str, Any]:
    """Return the numbers of the report for JSON; a value that is not finite becomes None."""
    shown = record.as_markdown
    baselines = {}
    for name, values in record.baselines.items():
        baselines[name] = {key: _finite(value) for key, value in values.items()}
    return {
        "study": record.study,
        "study_id": record.study_id,
        "summary": headlines(shown),
        "caveats": caveats(shown),
        "configurations": [_group_json(group) for group in record.groups],
        "comparisons": [vars(comparison) for comparison in record.comparisons],
        "baselines": baselines,
        "trials": [
            {"trial": t.trial_id, "config": t.config, "seed": t.seed, "status": t.status}
            for t in record.trials
        ],
    }


def _group_json(group: Group) -> dict[str, Any]:
    cells = {metric: group.cell(metric) for metric in tables.METRICS}
    return {
        "config": group.config,
        "model_size": group.size,
        "seeds": list(group.seeds),
        "metrics": {
            m: {**vars(cell), "by_seed": group.by_seed(m)} for m, cell in cells.items() if cell
        },
    }


def _write_csv(path: Path, record: StudyRecord) -> None:
    """Write a row per trial: what it is, if it counts, its weights of terms and all its final metrics."""
    metrics = sorted(set(chain.from_iterable(trial.metrics for trial in record.trials)))
    head = ["trial", "configuration", "model_size", "seed", "status", "counted", "run_id"]
    others = {key for trial in record.trials for key in trial.params if key.startswith(PREFIX)}
    params = [*NAMED.values(), *sorted(others)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*head, *params, *metrics])
        writer.writeheader()
        for t in record.trials:
            facts = (
                t.trial_id,
                t.config,
                size_of(t),
                t.seed,
                t.status,
                int(t.is_complete),
                t.run_id,
            )
            lambdas = {key: t.params[key] for key in params if key in t.params}
            values = {key: repr(value) for key, value in t.metrics.items()}
            writer.writerow({**dict(zip(head, facts, strict=True)), **lambdas, **values})


def bullets(lines: Iterable[str]) -> str:
    """Return lines as a Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def _finite(value: float) -> float | None:
    if not math.isfinite(value):
        return None
    return float(value)


def publish_report(tracker: StudyTracker) -> dict[str, Any]:
    """Log the report on the parent run, print its summary and return its numbers."""
    record = read_study(tracker.tracking_uri, tracker.parent_run_id)
    with tempfile.TemporaryDirectory() as folder:
        write_report_files(Path(folder), record)
        print(summary(record))
        try:
            tracker.log_artifacts(Path(folder))
            tracker.update_metrics(best_numbers(record), len(record.trials))
            keep_summaries(tracker, record)
        except UserError as error:
            say(f"the report was not kept with the study: {error}")
    return result_json(record)


def best_numbers(record: StudyRecord) -> dict[str, float]:
    """Return the final metrics of the trial with the best validation accuracy, for the study's row in lists of runs."""
    done = [trial for trial in record.trials if trial.is_complete and CHOOSING in trial.metrics]
    if not done:
        return {}
    best = max(done, key=lambda trial: trial.metrics[CHOOSING])
    return {key: value for key, value in best.metrics.items() if key.startswith(NUMBERS)}
