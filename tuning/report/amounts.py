"""Draw held-out accuracy against what trials were given: tasks, teachers, trajectories, steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from tuning.report.groups import MAIN, Group
from tuning.report.style import COLOURS, DPI, STROKES, finish_axes, literal_text, new_figure
from tuning.tracking.runs import WORLD_PARAM

# Parameters that are amounts, and what they count. All but steps are 0 where all that a world has is taken.
AMOUNTS = {
    "n_tasks": "training tasks",
    "n_teachers": "teachers of a task",
    "n_trajectories": "trajectories of a teacher",
    "steps": "training steps",
}
ALL = 0
# Parameters in which the trials of one configuration differ.
DRAWN = ("seed", WORLD_PARAM)


@dataclass(frozen=True)
class Line:
    """Configurations that differ in one amount alone, the least first, all of it last."""

    label: str
    points: tuple[tuple[int, Group], ...]


@literal_text
def plot_amounts(path: Path, groups: Sequence[Group]) -> str:
    """Draw held-out accuracy over each amount that configurations differ in; "" where they differ in none."""
    measured = [group for group in groups if group.cell(MAIN)]
    lines = {name: own for name in AMOUNTS if (own := lines_of(measured, name))}
    if not lines:
        return ""
    figure = new_figure(4.6 * len(lines), 3.8)
    axes = figure.subplots(1, len(lines), squeeze=False, sharey=True)[0]
    for ax, (name, own) in zip(axes, lines.items(), strict=True):
        _draw(ax, own)
        finish_axes(ax, AMOUNTS[name], "" if ax is not axes[0] else "held-out accuracy")
    axes[0].set_ylim(bottom=0)
    figure.savefig(path, dpi=DPI)
    return (
        "Held-out accuracy by amount: mean and the range from the lowest to the highest seed; configurations on a line "
        "differ in this alone."
    )


def lines_of(groups: Sequence[Group], name: str) -> list[Line]:
    """Join the configurations that differ in one amount alone, where there are two values of it or more."""
    joined: dict[Any, dict[int, Group]] = {}
    for group in groups:
        params = group.trials[0].params
        others = _without(params, (*DRAWN, name))
        joined.setdefault((group.size, others), {})[_amount(params, name)] = group
    lines = []
    for points in joined.values():
        if len(points) > 1:
            ordered = sorted(points.items(), key=lambda point: (point[0] == ALL, point[0]))
            lines.append(Line(ordered[-1][1].label, tuple(ordered)))
    return lines


def _without(params: Mapping[str, str], names: Sequence[str]) -> frozenset[tuple[str, str]]:
    """Return parameters but for some; an amount that a run was recorded without is all there is."""
    whole = {**dict.fromkeys(AMOUNTS, str(ALL)), **params}
    return frozenset((key, value) for key, value in whole.items() if key not in names)


def _amount(params: Mapping[str, str], name: str) -> int:
    value = params.get(name, "")
    return int(value) if value.isdecimal() else ALL


def _draw(ax: Axes, lines: Sequence[Line]) -> None:
    """Draw lines over the values of all of them, which stand at equal distances."""
    amounts = {amount for line in lines for amount, _ in line.points}
    values = sorted(amounts, key=lambda amount: (amount == ALL, amount))
    for place, line in enumerate(lines):
        turn, hue = divmod(place, len(COLOURS))
        x = [values.index(amount) for amount, _ in line.points]
        seeds = [list(group.by_seed(MAIN).values()) for _, group in line.points]
        means = [sum(own) / len(own) for own in seeds]
        ends = [
            [mean - min(own) for mean, own in zip(means, seeds, strict=True)],
            [max(own) - mean for mean, own in zip(means, seeds, strict=True)],
        ]
        how: dict[str, Any] = {"color": COLOURS[hue], "linestyle": STROKES[turn % len(STROKES)]}
        ax.errorbar(x, means, yerr=ends, marker="o", capsize=3, label=line.label, **how)
    ax.set_xticks(range(len(values)), [str(amount) if amount else "all" for amount in values])
    if len(lines) > 1:
        ax.legend(frameon=False, fontsize=8)
