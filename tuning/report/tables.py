"""The tables of a report, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from llgbm.evaluation.levels import PREFIX as NOVELTY
from tuning.report.groups import (
    MAIN,
    SEALED,
    Baselines,
    Cell,
    Comparison,
    Group,
    number,
    size_of,
)
from tuning.tracking.runs import TrialResult

METRICS = {
    "heldout/accuracy": "exact-match accuracy on tasks never seen in training or selection, zero-shot; mean over tasks",
    "heldout/delta_cosine": "cosine between the delta of the generated and of the teacher adapter; per task, then mean",
    "heldout/delta_norm_ratio": "length of the generated delta over that of the teacher's (1 = same strength)",
    "heldout/delta_w_error": "|ΔW - ΔW of the teacher| / |ΔW of the teacher| with ΔW = BA (0 = equal, 1 = like ΔW = 0)",
    "heldout/accuracy_shuffled_prompts": "accuracy with the prompts of another task (high = the prompts are not read)",
    "heldout/accuracy_nonsense_prompts": "accuracy with meaningless prompts (high = one adapter fits all)",
    "heldout/nearest_teacher_distance": "relative distance of ΔW to the nearest training teacher (0 = a copy of it)",
    "heldout/diversity": "1 - mean cosine between generated ΔW (0 = the same adapter for every task)",
    "train/accuracy": "the accuracy on training tasks, from prompts not used in training",
    "val/accuracy": "the accuracy on validation tasks, which choose the step that is kept and the champion",
    "time/steps_per_second": "training steps per second, one trial, while its neighbours ran",
    "time/seconds": "seconds of one trial, evaluation included",
    "time/peak_memory_mb": "peak memory of one trial in MB: of the GPU where there is one, else of its process",
}
SHORT = (
    MAIN,
    "heldout/delta_cosine",
    "heldout/accuracy_shuffled_prompts",
    "train/accuracy",
    "time/seconds",
)
RESULTS = (
    "heldout/delta_cosine",
    "heldout/delta_norm_ratio",
    "heldout/delta_w_error",
    "val/accuracy",
)
CONTROLS = (
    "train/accuracy",
    "heldout/accuracy_shuffled_prompts",
    "heldout/accuracy_nonsense_prompts",
    "heldout/nearest_teacher_distance",
    "heldout/diversity",
)
COST = ("time/seconds", "time/steps_per_second", "time/peak_memory_mb")
EMPTY = "No trial finished."


def metric_table(groups: Sequence[Group], metrics: Iterable[str]) -> str:
    """Mean ± sd over seeds of the metrics that there are, a row per configuration."""
    return markdown([_metric_row(group, present(groups, metrics)) for group in groups]) or EMPTY


def result_table(groups: Sequence[Group], baselines: Baselines) -> str:
    """Held-out results with the 95 % interval of the accuracy, and the baselines beneath."""
    metrics = present(groups, RESULTS)
    rows = []
    for group in groups:
        cell = group.cell(MAIN)
        first = {
            MAIN: _shown(cell, group),
            "95 % interval": _interval(cell.interval if cell else None),
        }
        head = {"configuration": group.label, "seeds": str(len(group.seeds)), **first}
        rows.append({**head, **{m: _shown(group.cell(m), group) for m in metrics}})
    for name, values in baselines.items() if rows else ():
        own = {
            m: number(values.get(m.removeprefix("heldout/")))
            for m in metrics
            if m.startswith("heldout/")
        }
        head = {
            "configuration": f"*{name}*",
            "seeds": "–",
            MAIN: number(values.get("accuracy")),
            "95 % interval": "–",
        }
        rows.append({**head, **{m: "–" for m in metrics}, **own})
    return markdown(rows) or EMPTY


def baseline_table(baselines: Baselines) -> str:
    """Row per baseline, "" where there is none."""
    keys = dict.fromkeys(
        key for values in baselines.values() for key in values if f"heldout/{key}" in METRICS
    )
    rows = [
        {"baseline": name, **{f"heldout/{key}": number(values.get(key)) for key in keys}}
        for name, values in baselines.items()
    ]
    return markdown(rows)


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Row per paired comparison, "" where there is none."""
    rows = [
        {
            "configuration": c.config,
            "against": c.reference,
            "difference": f"{c.difference:+.3f}",
            "95 % interval": _interval(c.interval, "+"),
            "p": _p(c.p),
            "p (Holm)": _p(c.p_holm),
            "effect size": "–" if c.effect is None else f"{c.effect:+.2f}",
            "tasks better / worse": f"{c.wins} / {c.losses} of {c.tasks}" if c.tasks else "–",
            "sd over seeds": number(c.sd),
            "seeds": str(c.n),
        }
        for c in comparisons
    ]
    return markdown(rows)


