"""Format the tables of a report in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

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
    reference_of,
    size_of,
)
from tuning.significance import p_text
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


NOTABLE = 8  # configurations of a size that a chart of curves or a table by task can hold


def notable(groups: Sequence[Group]) -> list[Group]:
    """Return the best configurations of each size and what they are compared with; `groups` are sorted by rank."""
    found: list[Group] = []
    for size in dict.fromkeys(group.size for group in groups):
        own = [group for group in groups if group.size == size]
        reference = reference_of(groups, size)
        found += own[:NOTABLE]
        if reference is not None and reference not in found:
            found.append(reference)
    return found


def metric_table(groups: Sequence[Group], metrics: Iterable[str]) -> str:
    """Return mean ± sd over seeds of the metrics that any trial has, a row per configuration."""
    shown = present(groups, metrics)
    return markdown([_metric_row(group, shown) for group in groups]) or EMPTY


def cost_table(groups: Sequence[Group]) -> str:
    """Return seconds and memory of a trial, a row per configuration; "" if no trial finished."""
    shown = present(groups, COST)
    return markdown([_metric_row(group, shown) for group in groups])


def result_table(groups: Sequence[Group], baselines: Baselines) -> str:
    """Return held-out results with the 95 % interval of the accuracy, and the baselines beneath."""
    if not groups:
        return EMPTY
    metrics = present(groups, RESULTS)
    rows = []
    for group in groups:
        cell = group.cell(MAIN)
        row = {"configuration": group.label, "seeds": str(len(group.seeds))}
        row[MAIN] = shown(cell, group)
        row["95 % interval"] = _interval(getattr(cell, "interval", None))
        rows.append(row | {metric: shown(group.cell(metric), group) for metric in metrics})
    for name, values in baselines.items():
        row = {"configuration": f"*{name}*", MAIN: number(values.get("accuracy"))}
        for metric in metrics:
            if metric.startswith("heldout/"):
                row[metric] = number(values.get(metric.removeprefix("heldout/")))
        rows.append(row)
    return markdown(rows)


def baseline_table(baselines: Baselines) -> str:
    """Return a row per baseline, "" if there is none."""
    keys = [key.removeprefix("heldout/") for key in METRICS if key.startswith("heldout/")]
    rows = []
    for name, values in baselines.items():
        own = {f"heldout/{key}": number(values[key]) for key in keys if key in values}
        rows.append({"baseline": name, **own})
    return markdown(rows)


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Return a row per paired comparison, the clearest first; "" if there is none."""
    return markdown([_comparison_row(c) for c in sorted(comparisons, key=_unclear)])


def _unclear(c: Comparison) -> tuple[float, float]:
    p = 2.0 if c.p_holm is None else c.p_holm
    return p, -abs(c.difference)


def _comparison_row(c: Comparison) -> dict[str, str]:
    row = {
        "configuration": c.config,
        "against": c.reference,
        "difference": f"{c.difference:+.3f}",
        "95 % interval": _interval(c.interval, "+"),
        "p": _p(c.p),
        "p (Holm)": _p(c.p_holm),
    }
    if c.effect is not None:
        row["effect size"] = f"{c.effect:+.2f}"
    if c.tasks:
        row["tasks better / worse"] = f"{c.wins} / {c.losses} of {c.tasks}"
    return row | {"sd over seeds": number(c.sd), "seeds": str(c.n)}


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
        cells = {title: shown(group.cell(m), group) for title, m in columns.items()}
        rows.append({"configuration": group.label, **cells})
    return markdown(rows)


def memorisation_table(groups: Sequence[Group]) -> str:
    """Return the controls beside the accuracy, with the gap between training and held-out tasks."""
    metrics = present(groups, CONTROLS)
    rows = []
    for group in groups:
        row = {"configuration": group.label, MAIN: shown(group.cell(MAIN), group)}
        row |= {metric: shown(group.cell(metric), group) for metric in metrics}
        rows.append({**row, "train - heldout": shown(group.gap(), group)})
    return markdown(rows)


def task_table(groups: Sequence[Group]) -> str:
    """Return held-out accuracy by task, mean over seeds, a column per configuration; "" if no trial kept it."""
    columns = {group.label: _by_task(group) for group in groups}
    rows = []
    for task in sorted(set(chain.from_iterable(columns.values()))):
        cells = {label: number(values.get(task)) for label, values in columns.items() if values}
        rows.append({"held-out task": task, **cells})
    return markdown(rows)


def _by_task(group: Group) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for values in group.task_accuracy().values():
        for task, value in values.items():
            found.setdefault(task, []).append(value)
    return {task: float(np.mean(values)) for task, values in found.items()}


def trial_table(trials: Sequence[TrialResult]) -> str:
    """Return a row per trial, best first, those that are left out too."""
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
        for trial in sorted(trials, key=lambda trial: -trial.metrics.get(MAIN, -1.0))
    ]
    return markdown(rows) or "There is none."


def _status(trial: TrialResult) -> str:
    if trial.superseded:
        return "superseded"
    if trial.stopped_at is not None:
        return f"stopped at step {trial.stopped_at}"
    if trial.status == "FAILED" and trial.cause:
        return f"FAILED: {trial.cause}"
    return trial.status


def metric_list(groups: Sequence[Group]) -> list[str]:
    """Return the meaning of each metric that any trial has, a line each."""
    return [f"`{key}`: {METRICS[key]}" for key in present(groups, METRICS)]


def present(groups: Sequence[Group], metrics: Iterable[str]) -> list[str]:
    """Return those metrics that any trial has."""
    trials = chain.from_iterable(group.trials for group in groups)
    known = set(chain.from_iterable(trial.metrics for trial in trials))
    return [metric for metric in metrics if metric in known]


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows as a Markdown table, "" without any. Names must be escaped before."""
    if not rows:
        return ""
    return pd.DataFrame(rows).fillna("–").to_markdown(index=False, disable_numparse=True)


def _metric_row(group: Group, metrics: Iterable[str]) -> dict[str, str]:
    head = {"configuration": group.label, "seeds": str(len(group.seeds))}
    return {**head, **{metric: shown(group.cell(metric), group) for metric in metrics}}


def shown(cell: Cell | None, group: Group) -> str:
    """Return a cell as text, with its number of seeds or worlds where some of the group's have no value."""
    if cell is None:
        return "–"
    if cell.n != group.n_units(cell.unit):
        return f"{cell} (n={cell.n})"
    return str(cell)


def _interval(interval: tuple[float, float] | None, sign: str = "") -> str:
    if interval is None:
        return "–"
    return f"{interval[0]:{sign}.3f} to {interval[1]:{sign}.3f}"


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return p_text(value).removeprefix("p ").removeprefix("= ")
