"""Draw the pictures of a report: learning curves, outcomes, the grid of λ, signs of memorisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from tuning.report.groups import CHOOSING, Baselines, Group, is_of_size
from tuning.report.seconds import seconds_per_step
from tuning.report.style import (
    COLOURS,
    DPI,
    finish_axes,
    label_rows,
    legend_beside,
    literal_text,
    new_figure,
    styles_of,
)

BASELINE_STROKES = (
    (0, ()),
    (0, (6, 2)),
    (0, (1, 1.5)),
    (0, (6, 2, 1, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (10, 4)),
)
CURVES = {
    "loss/total": "training loss (weighted sum)",
    "val/accuracy": "validation accuracy (exact match)",
}
OUTCOMES = {"accuracy": "held-out accuracy (exact match)", "delta_cosine": "held-out delta cosine"}
MEMORISATION = {
    "accuracy: training, held out": {"training": "train/accuracy", "held out": "heldout/accuracy"},
    "held-out accuracy by prompts": {
        "own": "heldout/accuracy",
        "another task's": "heldout/accuracy_shuffled_prompts",
        "nonsense": "heldout/accuracy_nonsense_prompts",
    },
    "nearest teacher's distance": {"distance": "heldout/nearest_teacher_distance"},
    "diversity": {"diversity": "heldout/diversity"},
}
MARKERS = ("o", "D", "x")
POINTS_PER_CURVE = 120
MARKED_POINTS = 20  # a curve of up to so many points shows each
ROW_HEIGHT = 0.32  # inches of a configuration in a chart of rows


@literal_text
def plot_curves(path: Path, groups: Sequence[Group]) -> str:
    """Draw loss and validation accuracy over steps, the latter over seconds too.

    Return the caption, "" if no trial has such a curve.
    """
    present = [key for key in CURVES if any(group.curves(key) for group in groups)]
    if not present:
        return ""
    timed = [group for group in groups if group.curves(CHOOSING) and seconds_per_step(group)]
    panels = len(present) + bool(timed)
    figure = new_figure(5.2 * panels + 2.2, 3.8)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    styles = styles_of(groups)
    for ax, key in zip(axes[: len(present)], present, strict=True):
        for group in groups:
            _draw_curve(ax, key, group, *styles[group.label])
        finish_axes(ax, "training step", CURVES[key])
    for group in timed:
        _draw_curve(axes[-1], CHOOSING, group, *styles[group.label], seconds_per_step(group) or 1.0)
    if timed:
        finish_axes(axes[-1], "seconds of training", CURVES[CHOOSING])
    if "loss/total" in present:
        _scale_loss(axes[0])
    for ax in axes[1:] if "loss/total" in present else axes:
        ax.set_ylim(bottom=0)
    legend_beside(figure, axes)
    figure.savefig(path, dpi=DPI)
    return (
        "Learning curves: mean over seeds and the range from the lowest to the highest seed, as far as every seed ran. "
        "Losses of different λ are different sums: compare their shapes, not their heights. "
        "Seconds are steps times the mean seconds of a step, evaluations included."
    )


def _scale_loss(ax: Axes) -> None:
    """Use a log scale for losses, all of which are above 0."""
    if ax.dataLim.y0 > 0:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())


def _draw_curve(
    ax: Axes, key: str, group: Group, colour: str, stroke: str, scale: float = 1.0
) -> None:
    """Draw mean and range over the steps that every trial of a group has, times `scale`."""
    curves = group.curves(key)
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    if not steps:
        return
    rows = [[curve[step] for step in steps] for curve in curves]
    x_N, values_SN = _thinned(scale * np.array(steps, dtype=float), np.array(rows))
    line: dict[str, Any] = {"color": colour, "linewidth": 1.6, "label": group.label}
    if len(x_N) <= MARKED_POINTS:
        line |= {"marker": "o", "markersize": 3.5}
    ax.plot(x_N, values_SN.mean(0), stroke, **line)
    if len(curves) > 1:
        band: dict[str, Any] = {"color": colour, "alpha": 0.15, "linewidth": 0}
        ax.fill_between(x_N, values_SN.min(0), values_SN.max(0), **band)


def _thinned(steps_N: np.ndarray, values_SN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average neighbouring points, down to `POINTS_PER_CURVE`."""
    pieces = np.array_split(np.arange(len(steps_N)), min(POINTS_PER_CURVE, len(steps_N)))
    x_N = np.array([steps_N[piece].mean() for piece in pieces])
    return x_N, np.stack([values_SN[:, piece].mean(1) for piece in pieces], axis=1)


