"""Share colours, strokes and axis furniture among the pictures of a report.

Colours are those of Okabe and Ito (2008), chosen to be told apart by colour-blind readers; no picture relies on colour
alone. Figures are objects: no display is needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Literal, TypeVar, cast

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tuning.report.groups import Group

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")
# Krzywinski's 12-colour palette for colour-blind readers.
FAMILY_COLOURS = (
    "#9F0162", "#009F81", "#FF5AAF", "#5A6300", "#8400CD", "#008DF9",
    "#00C2F9", "#B277C9", "#A40122", "#E20134", "#FF6E3A", "#C98A00",
)  # fmt: skip
STROKES = ("-", "--", ":", "-.")
DPI = 120
Draw = TypeVar("Draw", bound=Callable[..., str])


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def literal_text(draw: Draw) -> Draw:
    """Let a function draw all text as it is, without mathtext, and without warnings of glyphs that no font has."""

    @wraps(draw)
    def drawn(*given: Any, **named: Any) -> Any:
        with rc_context({"text.parse_math": False}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            warnings.filterwarnings("ignore", "Matplotlib currently does not support")
            return draw(*given, **named)

    return cast(Draw, drawn)


def styles_of(groups: Sequence[Group]) -> dict[str, tuple[str, str]]:
    """Return colour and stroke by label: colour by configuration, stroke by model size."""
    configs = list(dict.fromkeys(group.config for group in groups))
    sizes = list(dict.fromkeys(group.size for group in groups))
    found = {}
    for group in groups:
        turn, place = divmod(configs.index(group.config), len(COLOURS))
        stroke = STROKES[(sizes.index(group.size) + turn) % len(STROKES)]
        found[group.label] = (COLOURS[place], stroke)
    return found


def finish_axes(ax: Axes, x_label: str, y_label: str, grid: Literal["x", "y"] = "y") -> None:
    """Label the axes, draw a faint grid across `grid` and remove the upper and right frame."""
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.grid(axis=grid, color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def label_rows(ax: Axes, names: Sequence[str]) -> None:
    """Name the rows of a chart whose first row is at the top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)


def legend_beside(figure: Figure, axes: Sequence[Axes]) -> None:
    """Draw one legend for several axes at the right, each label once."""
    labelled: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            labelled[label] = handle
    figure.legend(
        list(labelled.values()),
        list(labelled),
        loc="outside right center",
        frameon=False,
        fontsize=9,
    )
