"""What a study says: one sentence computed from the numbers, tables, plots, and what cannot be concluded.

Only finished trials count. Several trials of one seed are averaged first, so that a spread is always one over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tuning.analysis import (
    MAIN,
    REFERENCE,
    SEEDS_FOR_SPREAD,
    Cell,
    Comparison,
    Group,
    compare,
    group_trials,
    number,
    ranked,
    repeated_seeds,
    size_of,
)
from tuning.plots import DeltaMap, plot_curves, plot_delta_map, plot_outcomes
from tuning.tracking import TrialResult

__all__ = ["DeltaMap", "collect_baselines", "result_json", "write_report"]

Baselines = Mapping[str, Mapping[str, float]]
UPPER_BOUND = "teacher"
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
}
SHORT = (MAIN, "heldout/delta_cosine", "heldout/accuracy_shuffled_prompts", "train/accuracy", "time/seconds")


def write_report(
    out: Path, study: str, trials: Sequence[TrialResult], baselines: Baselines, deltas: DeltaMap | None
) -> str:
    """Write `report.md` and its plots into `out`; return the sentence, its caveats and the main table, in Markdown.

    Raises OSError if `out` cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    groups = group_trials(trials)
    notes = caveats(groups, trials, baselines)
    top = "\n\n".join(headlines(groups, trials))
    pictures = _plots(out, groups, baselines, deltas)
    sections = [
        f"# Study {study}",
        top,
        "**What cannot be concluded**\n\n" + _bullets(notes),
        "## Results\n\nMean ± sample standard deviation over seeds.\n\n" + _table(groups, METRICS),
        _section("Baselines", _baseline_table(baselines)),
        _section(f"Differences in {MAIN}", _comparison_table(compare(groups))),
        _section("Plots", "\n\n".join(f"![{name}]({name})\n\n*{title}*" for name, title in pictures.items())),
        "## What the metrics mean\n\n" + _bullets(f"`{key}`: {METRICS[key]}" for key in _present(groups, METRICS)),
        "## Trials\n\n" + _trial_table(trials),
    ]
    (out / "report.md").write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")
    return "\n\n".join(filter(None, (top, _bullets(notes), _table(groups, SHORT), _baseline_table(baselines))))


def result_json(study: str, trials: Sequence[TrialResult], baselines: Baselines) -> dict[str, Any]:
    """The numbers of the report as one object that JSON can hold; a value that is not finite becomes None."""
    groups = group_trials(trials)
    return {
        "study": study,
        "summary": headlines(groups, trials),
        "caveats": caveats(groups, trials, baselines),
        "configurations": [_group_json(group) for group in groups],
        "comparisons": [vars(comparison) for comparison in compare(groups)],
        "baselines": {name: {k: _finite(v) for k, v in values.items()} for name, values in baselines.items()},
        "trials": [{"trial": t.trial_id, "config": t.config, "seed": t.seed, "status": t.status} for t in trials],
    }


