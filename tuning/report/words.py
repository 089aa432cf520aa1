"""What a study lets one say, in sentences computed from its numbers, and what it does not."""

from __future__ import annotations

from collections.abc import Sequence

from tuning.report.groups import (
    MAIN,
    REFERENCE,
    SEEDS_FOR_SPREAD,
    Baselines,
    Cell,
    Comparison,
    Group,
    number,
    ranked,
    reference_of,
    repeated_seeds,
    size_of,
)
from tuning.report.record import StudyRecord
from tuning.significance import p_text
from tuning.tracking.runs import TrialResult

UPPER_BOUND = "teacher"


def headlines(record: StudyRecord) -> list[str]:
    """One sentence per model size: what can be concluded of the best configuration, and what cannot."""
    groups, comparisons = record.groups, record.comparisons
    sizes = list(dict.fromkeys(size_of(trial) for trial in record.trials))
    found = []
    for size in sizes:
        where = f"On {size}, " if len(sizes) > 1 else ""
        if ranked(groups, size):
            found.append(
                where + _headline(groups, size, [c for c in comparisons if c.size == size])
            )
        else:
            found.append(
                f"{where}no trial finished with a value of {MAIN}, so there is nothing to conclude."
            )
    return found or [f"No trial was run, so there is no {MAIN} to speak of."]


def _headline(groups: Sequence[Group], size: str, comparisons: Sequence[Comparison]) -> str:
    ordered = ranked(groups, size)
    best, cell = ordered[0], ordered[0].cell(MAIN)
    assert cell is not None
    text = f"**{best.config}** has the highest {MAIN} of {count(len(ordered), 'configuration')}: {cell} ({_over(cell)})"
    parts = [text, *_conclusions(best, comparisons), _on_supervision(best, ordered, comparisons)]
    untested = len(ordered) - 1 - sum(best.label in (c.config, c.reference) for c in comparisons)
    if untested:
        parts.append(f"its lead over the other {untested} was not tested")
    return "; ".join(filter(None, parts)) + "."


def _conclusions(best: Group, comparisons: Sequence[Comparison]) -> list[str]:
    """Against which configurations the best one stands, and against which nothing can be told."""
    own = [_turned(c, best.label) for c in comparisons if best.label in (c.config, c.reference)]
    clear = [c for c in own if c.is_clear]
    tested = [c for c in own if not c.is_clear and c.p is not None]
    bare = [c for c in own if not c.is_clear and c.p is None]
    found = [f"it is {_difference(c)} than {c.reference} ({_evidence(c)})" for c in clear]
    found += [
        f"whether it differs from {c.reference} cannot be concluded ({_evidence(c)})"
        for c in tested
    ]
    return found + [
        f"it is {_difference(c)} than {c.reference}, which could not be tested ({_over_what(c)})"
        for c in bare
    ]


def _on_supervision(
    best: Group, ordered: Sequence[Group], comparisons: Sequence[Comparison]
) -> str:
    if not any(group.config.startswith(REFERENCE) for group in ordered):
        return (
            f"no {REFERENCE} configuration finished, so nothing is said of behavioural supervision"
        )
    if best.config.startswith(REFERENCE) and len(ordered) > 1:
        return "behavioural supervision did not help here"
    reference = reference_of(ordered, best.size)
    if reference in (best, None) or any(best.label in (c.config, c.reference) for c in comparisons):
        return ""
    return f"it shares no seed with {reference.label}, so the two are not compared"


def _turned(comparison: Comparison, label: str) -> Comparison:
    """The comparison seen from one of its two sides."""
    if comparison.config == label:
        return comparison
    c = comparison
    interval = (-c.interval[1], -c.interval[0]) if c.interval else None
    effect = None if c.effect is None else -c.effect
    return Comparison(
        c.reference,
        c.config,
        c.size,
        -c.difference,
        c.sd,
        interval,
        c.p,
        c.n,
        c.tasks,
        effect,
        c.losses,
        c.wins,
        c.p_holm,
    )


def _difference(comparison: Comparison) -> str:
    if comparison.difference == 0:
        return "neither higher nor lower"
    return (
        f"{number(abs(comparison.difference))} {'higher' if comparison.difference > 0 else 'lower'}"
    )


def _evidence(c: Comparison) -> str:
    low_high = f"95 % interval {c.interval[0]:+.3f} to {c.interval[1]:+.3f}, " if c.interval else ""
    return f"difference {c.difference:+.3f}, {low_high}{p_text(c.p_holm)} by Holm, {_over_what(c)}"


