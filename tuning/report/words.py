"""State what can be concluded from a study's numbers, and what cannot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from llgbm.evaluation.baselines import UPPER_BOUND
from tuning.report.groups import (
    MAIN,
    REFERENCE,
    SEEDS_FOR_SPREAD,
    Baselines,
    Cell,
    Comparison,
    Group,
    is_of_size,
    number,
    ranked,
    reference_of,
    repeated_seeds,
    seeds_needed,
    size_of,
)
from tuning.report.record import StudyRecord
from tuning.significance import p_text
from tuning.tracking.runs import TrialResult

NAMED = 4  # comparisons that a sentence spells out
LISTED = 10  # trials that a caveat names
SHARE_OF_PROMPTS = (
    0.5  # accuracy kept with the prompts of another task, above which prompts may not be read
)


def headlines(record: StudyRecord) -> list[str]:
    """Return one sentence per model size: conclusions on the best configuration, and what cannot be concluded."""
    sizes = list(dict.fromkeys(size_of(trial) for trial in record.trials))
    found = [_of_size(record, size, len(sizes) > 1) for size in sizes]
    return found or [f"No trial was run, so there is no {MAIN} to speak of."]


def _of_size(record: StudyRecord, size: str, several: bool) -> str:
    where = f"On {size}, " if several else ""
    ordered = ranked(record.groups, size)
    if not ordered:
        return f"{where}no trial finished with a value of {MAIN}, so there is nothing to conclude."
    comparisons = [c for c in record.comparisons if c.size == size]
    parts = [*_on_best(ordered, comparisons), _on_supervision(ordered, comparisons)]
    return where + "; ".join(filter(None, parts)) + "."


def _on_best(ordered: Sequence[Group], comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Yield clauses on the configuration of the highest rank, or on those that share it."""
    best, cell = ordered[0], _cell(ordered[0])
    tied = [group for group in ordered if _is_tied(group, cell)]
    of = f"of {count(len(ordered), 'configuration')}"
    if len(ordered) == 1:
        yield f"**{best.config}** has a {MAIN} of {cell} ({_over(cell)}) and was the only configuration that finished"
        return
    if len(tied) > 1:
        names = _listed([f"**{group.config}**" for group in tied], LISTED)
        yield f"{names} share the highest {MAIN} {of}, {number(cell.mean)}: a tie ({_over(cell)})"
    else:
        yield f"**{best.config}** has the highest {MAIN} {of}: {cell} ({_over(cell)})"
    yield from _on_few_seeds(ordered, cell)
    if len(tied) == 1:
        yield from _conclusions(best, comparisons)
        tested = sum(best.label in (c.config, c.reference) for c in comparisons)
        if untested := len(ordered) - 1 - tested:
            yield f"its lead over the other {untested} was not tested"


def _cell(group: Group) -> Cell:
    cell = group.cell(MAIN)
    assert cell is not None
    return cell


def _is_tied(group: Group, best: Cell) -> bool:
    """True if it is as good as the best, to the decimals that are shown, on as many seeds as a rank needs."""
    own = _cell(group)
    return own.n >= min(best.n, SEEDS_FOR_SPREAD) and number(own.mean) == number(best.mean)


def _on_few_seeds(ordered: Sequence[Group], best: Cell) -> Iterator[str]:
    needed = seeds_needed(map(_cell, ordered))
    few = [g for g in ordered if _cell(g).n < needed and _cell(g).mean >= best.mean]
    if few:
        names = [f"{g.config} ({number(_cell(g).mean)}, {count(_cell(g).n, 'seed')})" for g in few]
        yield f"not ranked for want of {needed} seeds: {_listed(names, NAMED)}"