def collect_baselines(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Sort metrics named `baseline/<name>/<key>` into a mapping by name and key."""
    found: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        if key.startswith("baseline/") and key.count("/") == 2:
            _, name, metric = key.split("/")
            found.setdefault(name, {})[metric] = value
    return found


def headlines(groups: Sequence[Group], trials: Sequence[TrialResult]) -> list[str]:
    """One sentence per model size: which configuration is best on held-out tasks and how that stands to weight-only."""
    comparisons = compare(groups)
    found = []
    for size in dict.fromkeys(size_of(trial) for trial in trials):
        ordered = ranked(groups, size)
        where = f"On {size}, " if len({size_of(trial) for trial in trials}) > 1 else ""
        if ordered:
            found.append(where + _headline(ordered, [c for c in comparisons if c.size == size]))
        else:
            found.append(f"{where}no trial finished with a value of {MAIN}, so there is nothing to conclude.")
    return found or [f"No trial was run, so there is no {MAIN} to speak of."]


def _headline(ordered: Sequence[Group], comparisons: Sequence[Comparison]) -> str:
    best = ordered[0]
    cell = best.cell(MAIN)
    assert cell is not None
    field = _count(len(ordered), "configuration")
    text = f"**{best.config}** has the highest {MAIN} of {field}: {cell} ({_over(cell)})"
    if not any(group.config.startswith(REFERENCE) for group in ordered):
        return f"{text}; no {REFERENCE} configuration finished, so nothing is said of behavioural supervision."
    if best.config.startswith(REFERENCE):
        return f"{text}; {_losers(comparisons)}."
    own = next((c for c in comparisons if c.config == best.label), None)
    if own is None:
        return f"{text}; it shares no seed with {REFERENCE}, so the two are not compared."
    return f"{text}, {_difference(own)} than {own.reference}."


def _losers(comparisons: Sequence[Comparison]) -> str:
    if not comparisons:
        return "there is nothing to compare it with"
    parts = [f"{c.config} is {_difference(c)}" for c in comparisons]
    return "behavioural supervision did not help here: " + ", ".join(parts)


def _difference(comparison: Comparison) -> str:
    direction = "higher" if comparison.difference > 0 else "lower"
    text = f"{number(abs(comparison.difference))} {direction}"
    if comparison.difference == 0:
        text = "neither higher nor lower"
    if comparison.interval is None:
        return f"{text} (paired over {_count(comparison.n, 'seed')})"
    low, high = (number(value) for value in comparison.interval)
    verdict = "" if comparison.is_clear else ", which seeds alone may explain"
    spread = f"sd {number(comparison.sd)}, 95 % interval {low} to {high}"
    return f"{text} (paired over {comparison.n} seeds, {spread}{verdict})"


def caveats(groups: Sequence[Group], trials: Sequence[TrialResult], baselines: Baselines) -> list[str]:
    """What a doubting reader must know beside the sentence: seeds, failures, baselines that win, prompts not read."""
    counts = [len(group.by_seed(MAIN)) for group in groups] or [0]
    found = [*_failures(trials), *_baselines_that_win(groups, baselines), *_prompts_not_read(groups)]
    if min(counts) < SEEDS_FOR_SPREAD:
        least = _count(min(counts), "seed")
        found.append(f"Down to {least} per configuration: below {SEEDS_FOR_SPREAD}, no spread is claimed.")
    else:
        found.append(f"{min(counts)} seeds give a coarse spread: of training seeds, for one set of held-out tasks.")
    if doubled := repeated_seeds(trials):
        found.append(f"Several trials share a seed and are averaged as one: {', '.join(doubled)}.")
    if len(groups) > 2:
        found.append(f"The best was picked out of {len(groups)} after the fact, so its lead is flattered.")
    found.append("Nothing is said about other suites, base models, step counts or learning rates than those that ran.")
    return found


def _failures(trials: Sequence[TrialResult]) -> list[str]:
    lost = [trial for trial in trials if trial.status != "FINISHED"]
    if not lost:
        return []
    names = ", ".join(f"{t.config} seed {t.seed} ({t.trial_id}, {t.status})" for t in lost)
    return [f"{len(lost)} of {_count(len(trials), 'trial')} did not finish and are left out: {names}."]


def _baselines_that_win(groups: Sequence[Group], baselines: Baselines) -> list[str]:
    found = []
    for size in dict.fromkeys(group.size for group in groups):
        ordered = ranked(groups, size)
        best = ordered[0].cell(MAIN) if ordered else None
        for name, values in baselines.items():
            fits = name.endswith(f"({size})") or not name.endswith(")")
            accuracy = values.get("accuracy")
            if best and fits and accuracy is not None and not name.startswith(UPPER_BOUND) and accuracy >= best.mean:
                found.append(
                    f"The baseline {name} ({number(accuracy)}) is at least as good as the best configuration, "
                    f"{ordered[0].label} ({number(best.mean)})."
                )
    return found


def _prompts_not_read(groups: Sequence[Group]) -> list[str]:
    found = []
    for group in groups:
        own, shuffled = group.cell(MAIN), group.cell("heldout/accuracy_shuffled_prompts")
        if own and shuffled and own.mean > 0 and shuffled.mean > own.mean / 2:
            found.append(
                f"{group.label} keeps {number(shuffled.mean)} of {number(own.mean)} with the prompts of another task: "
                "it may not be reading its prompts."
            )
    return found


def _table(groups: Sequence[Group], metrics: Iterable[str]) -> str:
    rows = []
    for group in groups:
        row = {"configuration": group.label, "seeds": str(len(group.seeds))}
        for metric in _present(groups, metrics):
            cell = group.cell(metric)
            partial = f" (n={cell.n})" if cell and cell.n != len(group.seeds) else ""
            row[metric] = f"{cell}{partial}" if cell else "–"
        rows.append(row)
    return _markdown(rows) or "No trial finished."


def _baseline_table(baselines: Baselines) -> str:
    keys = dict.fromkeys(key for values in baselines.values() for key in values if f"heldout/{key}" in METRICS)
    rows = [
        {"baseline": name, **{f"heldout/{key}": number(values[key]) if key in values else "–" for key in keys}}
        for name, values in baselines.items()
    ]
    return _markdown(rows)


def _comparison_table(comparisons: Sequence[Comparison]) -> str:
    rows = [
        {
            "configuration": c.config,
            "against": c.reference,
            "shared seeds": str(c.n),
            "difference": f"{c.difference:+.3f}",
            "sd": number(c.sd),
            "95 % interval": f"{c.interval[0]:+.3f} to {c.interval[1]:+.3f}" if c.interval else "–",
            "p (paired t)": number(c.p),
            "p (Holm)": number(c.p_holm),
        }
        for c in comparisons
    ]
    return _markdown(rows)


def _trial_table(trials: Sequence[TrialResult]) -> str:
    rows = [
        {
            "trial": trial.trial_id,
            "configuration": trial.config,
            "size": size_of(trial) or "–",
            "seed": str(trial.seed),
            "status": trial.status,
            MAIN: number(trial.metrics.get(MAIN)),
            "MLflow run": trial.run_id,
        }
        for trial in trials
    ]
    return _markdown(rows) or "There is none."


def _plots(out: Path, groups: Sequence[Group], baselines: Baselines, deltas: DeltaMap | None) -> dict[str, str]:
    drawn = {
        "learning_curves.png": plot_curves(out / "learning_curves.png", groups),
        "outcomes.png": plot_outcomes(out / "outcomes.png", groups, baselines),
        "delta_map.png": plot_delta_map(out / "delta_map.png", deltas) if deltas else "",
    }
    return {name: title for name, title in drawn.items() if title}


def _group_json(group: Group) -> dict[str, Any]:
    cells = {metric: group.cell(metric) for metric in METRICS}
    return {
        "config": group.config,
        "model_size": group.size,
        "seeds": list(group.seeds),
        "metrics": {m: {**vars(cell), "by_seed": group.by_seed(m)} for m, cell in cells.items() if cell},
    }


def _present(groups: Sequence[Group], metrics: Iterable[str]) -> list[str]:
    return [metric for metric in metrics if any(metric in t.metrics for group in groups for t in group.trials)]


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True) if rows else ""


def _over(cell: Cell) -> str:
    if cell.sd is None:
        return f"{_count(cell.n, 'seed')}, so no spread is claimed"
    return f"mean ± sd over {cell.n} seeds"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
