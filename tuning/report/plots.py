"""The report's pictures. Figures are objects, drawn without a display and without matplotlib's global state.

Colours are those of Okabe and Ito (2008) for configurations and of Krzywinski's 12-colour palette for task families,
both chosen to be told apart by colour-blind readers; no picture relies on colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from tuning.report.groups import Group

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")
FAMILY_COLOURS = (
    "#9F0162", "#009F81", "#FF5AAF", "#5A6300", "#8400CD", "#008DF9",
    "#00C2F9", "#B277C9", "#A40122", "#E20134", "#FF6E3A", "#C98A00",
)  # fmt: skip
STROKES = ("-", "--", ":", "-.")
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
DPI = 120
WIDEST = 15.0  # inches of a figure, before panels go below one another


@dataclass(frozen=True)
class DeltaMap:
    """Deltas of the same tasks, T rows each: of the teachers and of one configuration's generated adapters.

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
        """The operation of each task."""
        return tuple(task.partition("/")[0] for task in self.tasks)


def plot_curves(path: Path, groups: Sequence[Group]) -> str:
    """Draw loss and validation accuracy over steps; return the caption, or "" if no trial has such a curve."""
    present = [
        key
        for key in CURVES
        if any(trial.curves.get(key) for group in groups for trial in group.trials)
    ]
    if not present:
        return ""
    figure = Figure(figsize=(5.2 * len(present) + 2.2, 3.8), layout="constrained")
    axes = figure.subplots(1, len(present), squeeze=False)[0]
    styles = _styles(groups)
    for ax, key in zip(axes, present, strict=True):
        for group in groups:
            _draw_curve(ax, key, group, *styles[group.label])
        _finish_axis(ax, "training step", CURVES[key])
    if "loss/total" in present and axes[0].dataLim.y0 > 0:
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[0].yaxis.set_major_formatter("{x:g}")
        axes[0].yaxis.set_minor_formatter(NullFormatter())
    if "val/accuracy" in present:
        axes[-1].set_ylim(bottom=0)
    _legend(figure, axes)
    figure.savefig(path, dpi=DPI)
    return (
        "Learning curves: mean over seeds and the range from the lowest to the highest seed, as far as every seed ran. "
        "Losses of different λ are different sums: compare their shapes, not their heights."
    )


def _draw_curve(ax: Axes, key: str, group: Group, colour: str, stroke: str) -> None:
    curves = [dict(trial.curves[key]) for trial in group.trials if trial.curves.get(key)]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    if not steps:
        return
    values_SN = np.array([[curve[step] for step in steps] for curve in curves])
    x_N, values_SN = _thinned(np.array(steps, dtype=float), values_SN)
    marker = "o" if len(x_N) <= 20 else None
    mean_N = values_SN.mean(0)
    ax.plot(
        x_N,
        mean_N,
        stroke,
        color=colour,
        label=group.label,
        marker=marker,
        markersize=3.5,
        linewidth=1.6,
    )
    if len(curves) > 1:
        ax.fill_between(
            x_N, values_SN.min(0), values_SN.max(0), color=colour, alpha=0.15, linewidth=0
        )


