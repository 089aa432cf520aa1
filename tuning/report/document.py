"""The report of a study as files: Markdown with its pictures, one self-contained HTML page, CSV and JSON."""

from __future__ import annotations

import csv
import json
import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llgbm.output import Output
from llgbm.terms.names import NAMED, PREFIX
from tuning.report import plots, tables
from tuning.report.delta_map import plot_delta_map
from tuning.report.groups import MAIN, Group, size_of
from tuning.report.page import html_page
from tuning.report.record import StudyRecord, read_study
from tuning.report.words import caveats, count, headlines
from tuning.tracking.study import StudyTracker

PICTURES = (
    "outcomes.png",
    "learning_curves.png",
    "heat_map.png",
    "memorisation.png",
    "delta_map*.png",
)
REPORT_PATTERNS = (*PICTURES, "results.csv", "results.json", "report.html", "report.md")
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
    sections = _sections(record, _plots(out, record))
    notes = "**What cannot be concluded**\n\n" + bullets(caveats(record))
    head = [f"# Study {record.study}", *headlines(record), notes, _origin(record)]
    body = [
        f"## {title}\n\n" + "\n\n".join(filter(None, parts))
        for title, parts in sections.items()
        if any(parts)
    ]
    text = "\n\n".join(filter(None, (*head, *body))) + "\n"
    (out / "report.md").write_text(text, encoding="utf-8")
    (out / "report.html").write_text(html_page(text, out), encoding="utf-8")
    (out / "results.json").write_text(
        json.dumps(result_json(record), indent=1, allow_nan=False), encoding="utf-8"
    )
    _write_csv(out / "results.csv", record)


def summary(record: StudyRecord) -> str:
    """Sentence, its caveats and the main tables, in Markdown."""
    short = tables.metric_table(record.groups, tables.SHORT)
    parts = (
        *headlines(record),
        bullets(caveats(record)),
        short,
        tables.baseline_table(record.baselines),
    )
    return "\n\n".join(filter(None, parts))


def _origin(record: StudyRecord) -> str:
    whole = sum(trial.is_complete for trial in record.trials)
    parts = [f"{whole} of {count(len(record.trials), 'trial')} counted"]
    parts += [f"study id `{record.study_id}`"] * bool(record.study_id)
    parts += [f"MLflow run `{record.run_id}`"] * bool(record.run_id)
    return "*" + ", ".join(parts) + "*"


def _sections(record: StudyRecord, pictures: dict[str, str]) -> dict[str, list[str]]:
    groups = record.groups
    comparisons = record.comparisons
    return {
        "Results": [
            "Mean ± sample standard deviation over seeds, the 95 % interval of the mean by Student's t; baselines "
            "beneath, in italics.",
            tables.result_table(groups, record.baselines),
            pictures["outcomes"],
        ],
        f"Differences in {MAIN}": [TESTS, tables.comparison_table(comparisons)]
        if comparisons
        else [],
        "λ_w × λ_d": [pictures["heat_map"]],
        "Learning curves": [pictures["learning_curves"]],
        "Held-out tasks": _with("Accuracy by task, mean over seeds.", tables.task_table(groups)),
        "Delta maps": [pictures["delta_maps"]],
        "Memorisation": [tables.memorisation_table(groups), pictures["memorisation"]],
        "Seconds and memory": [tables.metric_table(groups, tables.COST) if groups else ""],
        "Baselines": [tables.baseline_table(record.baselines)],
        "Trials": [tables.trial_table(record.trials)],
        "What the metrics mean": [bullets(tables.metric_list(groups))],
    }


def _with(text: str, body: str) -> list[str]:
    return [text, body] if body else []


def _plots(out: Path, record: StudyRecord) -> dict[str, str]:
    """Pictures as Markdown by name, "" for one that there is nothing for."""
    groups = record.groups
    drawn = {
        "outcomes": _picture(out, "outcomes.png", plots.plot_outcomes, groups, record.baselines),
        "learning_curves": _picture(out, "learning_curves.png", plots.plot_curves, groups),
        "heat_map": _picture(out, "heat_map.png", plots.plot_heat_map, groups),
        "memorisation": _picture(out, "memorisation.png", plots.plot_memorisation, groups),
    }
    sizes = dict.fromkeys(one.size for one in record.deltas)
    maps = [
        _picture(
            out,
            f"delta_map_{size}.png" if len(sizes) > 1 else "delta_map.png",
            plot_delta_map,
            [one for one in record.deltas if one.size == size],
        )
        for size in sizes
    ]
    return {**drawn, "delta_maps": "\n\n".join(filter(None, maps))}


def _picture(out: Path, name: str, draw: Any, *what: Any) -> str:
    caption = draw(out / name, *what)
    return f"![{caption.partition(':')[0]}]({name})\n\n*{caption}*" if caption else ""


def result_json(record: StudyRecord) -> dict[str, Any]:
    """Numbers of the report as one object that JSON can hold; a value that is not finite becomes None."""
    groups = record.groups
    return {
        "study": record.study,
        "study_id": record.study_id,
        "summary": headlines(record),
        "caveats": caveats(record),
        "configurations": [_group_json(group) for group in groups],
        "comparisons": [vars(comparison) for comparison in record.comparisons],
        "baselines": {
            name: {k: _finite(v) for k, v in values.items()}
            for name, values in record.baselines.items()
        },
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
    """Row per trial: what it is, whether it counts, its weights of terms and all its final metrics."""
    metrics = sorted({key for trial in record.trials for key in trial.metrics})
    head = ["trial", "configuration", "model_size", "seed", "status", "counted", "run_id"]
    others = {key for trial in record.trials for key in trial.params if key.startswith(PREFIX)}
    params = [*NAMED.values(), *sorted(others)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*head, *params, *metrics])
        for t in record.trials:
            seed = "" if t.seed is None else t.seed
            row = [t.trial_id, t.config, size_of(t), seed, t.status, int(t.is_complete), t.run_id]
            values = [repr(t.metrics[key]) if key in t.metrics else "" for key in metrics]
            writer.writerow([*row, *(t.params.get(key, "") for key in params), *values])


def bullets(lines: Iterable[str]) -> str:
    """Lines as a Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def publish_report(tracker: StudyTracker) -> dict[str, Any]:
    """Write the report to the parent run, print its table, return its numbers."""
    record = read_study(tracker.tracking_uri, tracker.parent_run_id)
    with tempfile.TemporaryDirectory() as folder:
        write_report_files(Path(folder), record)
        print(summary(record))
        tracker.log_artifacts(Path(folder))
    return result_json(record)