@literal_text
def plot_outcomes(path: Path, groups: Sequence[Group], baselines: Baselines) -> str:
    """Draw each seed's held-out accuracy and delta cosine, a row per configuration, with the baselines as lines.

    Return the caption, "" if nothing was measured.
    """
    sizes = list(dict.fromkeys(group.size for group in groups))
    present = [key for key in OUTCOMES if any(group.cell(f"heldout/{key}") for group in groups)]
    if not present:
        return ""
    by_size = {size: [group for group in groups if group.size == size] for size in sizes}
    heights = [1.6 + ROW_HEIGHT * len(own) for own in by_size.values()]
    figure = new_figure(6.6 * len(present) + 1.5, sum(heights))
    grid = figure.subplots(len(sizes), len(present), squeeze=False, height_ratios=heights)
    styles = styles_of(groups)
    for row, (size, own) in zip(grid, by_size.items(), strict=True):
        for ax, key in zip(row, present, strict=True):
            _draw_outcome(ax, f"heldout/{key}", own, styles)
            _draw_baselines(ax, key, size, baselines)
            finish_axes(ax, OUTCOMES[key], "", grid="x")
            label_rows(ax, [group.config for group in own])
            if len(sizes) > 1:
                ax.set_title(size, fontsize=10)
    figure.savefig(path, dpi=DPI)
    return "Held-out results: one dot per seed, a bar at their mean; lines are baselines, the value in brackets."


def _draw_outcome(
    ax: Axes, metric: str, groups: Sequence[Group], styles: Mapping[str, tuple[str, str]]
) -> None:
    for row, group in enumerate(groups):
        values = list(group.by_seed(metric).values())
        if not values:
            continue
        colour, _ = styles[group.label]
        shifts = np.linspace(-0.16, 0.16, len(values) + 2)[1:-1]
        ax.plot(values, row + shifts, "o", color=colour, markeredgecolor="white", zorder=3)
        ends = (row - 0.3, row + 0.3)
        ax.vlines(float(np.mean(values)), *ends, color=colour, linewidth=2.5, zorder=2)


def _draw_baselines(ax: Axes, key: str, size: str, baselines: Baselines) -> None:
    values = {name: found[key] for name, found in baselines.items() if key in found}
    mine = [name for name in values if is_of_size(name, size) and np.isfinite(values[name])]
    for place, name in enumerate(sorted(mine, key=lambda name: -values[name])):
        stroke = BASELINE_STROKES[place % len(BASELINE_STROKES)]
        label = f"{name.removesuffix(f' ({size})')} [{values[name]:.2f}]"
        line: dict[str, Any] = {
            "color": "#555555",
            "linestyle": stroke,
            "linewidth": 1.1,
            "zorder": 1,
        }
        ax.axvline(values[name], label=label, **line)
    if mine:
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)


@literal_text
def plot_heat_map(path: Path, groups: Sequence[Group]) -> str:
    """Draw held-out accuracy and delta cosine over λ_w and λ_d, a row per model size; "" if the λ form no grid."""
    sizes = dict.fromkeys(group.size for group in groups)
    grids = {size: grid for size in sizes if (grid := Grid.of(groups, size))}
    if not grids:
        return ""
    widest = max(len(grid.deltas) for grid in grids.values())
    figure = new_figure(2 * (1.1 * widest + 2.6), 4.0 * len(grids))
    rows = figure.subplots(len(grids), len(OUTCOMES), squeeze=False)
    for row, (size, grid) in zip(rows, grids.items(), strict=True):
        for ax, (key, label) in zip(row, OUTCOMES.items(), strict=True):
            _draw_grid(figure, ax, f"heldout/{key}", grid)
            ax.set_title(", ".join([label, size][: len(grids)]), fontsize=10)
    figure.savefig(path, dpi=DPI)
    return "Held-out results over λ_w and λ_d, mean over seeds; several configurations of one pair are averaged."