def _over_what(c: Comparison) -> str:
    tasks = f" × {count(c.tasks, 'task')}" if c.tasks else ""
    return f"{count(c.n, 'seed')}{tasks}"


def caveats(record: StudyRecord) -> list[str]:
    """What a doubting reader must know beside the sentence: seeds, what was left out, baselines that win, prompts."""
    groups = record.groups
    counts = [len(group.by_seed(MAIN)) for group in groups] or [0]
    found = [
        *left_out(record.trials),
        *_baselines_that_win(groups, record.baselines),
        *_prompts_not_read(groups),
    ]
    if min(counts) < SEEDS_FOR_SPREAD:
        least = count(min(counts), "seed")
        found.append(
            f"Down to {least} per configuration: below {SEEDS_FOR_SPREAD}, no spread or test is claimed."
        )
    else:
        found.append(
            f"{min(counts)} seeds give a coarse spread: of training seeds, for one world and one bank."
        )
    found += _numbers_by_task_missing(record)
    if doubled := repeated_seeds(record.trials):
        found.append(f"Several trials share a seed and are averaged as one: {', '.join(doubled)}.")
    if len(groups) > 2:
        found.append(
            f"The best was picked out of {len(groups)} after the fact, so its lead is flattered."
        )
    found.append(
        "Nothing is said about other suites, base models, step counts or learning rates than those that ran."
    )
    return found


def left_out(trials: Sequence[TrialResult]) -> list[str]:
    """What is not counted: trials that failed, were stopped early by the scheduler, or were begun anew."""
    current = [trial for trial in trials if not trial.superseded]
    lost = [trial for trial in current if trial.status != "FINISHED"]
    stopped = [
        trial for trial in current if trial.status == "FINISHED" and trial.stopped_at is not None
    ]
    found = []
    if lost:
        names = _shortened([f"{t.config} seed {t.seed} ({t.trial_id}, {t.status})" for t in lost])
        found.append(
            f"{len(lost)} of {count(len(current), 'trial')} did not finish and are left out: {names}."
        )
    if stopped:
        names = _shortened([f"{t.config} seed {t.seed} at step {t.stopped_at}" for t in stopped])
        found.append(
            f"{count(len(stopped), 'trial')} stopped early by the scheduler, left out: {names}."
        )
    if len(current) < len(trials):
        found.append(
            f"{count(len(trials) - len(current), 'run')} begun anew since (superseded), left out."
        )
    return found


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _numbers_by_task_missing(record: StudyRecord) -> list[str]:
    whole = [trial for trial in record.trials if trial.is_complete]
    without = [trial for trial in whole if trial.run_id not in record.by_task]
    if not without:
        return []
    return [
        f"{len(without)} of {count(len(whole), 'trial')} kept no numbers by task: what needs them is tested over seeds "
        "alone, which says nothing about other tasks."
    ]


def _baselines_that_win(groups: Sequence[Group], baselines: Baselines) -> list[str]:
    found = []
    for size in dict.fromkeys(group.size for group in groups):
        ordered = ranked(groups, size)
        best = ordered[0].cell(MAIN) if ordered else None
        fits = {
            name: v["accuracy"]
            for name, v in baselines.items()
            if "accuracy" in v and _is_of(name, size)
        }
        winners = [
            f"{name} ({number(value)})"
            for name, value in fits.items()
            if best and value >= best.mean
        ]
        if best and winners:
            found.append(
                f"{count(len(winners), 'baseline')} at least as good as the best configuration, {ordered[0].label} "
                f"({number(best.mean)}): {', '.join(winners)}."
            )
    return found


def _is_of(baseline: str, size: str) -> bool:
    """Whether it is a baseline of this model size, and not the upper bound."""
    return not baseline.startswith(UPPER_BOUND) and (
        baseline.endswith(f"({size})") or not baseline.endswith(")")
    )


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


def _over(cell: Cell) -> str:
    if cell.sd is None or cell.interval is None:
        return f"{count(cell.n, 'seed')}, so no spread is claimed"
    return f"mean ± sd over {cell.n} seeds, 95 % interval {cell.interval[0]:.3f} to {cell.interval[1]:.3f}"


def count(n: int, noun: str) -> str:
    """A number with its noun, in the plural where there are several."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
