"""The report's pictures. Figures are objects, drawn without a display and without matplotlib's global state.

Colours are those of Okabe and Ito (2008) for configurations and of Krzywinski's 12-colour palette for task families,
both chosen to be told apart by colour-blind readers; no picture relies on colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from tuning.analysis import Group

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")
FAMILY_COLOURS = (
    "#9F0162", "#009F81", "#FF5AAF", "#5A6300", "#8400CD", "#008DF9",
    "#00C2F9", "#B277C9", "#A40122", "#E20134", "#FF6E3A", "#C98A00",
)  # fmt: skip
STROKES = ("-", "--", ":", "-.")
BASELINE_STROKES = ((0, ()), (0, (6, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (10, 4)))
CURVES = {"loss/total": "training loss (weighted sum)", "val/accuracy": "validation accuracy (exact match)"}
OUTCOMES = {"accuracy": "held-out accuracy (exact match)", "delta_cosine": "held-out delta cosine"}
POINTS_PER_CURVE = 120


@dataclass(frozen=True)
class DeltaMap:
    """Deltas of the same tasks, T rows each: of the teachers and of one configuration's generated adapters.

    A task is named "operation/format". Raises ValueError if the shapes do not agree.
    """

    teacher_TD: np.ndarray
    generated_TD: np.ndarray
    tasks: tuple[str, ...]
    config: str

    def __post_init__(self) -> None:
        shapes = (self.teacher_TD.shape, self.generated_TD.shape)
        if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != len(self.tasks):
            raise ValueError(
                f"a delta map needs two arrays [T, D] and T names: got teacher {shapes[0]}, generated {shapes[1]} "
                f"and {len(self.tasks)} names"
            )

    @property
    def families(self) -> tuple[str, ...]:
        """The operation of each task."""
        return tuple(task.partition("/")[0] for task in self.tasks)


def plot_curves(path: Path, groups: Sequence[Group]) -> str:
    """Draw loss and validation accuracy over steps; return the caption, or "" if no trial has such a curve."""
    present = [key for key in CURVES if any(trial.curves.get(key) for group in groups for trial in group.trials)]
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
    figure.savefig(path, dpi=150)
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
    ax.plot(x_N, mean_N, stroke, color=colour, label=group.label, marker=marker, markersize=3.5, linewidth=1.6)
    if len(curves) > 1:
        ax.fill_between(x_N, values_SN.min(0), values_SN.max(0), color=colour, alpha=0.15, linewidth=0)


def _thinned(steps_N: np.ndarray, values_SN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pieces = np.array_split(np.arange(len(steps_N)), min(POINTS_PER_CURVE, len(steps_N)))
    return (
        np.array([steps_N[piece].mean() for piece in pieces]),
        np.stack([values_SN[:, piece].mean(1) for piece in pieces], axis=1),
    )


def plot_outcomes(path: Path, groups: Sequence[Group], baselines: Mapping[str, Mapping[str, float]]) -> str:
    """Draw every seed's held-out accuracy and delta cosine beside the baselines; return the caption, or ""."""
    sizes = list(dict.fromkeys(group.size for group in groups))
    present = [key for key in OUTCOMES if any(group.cell(f"heldout/{key}") for group in groups)]
    if not present:
        return ""
    width = 2.2 + 0.75 * max(sum(group.size == size for group in groups) for size in sizes) + 2.4
    figure = Figure(figsize=(width * len(present), 4.2 * len(sizes)), layout="constrained")
    grid = figure.subplots(len(sizes), len(present), squeeze=False)
    styles = _styles(groups)
    for row, size in zip(grid, sizes, strict=True):
        for ax, key in zip(row, present, strict=True):
            _draw_outcome(ax, key, [group for group in groups if group.size == size], styles)
            _draw_baselines(ax, key, size, baselines)
            _finish_axis(ax, "", OUTCOMES[key])
            ax.set_title(size if len(sizes) > 1 else "", fontsize=10)
    figure.savefig(path, dpi=150)
    return "Held-out results: one dot per seed, a bar at their mean; lines are baselines, the value in brackets."


def _draw_outcome(ax: Axes, key: str, groups: Sequence[Group], styles: Mapping[str, tuple[str, str]]) -> None:
    for place, group in enumerate(groups):
        values = list(group.by_seed(f"heldout/{key}").values())
        if values:
            shifts = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else np.zeros(1)
            colour = styles[group.label][0]
            ax.plot(place + shifts, values, "o", color=colour, markersize=6, markeredgecolor="white", zorder=3)
            ax.hlines(float(np.mean(values)), place - 0.3, place + 0.3, color=colour, linewidth=2.5, zorder=2)
    names = [group.config for group in groups]
    tilt = 30 if max(map(len, names), default=0) * len(names) > 45 else 0
    ax.set_xticks(range(len(names)), names, rotation=tilt, ha="right" if tilt else "center")
    ax.set_xlim(-0.6, len(names) - 0.4)