def novelty_table(groups: Sequence[Group]) -> str:
    """Held-out accuracy beside that at each level of novelty, a row per configuration; "" where none was measured."""
    return _table_of(groups, f"{NOVELTY}/", {"recombination": MAIN})


def sealed_table(groups: Sequence[Group]) -> str:
    """Accuracy on the sealed tasks, a row per configuration; "" where they were not opened."""
    return _table_of(groups, f"{SEALED}/", {})


def _table_of(groups: Sequence[Group], prefix: str, columns: Mapping[str, str]) -> str:
    """Row per configuration of the metrics with a prefix, beside the `columns`: metric by title."""
    metrics = {m for group in groups for t in group.trials for m in t.metrics}
    found = sorted(metric for metric in metrics if metric.startswith(prefix))
    if not found:
        return ""
    columns = {**columns, **{m.removeprefix(prefix).replace("_", " "): m for m in found}}
    rows = []
    for group in groups:
        cells = {title: _shown(group.cell(m), group) for title, m in columns.items()}
        rows.append({"configuration": group.label, **cells})
    return markdown(rows)


def memorisation_table(groups: Sequence[Group]) -> str:
    """Controls beside the accuracy, with the gap between training and held-out tasks."""
    metrics = present(groups, CONTROLS)
    rows = []
    for group in groups:
        gap = group.gap()
        row = {"configuration": group.label, MAIN: _shown(group.cell(MAIN), group)}
        row |= {m: _shown(group.cell(m), group) for m in metrics}
        rows.append({**row, "train - heldout": _shown(gap, group)})
    return markdown(rows)


def task_table(groups: Sequence[Group]) -> str:
    """Held-out accuracy by task, mean over seeds, a column per configuration; "" where no trial kept it."""
    columns = {group.label: _by_task(group) for group in groups}
    columns = {label: values for label, values in columns.items() if values}
    tasks = sorted(dict.fromkeys(task for values in columns.values() for task in values))
    rows = [
        {"held-out task": t, **{label: number(v.get(t)) for label, v in columns.items()}}
        for t in tasks
    ]
    return markdown(rows)


def _by_task(group: Group) -> dict[str, float]:
    by_seed = list(group.task_accuracy().values())
    tasks = dict.fromkeys(task for values in by_seed for task in values)
    return {
        task: float(np.mean([values[task] for values in by_seed if task in values]))
        for task in tasks
    }


def trial_table(trials: Sequence[TrialResult]) -> str:
    """Row per trial, those that are left out too."""
    rows = [
        {
            "trial": trial.trial_id,
            "configuration": trial.config,
            "size": size_of(trial) or "–",
            "seed": str(trial.seed),
            "status": _status(trial),
            MAIN: number(trial.metrics.get(MAIN)),
            "MLflow run": trial.run_id,
        }
        for trial in trials
    ]
    return markdown(rows) or "There is none."


def _status(trial: TrialResult) -> str:
    if trial.superseded:
        return "superseded"
    return trial.status if trial.stopped_at is None else f"stopped at step {trial.stopped_at}"


def metric_list(groups: Sequence[Group]) -> list[str]:
    """Explain the metrics that are present, one line each."""
    return [f"`{key}`: {METRICS[key]}" for key in present(groups, METRICS)]


def present(groups: Sequence[Group], metrics: Iterable[str]) -> list[str]:
    """Of the metrics, those that any trial has."""
    return [
        metric
        for metric in metrics
        if any(metric in t.metrics for group in groups for t in group.trials)
    ]


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a Markdown table, "" if there is none. A bar inside a cell is escaped."""
    safe = [{_cell(key): _cell(value) for key, value in row.items()} for row in rows]
    return (
        pd.DataFrame(safe).fillna("–").to_markdown(index=False, disable_numparse=True)
        if rows
        else ""
    )


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def _metric_row(group: Group, metrics: Iterable[str]) -> dict[str, str]:
    head = {"configuration": group.label, "seeds": str(len(group.seeds))}
    return {**head, **{metric: _shown(group.cell(metric), group) for metric in metrics}}


def _shown(cell: Cell | None, group: Group) -> str:
    if cell is None:
        return "–"
    return f"{cell} (n={cell.n})" if cell.n != group.n_units(cell.unit) else str(cell)


def _interval(interval: tuple[float, float] | None, sign: str = "") -> str:
    return f"{interval[0]:{sign}.3f} to {interval[1]:{sign}.3f}" if interval else "–"


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if value >= 0.001 else "< 0.001"