def _thinned(steps_N: np.ndarray, values_SN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pieces = np.array_split(np.arange(len(steps_N)), min(POINTS_PER_CURVE, len(steps_N)))
    return (
        np.array([steps_N[piece].mean() for piece in pieces]),
        np.stack([values_SN[:, piece].mean(1) for piece in pieces], axis=1),
    )


def plot_outcomes(
    path: Path, groups: Sequence[Group], baselines: Mapping[str, Mapping[str, float]]
) -> str:
    """Draw every seed's held-out accuracy and delta cosine beside the baselines; return the caption, or ""."""
    sizes = list(dict.fromkeys(group.size for group in groups))
    present = [key for key in OUTCOMES if any(group.cell(f"heldout/{key}") for group in groups)]
    if not present:
        return ""
    width = 2.2 + 0.75 * max(sum(group.size == size for group in groups) for size in sizes) + 2.4
    columns = len(present) if width * len(present) <= WIDEST else 1
    rows = len(sizes) * len(present) // columns
    figure = Figure(figsize=(width * columns, 4.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).reshape(len(sizes), len(present))
    styles = _styles(groups)
    for row, size in zip(grid, sizes, strict=True):
        for ax, key in zip(row, present, strict=True):
            _draw_outcome(ax, key, [group for group in groups if group.size == size], styles)
            _draw_baselines(ax, key, size, baselines)
            _finish_axis(ax, "", OUTCOMES[key])
            ax.set_title(size if len(sizes) > 1 else "", fontsize=10)
    figure.savefig(path, dpi=DPI)
    return "Held-out results: one dot per seed, a bar at their mean; lines are baselines, the value in brackets."


def _draw_outcome(
    ax: Axes, key: str, groups: Sequence[Group], styles: Mapping[str, tuple[str, str]]
) -> None:
    for place, group in enumerate(groups):
        values = list(group.by_seed(f"heldout/{key}").values())
        if values:
            shifts = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else np.zeros(1)
            colour = styles[group.label][0]
            ax.plot(
                place + shifts,
                values,
                "o",
                color=colour,
                markersize=6,
                markeredgecolor="white",
                zorder=3,
            )
            ax.hlines(
                float(np.mean(values)),
                place - 0.3,
                place + 0.3,
                color=colour,
                linewidth=2.5,
                zorder=2,
            )
    names = [group.config for group in groups]
    tilt = 30 if max(map(len, names), default=0) * len(names) > 45 else 0
    ax.set_xticks(range(len(names)), names, rotation=tilt, ha="right" if tilt else "center")
    ax.set_xlim(-0.6, len(names) - 0.4)


def _draw_baselines(
    ax: Axes, key: str, size: str, baselines: Mapping[str, Mapping[str, float]]
) -> None:
    mine = [name for name in baselines if name.endswith(f"({size})") or not name.endswith(")")]
    lines = []
    for place, name in enumerate(sorted(mine, key=lambda name: -baselines[name].get(key, -np.inf))):
        value = baselines[name].get(key)
        if value is not None and np.isfinite(value):
            stroke = BASELINE_STROKES[place % len(BASELINE_STROKES)]
            label = f"{name.removesuffix(f' ({size})')} [{value:.2f}]"
            lines.append(
                ax.axhline(
                    value, color="#555555", linestyle=stroke, linewidth=1.1, zorder=1, label=label
                )
            )
    if lines:
        ax.legend(
            handles=lines, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8
        )


def plot_delta_map(path: Path, deltas: Sequence[DeltaMap]) -> str:
    """Draw teacher and generated deltas of one model size, a panel per configuration, in the same two main directions.

    Return the caption, or "" for under 3 tasks. Raises ValueError if the maps are of different widths.
    """
    drawn = [one for one in deltas if len(one.tasks) >= 3]
    if not drawn:
        return ""
    places, shares = _two_directions(drawn)
    families = list(dict.fromkeys(family for one in drawn for family in one.families))
    columns = min(2, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(5.4 * columns + 2, 4.6 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for ax, one, (teacher_T2, generated_T2) in zip(axes, drawn, places, strict=False):
        for place, family in enumerate(families):
            own = [row for row, name in enumerate(one.families) if name == family]
            _draw_family(
                ax,
                teacher_T2[own],
                generated_T2[own],
                FAMILY_COLOURS[place % len(FAMILY_COLOURS)],
                family,
            )
        _finish_axis(
            ax,
            *(
                f"direction {i + 1} ({share:.0f} % of the variance)"
                for i, share in enumerate(shares)
            ),
        )
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
    from sklearn.decomposition import PCA

    pca = PCA(n_components=2, svd_solver="full")
    pca.fit(
        np.concatenate(
            [part for one in deltas for part in (one.teacher_JD, one.generated_JD)]
        ).astype(np.float64)
    )
    placed = [(pca.transform(one.teacher_JD), pca.transform(one.generated_JD)) for one in deltas]
    return placed, pca.explained_variance_ratio_ * 100


def _draw_family(
    ax: Axes, teacher_T2: np.ndarray, generated_T2: np.ndarray, colour: str, family: str
) -> None:
    if not len(teacher_T2):
        return
    for start, end in zip(teacher_T2, generated_T2, strict=True):
        ax.plot(*zip(start, end, strict=True), color=colour, linewidth=0.8, alpha=0.5, zorder=1)
    ax.plot(
        *teacher_T2.T,
        "o",
        color=colour,
        fillstyle="none",
        markersize=7,
        markeredgewidth=1.6,
        zorder=2,
    )
    ax.plot(*generated_T2.T, "x", color=colour, markersize=6, markeredgewidth=1.6, zorder=3)
    ax.annotate(family, teacher_T2[0], (6, 6), textcoords="offset points", fontsize=8, color=colour)


def _family_legend(figure: Figure, families: Sequence[str]) -> None:
    shapes = [
        Line2D([], [], color="black", marker="o", fillstyle="none", linestyle="", label="teacher"),
        Line2D([], [], color="black", marker="x", linestyle="", label="generated"),
    ]
    colours = [
        Line2D([], [], color=FAMILY_COLOURS[place % len(FAMILY_COLOURS)], linewidth=4, label=family)
        for place, family in enumerate(families)
    ]
    figure.legend(
        handles=[*shapes, *colours], loc="outside right center", frameon=False, fontsize=9
    )


def plot_heat_map(path: Path, groups: Sequence[Group]) -> str:
    """Draw held-out accuracy and delta cosine over λ_w and λ_d, a row per model size; "" where the λ make no grid."""
    sizes = dict.fromkeys(group.size for group in groups)
    grids = {size: grid for size in sizes if (grid := _grid(groups, size))}
    if not grids:
        return ""
    widest = max(len(grid[1]) for grid in grids.values())
    figure = Figure(figsize=(2 * (1.1 * widest + 2.6), 4.0 * len(grids)), layout="constrained")
    rows = figure.subplots(len(grids), 2, squeeze=False)
    for row, (size, grid) in zip(rows, grids.items(), strict=True):
        for ax, (key, label) in zip(row, OUTCOMES.items(), strict=True):
            _draw_grid(figure, ax, f"heldout/{key}", *grid)
            ax.set_title(f"{label}, {size}" if len(grids) > 1 else label, fontsize=10)
    figure.savefig(path, dpi=DPI)
    return "Held-out results over λ_w and λ_d, mean over seeds; several configurations of one pair are averaged."


Grid = tuple[list[float], list[float], dict[tuple[float, float], list[Group]]]


def _grid(groups: Sequence[Group], size: str) -> Grid | None:
    """λ_w and λ_d in order with the configurations at each pair; None under 2 × 2 or with half the pairs missing."""
    cells: dict[tuple[float, float], list[Group]] = {}
    for group in groups:
        params = group.trials[0].params
        if group.size == size and "lambda_weight" in params and "lambda_delta" in params:
            cells.setdefault(
                (float(params["lambda_weight"]), float(params["lambda_delta"])), []
            ).append(group)
    weights, deltas = (sorted({pair[axis] for pair in cells}) for axis in (0, 1))
    is_grid = (
        len(weights) > 1
        and len(deltas) > 1
        and 2 * len(cells) > len(weights) * len(deltas)
        and len(cells) > 3
    )
    return (weights, deltas, cells) if is_grid else None


def _draw_grid(
    figure: Figure,
    ax: Axes,
    metric: str,
    weights: Sequence[float],
    deltas: Sequence[float],
    cells: Mapping[tuple[float, float], Sequence[Group]],
) -> None:
    values_WD = np.full((len(weights), len(deltas)), np.nan)
    for (weight, delta), groups in cells.items():
        means = [cell.mean for group in groups if (cell := group.cell(metric))]
        values_WD[weights.index(weight), deltas.index(delta)] = np.mean(means) if means else np.nan
    image = ax.imshow(
        np.ma.masked_invalid(values_WD), cmap="cividis", aspect="auto", origin="lower"
    )
    middle = (
        float(np.nanmean([np.nanmin(values_WD), np.nanmax(values_WD)]))
        if np.isfinite(values_WD).any()
        else 0.0
    )
    for row, column in np.ndindex(values_WD.shape):
        value = values_WD[row, column]
        text = f"{value:.2f}" if np.isfinite(value) else "–"
        colour = "black" if not np.isfinite(value) or value > middle else "white"
        ax.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    ax.set_xticks(range(len(deltas)), [f"{value:g}" for value in deltas])
    ax.set_yticks(range(len(weights)), [f"{value:g}" for value in weights])
    ax.set_xlabel("λ_d, weight of the delta loss")
    ax.set_ylabel("λ_w, weight of the weight loss")
    figure.colorbar(image, ax=ax)


def plot_memorisation(path: Path, groups: Sequence[Group]) -> str:
    """Draw what tells a generator that learned from one that memorised, a panel each; "" if nothing was measured."""
    present = {
        title: keys
        for title, keys in MEMORISATION.items()
        if any(group.cell(key) for group in groups for key in keys.values())
    }
    if not present:
        return ""
    figure = Figure(
        figsize=(3.4 * len(present) + 1, 1.2 + 0.45 * len(groups) + 1.2), layout="constrained"
    )
    for ax, (title, keys) in zip(
        figure.subplots(1, len(present), squeeze=False)[0], present.items(), strict=True
    ):
        for place, (label, key) in enumerate(keys.items()):
            _draw_dots(ax, groups, key, label, COLOURS[place], MARKERS[place])
        ax.set_yticks(
            range(len(groups)),
            [group.label for group in groups] if ax.get_subplotspec().colspan.start == 0 else [],
        )
        ax.set_ylim(len(groups) - 0.5, -0.5)
        ax.set_title(title, fontsize=10)
        ax.set_xlim(left=min(0.0, ax.get_xlim()[0]))
        ax.grid(axis="x", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        if len(keys) > 1:
            ax.legend(
                loc="upper center",
                bbox_to_anchor=(0.5, -0.12),
                frameon=False,
                fontsize=8,
                ncols=len(keys),
            )
    figure.savefig(path, dpi=DPI)
    return (
        "Memorisation: accuracy on training beside held-out tasks; held-out accuracy with the task's own prompts, "
        "those of another task and nonsense; distance to the nearest training teacher (0 = a copy); diversity of the "
        "adapters (0 = one for all). A mark is the mean over seeds."
    )


def _draw_dots(
    ax: Axes, groups: Sequence[Group], key: str, label: str, colour: str, marker: str
) -> None:
    points = [(cell.mean, row) for row, group in enumerate(groups) if (cell := group.cell(key))]
    if points:
        ax.plot(
            *zip(*points, strict=True),
            marker,
            color=colour,
            markersize=7,
            label=label,
            alpha=0.9,
            zorder=3,
        )


def _styles(groups: Sequence[Group]) -> dict[str, tuple[str, str]]:
    configs = list(dict.fromkeys(group.config for group in groups))
    sizes = list(dict.fromkeys(group.size for group in groups))
    return {
        group.label: (
            COLOURS[configs.index(group.config) % len(COLOURS)],
            STROKES[
                (sizes.index(group.size) + configs.index(group.config) // len(COLOURS))
                % len(STROKES)
            ],
        )
        for group in groups
    }


def _finish_axis(ax: Axes, x_label: str, y_label: str) -> None:
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    labelled = {
        label: handle
        for ax in axes
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(labelled.values()),
        list(labelled),
        loc="outside right center",
        frameon=False,
        fontsize=9,
    )