@dataclass(frozen=True)
class Grid:
    """Values of λ_w and λ_d in ascending order, and the configurations at each pair."""

    weights: list[float]
    deltas: list[float]
    cells: Mapping[tuple[float, float], list[Group]]

    @classmethod
    def of(cls, groups: Sequence[Group], size: str) -> Grid | None:
        """Arrange the configurations of a size; None below 2 × 2 or with half of the pairs missing."""
        cells: dict[tuple[float, float], list[Group]] = {}
        for group in groups:
            pair = group.lambdas
            if group.size == size and pair is not None:
                cells.setdefault(pair, []).append(group)
        weights = sorted({weight for weight, _ in cells})
        deltas = sorted({delta for _, delta in cells})
        wide = len(weights) > 1 and len(deltas) > 1 and len(cells) > 3
        if not wide or 2 * len(cells) <= len(weights) * len(deltas):
            return None
        return cls(weights, deltas, cells)

    def values(self, metric: str) -> np.ndarray:
        """Return the mean of a metric at every pair, [λ_w, λ_d]; NaN where there is none."""
        values_WD = np.full((len(self.weights), len(self.deltas)), np.nan)
        for (weight, delta), groups in self.cells.items():
            means = [cell.mean for group in groups if (cell := group.cell(metric))]
            if means:
                place = self.weights.index(weight), self.deltas.index(delta)
                values_WD[place] = np.mean(means)
        return values_WD


def _draw_grid(figure: Figure, ax: Axes, metric: str, grid: Grid) -> None:
    values_WD = np.ma.masked_invalid(grid.values(metric))
    image = ax.imshow(values_WD, cmap="cividis", aspect="auto", origin="lower")
    for (row, column), text, colour in _labels(values_WD):
        ax.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    ax.set_xticks(range(len(grid.deltas)), [f"{value:g}" for value in grid.deltas])
    ax.set_yticks(range(len(grid.weights)), [f"{value:g}" for value in grid.weights])
    ax.set_xlabel("λ_d, weight of the delta loss")
    ax.set_ylabel("λ_w, weight of the weight loss")
    figure.colorbar(image, ax=ax)


def _labels(values_WD: np.ma.MaskedArray) -> Iterator[tuple[tuple[int, ...], str, str]]:
    """Yield place, text and a colour that can be read on the cell's own."""
    middle = np.ma.mean([values_WD.min(), values_WD.max()])
    for place in np.ndindex(values_WD.shape):
        value = values_WD[place]
        if value is np.ma.masked:
            yield place, "–", "black"
        elif value > middle:
            yield place, f"{value:.2f}", "black"
        else:
            yield place, f"{value:.2f}", "white"


@literal_text
def plot_memorisation(path: Path, groups: Sequence[Group]) -> str:
    """Draw what tells a generator that learned from one that memorised, a panel each; "" if nothing was measured."""
    present = {title: keys for title, keys in MEMORISATION.items() if _is_measured(groups, keys)}
    if not present:
        return ""
    figure = new_figure(3.4 * len(present) + 1, 2.4 + ROW_HEIGHT * len(groups))
    axes = figure.subplots(1, len(present), squeeze=False, sharey=True)[0]
    for ax, (title, keys) in zip(axes, present.items(), strict=True):
        for place, (label, key) in enumerate(keys.items()):
            _draw_dots(ax, groups, key, label, COLOURS[place], MARKERS[place])
        finish_axes(ax, "", "", grid="x")
        ax.set_title(title, fontsize=10)
        ax.set_xlim(left=min(0.0, ax.get_xlim()[0]))
        if len(keys) > 1:
            below: dict[str, Any] = {
                "loc": "upper center",
                "bbox_to_anchor": (0.5, -0.12),
                "ncols": len(keys),
            }
            ax.legend(frameon=False, fontsize=8, **below)
    label_rows(axes[0], [group.label for group in groups])
    figure.savefig(path, dpi=DPI)
    return (
        "Memorisation: accuracy on training beside held-out tasks; held-out accuracy with the task's own prompts, "
        "those of another task and nonsense; distance to the nearest training teacher (0 = a copy); diversity of the "
        "adapters (0 = one for all). A mark is the mean over seeds."
    )


def _is_measured(groups: Sequence[Group], keys: Mapping[str, str]) -> bool:
    return any(group.cell(key) for key in keys.values() for group in groups)


def _draw_dots(
    ax: Axes, groups: Sequence[Group], key: str, label: str, colour: str, marker: str
) -> None:
    points = [(cell.mean, row) for row, group in enumerate(groups) if (cell := group.cell(key))]
    if points:
        mark: dict[str, Any] = {"color": colour, "markersize": 7, "alpha": 0.9, "zorder": 3}
        ax.plot(*zip(*points, strict=True), marker, label=label, **mark)