def _draw_baselines(ax: Axes, key: str, size: str, baselines: Mapping[str, Mapping[str, float]]) -> None:
    mine = [name for name in baselines if name.endswith(f"({size})") or not name.endswith(")")]
    lines = []
    for place, name in enumerate(sorted(mine, key=lambda name: -baselines[name].get(key, -np.inf))):
        value = baselines[name].get(key)
        if value is not None and np.isfinite(value):
            stroke = BASELINE_STROKES[place % len(BASELINE_STROKES)]
            label = f"{name.removesuffix(f' ({size})')} [{value:.2f}]"
            lines.append(ax.axhline(value, color="#555555", linestyle=stroke, linewidth=1.1, zorder=1, label=label))
    if lines:
        ax.legend(handles=lines, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)


def plot_delta_map(path: Path, deltas: DeltaMap) -> str:
    """Draw teacher and generated deltas in their two main directions; return the caption, or "" for under 3 tasks."""
    if len(deltas.tasks) < 3:
        return ""
    from sklearn.decomposition import PCA

    pca = PCA(n_components=2, svd_solver="full")
    both_ND = np.concatenate([deltas.teacher_TD, deltas.generated_TD]).astype(np.float64)
    teacher_T2, generated_T2 = np.split(pca.fit_transform(both_ND), 2)
    figure = Figure(figsize=(8.2, 5.6), layout="constrained")
    ax = figure.subplots()
    families = list(dict.fromkeys(deltas.families))
    for place, family in enumerate(families):
        rows = [row for row, name in enumerate(deltas.families) if name == family]
        colour = FAMILY_COLOURS[place % len(FAMILY_COLOURS)]
        _draw_family(ax, teacher_T2[rows], generated_T2[rows], colour)
        ax.annotate(family, teacher_T2[rows[0]], (6, 6), textcoords="offset points", fontsize=8, color=colour)
    shares = pca.explained_variance_ratio_ * 100
    _finish_axis(ax, *(f"direction {i + 1} ({share:.0f} % of the variance)" for i, share in enumerate(shares)))
    _family_legend(figure, families)
    ax.margins(0.08)
    figure.savefig(path, dpi=150)
    return (
        f"Deltas of held-out tasks ({deltas.config}), PCA of teachers and generated together: a circle is a teacher, a "
        "cross its generated adapter, the line between them is what was missed; colour is the operation."
    )


def _draw_family(ax: Axes, teacher_T2: np.ndarray, generated_T2: np.ndarray, colour: str) -> None:
    for start, end in zip(teacher_T2, generated_T2, strict=True):
        ax.plot(*zip(start, end, strict=True), color=colour, linewidth=0.8, alpha=0.5, zorder=1)
    ax.plot(*teacher_T2.T, "o", color=colour, fillstyle="none", markersize=7, markeredgewidth=1.6, zorder=2)
    ax.plot(*generated_T2.T, "x", color=colour, markersize=6, markeredgewidth=1.6, zorder=3)


def _family_legend(figure: Figure, families: Sequence[str]) -> None:
    shapes = [
        Line2D([], [], color="black", marker="o", fillstyle="none", linestyle="", label="teacher"),
        Line2D([], [], color="black", marker="x", linestyle="", label="generated"),
    ]
    colours = [
        Line2D([], [], color=FAMILY_COLOURS[place % len(FAMILY_COLOURS)], linewidth=4, label=family)
        for place, family in enumerate(families)
    ]
    figure.legend(handles=[*shapes, *colours], loc="outside right center", frameon=False, fontsize=9)


def _styles(groups: Sequence[Group]) -> dict[str, tuple[str, str]]:
    configs = list(dict.fromkeys(group.config for group in groups))
    sizes = list(dict.fromkeys(group.size for group in groups))
    return {
        group.label: (
            COLOURS[configs.index(group.config) % len(COLOURS)],
            STROKES[(sizes.index(group.size) + configs.index(group.config) // len(COLOURS)) % len(STROKES)],
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
    labelled = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(list(labelled.values()), list(labelled), loc="outside right center", frameon=False, fontsize=9)