def _conclusions(best: Group, comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Yield clauses on the configurations that the best one differs from, and on those that it cannot be told from."""
    own = [_turned(c, best.label) for c in comparisons if best.label in (c.config, c.reference)]
    clear = [c for c in own if c.is_clear]
    for c in clear[:NAMED]:
        yield f"it is {_difference(c)} than {c.reference} ({_evidence(c)})"
    if len(clear) > NAMED:
        yield f"it differs from {len(clear) - NAMED} more (see the table of differences)"
    open_ones = [c for c in own if not c.is_clear and c.p is not None]
    for c in open_ones[:NAMED]:
        yield f"whether it differs from {c.reference} cannot be concluded ({_evidence(c)})"
    if len(open_ones) > NAMED:
        yield f"nor from {len(open_ones) - NAMED} more"
    untested = [f"{c.reference} ({_over_what(c)})" for c in own if not c.is_clear and c.p is None]
    if untested:
        yield f"it could not be tested against {_listed(untested, NAMED)}"


def _on_supervision(ordered: Sequence[Group], comparisons: Sequence[Comparison]) -> str:
    """Return what is known of behavioural supervision (λ_d > 0), from tests against the reference alone."""
    supervised = [group for group in ordered if group.is_supervised]
    if not supervised:
        return (
            "no configuration with λ_d > 0 finished, so nothing is said of behavioural supervision"
        )
    reference = reference_of(ordered, ordered[0].size)
    if reference is None or reference.is_supervised:
        return (
            f"no {REFERENCE} configuration finished, so nothing is said of behavioural supervision"
        )
    labels = {group.label for group in supervised}
    pairs = [_turned(c, c.config if c.config in labels else c.reference) for c in comparisons]
    own = [c for c in pairs if c.config in labels and c.reference == reference.label]
    if not own:
        return f"no configuration with λ_d > 0 shares a seed with {reference.label}, so they are not compared"
    better = [c.config for c in own if c.is_clear and c.difference > 0]
    worse = [c.config for c in own if c.is_clear and c.difference < 0]
    if len(worse) == len(supervised):
        lower = f"{_listed(worse, NAMED)} {_is(worse)} lower than {reference.label}"
        return f"behavioural supervision did not help here: {lower}"
    said = []
    if better:
        said.append(f"behavioural supervision helped here in {_listed(better, NAMED)}")
    if worse:
        said.append(f"behavioural supervision lowered {MAIN} in {_listed(worse, NAMED)}")
    return "; ".join(said) or "whether behavioural supervision helps cannot be concluded"


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _listed(names: Sequence[str], most: int) -> str:
    """Return names as "a, b and c", or as the first ones and the number of the rest."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _turned(c: Comparison, label: str) -> Comparison:
    """Return the comparison as seen from one of its two sides."""
    if c.config == label:
        return c
    interval, effect = c.interval, c.effect
    if interval is not None:
        interval = (-interval[1], -interval[0])
    if effect is not None:
        effect = -effect
    return replace(
        c,
        config=c.reference,
        reference=c.config,
        difference=-c.difference,
        interval=interval,
        effect=effect,
        wins=c.losses,
        losses=c.wins,
    )


def _difference(c: Comparison) -> str:
    word = "higher" if c.difference > 0 else "lower"
    return f"{number(abs(c.difference))} {word}"


def _evidence(c: Comparison) -> str:
    parts = [f"difference {c.difference:+.3f}"]
    if c.interval:
        parts.append(f"95 % interval {c.interval[0]:+.3f} to {c.interval[1]:+.3f}")
    return ", ".join([*parts, f"{p_text(c.p_holm)} by Holm", _over_what(c)])


def _over_what(c: Comparison) -> str:
    seeds = count(c.n, "seed")
    if not c.tasks:
        return seeds
    return f"{seeds} × {count(c.tasks, 'task')}"


def caveats(record: StudyRecord) -> list[str]:
    """Return what a reader must know beside the sentence: missing trials, seeds, baselines that win, prompts."""
    groups = record.groups
    counts = [len(group.by_seed(MAIN)) for group in groups] or [0]
    found = [
        *_progress(record),
        *left_out(record.trials),
        *_baselines_that_win(groups, record.baselines),
        *_prompts_not_read(groups),
        *record.missing[:NAMED],
        *_more_missing(record),
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
    if labelled := [group.label for group in groups if group.uses_labels]:
        found.append(
            f"{_listed(labelled, NAMED)} {_is(labelled)} trained on true labels: a reference, not a method."
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


def _progress(record: StudyRecord) -> Iterator[str]:
    """Yield how far the study came, if it did not come to its end."""
    complete = len(
        {t.trial_id for t in record.trials if t.status == "FINISHED" and not t.superseded}
    )
    planned = record.planned or len(record.trials)
    if record.status in ("KILLED", "FAILED"):
        yield f"{complete} of {count(planned, 'trial')}, study {record.status.lower()}."
    elif complete < planned:
        yield f"{complete} of {count(planned, 'trial')} finished."


def _more_missing(record: StudyRecord) -> Iterator[str]:
    if len(record.missing) > NAMED:
        yield f"{len(record.missing) - NAMED} more artifacts cannot be read and are left out."


def left_out(trials: Sequence[TrialResult]) -> list[str]:
    """Return what is not counted: trials that failed, that the scheduler stopped, or that newer runs replace."""
    current = [trial for trial in trials if not trial.superseded]
    lost = [trial for trial in current if trial.status != "FINISHED"]
    stopped = [
        trial for trial in current if trial.status == "FINISHED" and trial.stopped_at is not None
    ]
    found = []
    if lost:
        names = _listed(
            [f"{t.config} seed {t.seed} ({t.trial_id}, {_fate(t)})" for t in lost], LISTED
        )
        found.append(
            f"{len(lost)} of {count(len(current), 'trial')} did not finish and are left out: {names}."
        )
    if stopped:
        names = _listed(
            [f"{t.config} seed {t.seed} at step {t.stopped_at}" for t in stopped], LISTED
        )
        found.append(
            f"{count(len(stopped), 'trial')} stopped early by the scheduler, left out: {names}."
        )
    if len(current) < len(trials):
        found.append(
            f"{count(len(trials) - len(current), 'run')} begun anew since (superseded), left out."
        )
    return found


def _fate(trial: TrialResult) -> str:
    if not trial.cause:
        return trial.status
    return f"{trial.status}: {trial.cause.rstrip('.')}"


def _numbers_by_task_missing(record: StudyRecord) -> list[str]:
    complete = [trial for trial in record.trials if trial.is_complete]
    without = [trial for trial in complete if trial.run_id not in record.by_task]
    if not without:
        return []
    return [
        f"{len(without)} of {count(len(complete), 'trial')} kept no numbers by task: what needs them is tested over "
        "seeds alone, which says nothing about other tasks."
    ]


def _baselines_that_win(groups: Sequence[Group], baselines: Baselines) -> Iterator[str]:
    for size in dict.fromkeys(group.size for group in groups):
        ordered = ranked(groups, size)
        if not ordered:
            continue
        best = _cell(ordered[0])
        winners = [
            f"{name} ({number(values['accuracy'])})"
            for name, values in baselines.items()
            if _is_rival(name, size) and values.get("accuracy", -1.0) >= best.mean
        ]
        if winners:
            yield (
                f"{count(len(winners), 'baseline')} at least as good as the best configuration, {ordered[0].label} "
                f"({number(best.mean)}): {', '.join(winners)}."
            )


def _is_rival(baseline: str, size: str) -> bool:
    """True for a baseline of this model size that is not the upper bound."""
    return not baseline.startswith(UPPER_BOUND) and is_of_size(baseline, size)


def _prompts_not_read(groups: Sequence[Group]) -> Iterator[str]:
    for group in groups:
        own, shuffled = group.cell(MAIN), group.cell("heldout/accuracy_shuffled_prompts")
        if own and shuffled and own.mean > 0 and shuffled.mean > own.mean * SHARE_OF_PROMPTS:
            yield (
                f"{group.label} keeps {number(shuffled.mean)} of {number(own.mean)} with the prompts of another task: "
                "it may not be reading its prompts."
            )


def _over(cell: Cell) -> str:
    if cell.sd is None or cell.interval is None:
        return f"{count(cell.n, 'seed')}, so no spread is claimed"
    return f"mean ± sd over {cell.n} seeds, 95 % interval {cell.interval[0]:.3f} to {cell.interval[1]:.3f}"


def count(n: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1."""
    return f"{n} {noun}{'s' * (n != 1)}"
