"""Draw delta activations of teachers and of generated adapters in their two main directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tuning.report.style import DPI, FAMILY_COLOURS, finish_axes, literal_text, new_figure

FEWEST_TASKS = 3


@dataclass(frozen=True)
class DeltaMap:
    """Deltas [J, D] of T tasks: of the teachers, and of the adapters that one configuration generated.

    A task is named "operation/format". Raises ValueError if the shapes do not agree.
    """

    teacher_JD: np.ndarray
    generated_JD: np.ndarray
    tasks: tuple[str, ...]
    config: str
    size: str = ""

    def __post_init__(self) -> None:
        shapes = (self.teacher_JD.shape, self.generated_JD.shape)
        if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != len(self.tasks):
            raise ValueError(
                f"a delta map needs two arrays [J, D] and J names: got teacher {shapes[0]}, generated {shapes[1]} "
                f"and {len(self.tasks)} names"
            )

    @property
    def families(self) -> tuple[str, ...]:
        """Return the operation of each task."""
        return tuple(task.partition("/")[0] for task in self.tasks)


@literal_text
def plot_delta_map(path: Path, deltas: Sequence[DeltaMap]) -> str:
    """Draw the maps of one model size, a panel per configuration, in the same two principal directions.

    Return the caption, "" below three tasks. Raises ValueError if the maps differ in width.
    """
    drawn = [one for one in deltas if len(one.tasks) >= FEWEST_TASKS]
    if not drawn:
        return ""
    places, shares = _two_directions(drawn)
    families = list(dict.fromkeys(chain.from_iterable(one.families for one in drawn)))
    columns = min(2, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = new_figure(5.4 * columns + 2, 4.6 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    labels = [
        f"direction {i + 1} ({share:.0f} % of the variance)" for i, share in enumerate(shares)
    ]
    for ax, one, (teacher_J2, generated_J2) in zip(axes, drawn, places, strict=False):
        _draw_families(ax, one, teacher_J2, generated_J2, families)
        finish_axes(ax, labels[0], labels[1])
        ax.set_title(one.config, fontsize=10)
        ax.margins(0.08)
    for ax in axes[len(drawn) :]:
        ax.set_axis_off()
    _family_legend(figure, families)
    figure.savefig(path, dpi=DPI)
    return (
        "Deltas of held-out tasks, PCA of teachers and generated together, one trial each: a circle is a teacher, a "
        "cross its generated adapter, the line between them is what was missed; colour is the operation."
    )


def _two_directions(
    deltas: Sequence[DeltaMap],
) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Return both deltas of every map in the first two principal directions, and their shares of variance in %."""
    from sklearn.decomposition import PCA

    parts = chain.from_iterable((one.teacher_JD, one.generated_JD) for one in deltas)
    pca = PCA(n_components=2, svd_solver="full")
    pca.fit(np.concatenate(list(parts)).astype(np.float64))
    placed = [(pca.transform(one.teacher_JD), pca.transform(one.generated_JD)) for one in deltas]
    return placed, pca.explained_variance_ratio_ * 100


def _draw_families(
    ax: Axes,
    one: DeltaMap,
    teacher_J2: np.ndarray,
    generated_J2: np.ndarray,
    families: Sequence[str],
) -> None:
    for place, family in enumerate(families):
        own = [row for row, name in enumerate(one.families) if name == family]
        if own:
            _draw_family(ax, teacher_J2[own], generated_J2[own], family_colour(place), family)


def family_colour(place: int) -> str:
    """Return the colour of the family at a place; the palette is repeated."""
    return FAMILY_COLOURS[place % len(FAMILY_COLOURS)]


def _draw_family(
    ax: Axes, teacher_J2: np.ndarray, generated_J2: np.ndarray, colour: str, family: str
) -> None:
    for start, end in zip(teacher_J2, generated_J2, strict=True):
        ax.plot(*zip(start, end, strict=True), color=colour, linewidth=0.8, alpha=0.5, zorder=1)
    circle: dict[str, Any] = {
        "fillstyle": "none",
        "markersize": 7,
        "markeredgewidth": 1.6,
        "zorder": 2,
    }
    ax.plot(*teacher_J2.T, "o", color=colour, **circle)
    ax.plot(*generated_J2.T, "x", color=colour, markersize=6, markeredgewidth=1.6, zorder=3)
    offset: dict[str, Any] = {"xytext": (6, 6), "textcoords": "offset points"}
    ax.annotate(family, teacher_J2[0], **offset, fontsize=8, color=colour)


def _family_legend(figure: Figure, families: Sequence[str]) -> None:
    black: dict[str, Any] = {"color": "black", "linestyle": ""}
    shapes = [
        Line2D([], [], marker="o", fillstyle="none", label="teacher", **black),
        Line2D([], [], marker="x", label="generated", **black),
    ]
    colours = [
        Line2D([], [], color=family_colour(place), linewidth=4, label=family)
        for place, family in enumerate(families)
    ]
    figure.legend(
        handles=[*shapes, *colours], loc="outside right center", frameon=False, fontsize=9
    )
