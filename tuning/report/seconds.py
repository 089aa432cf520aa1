"""Compare configurations at equal seconds: by how far each had come in the time that the quickest one takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tuning.report.groups import CHOOSING, Cell, Group, seed_of
from tuning.report.tables import markdown, shown
from tuning.tracking.runs import TrialResult

RATE = "time/steps_per_second"
ABOUT = (
    "Validation accuracy after the seconds of training that the quickest configuration of a size takes, read between "
    "the points of the learning curves, mean ± sd. A training that goes on after that has not come to the "
    "low learning rates of its last steps, so that one of fewer steps may reach more in these seconds."
)


def seconds_table(groups: Sequence[Group]) -> str:
    """Return a row per configuration whose curve and speed are known; "" where no size has two such."""
    rows = []
    for size in dict.fromkeys(group.size for group in groups):
        own = {group.label: group for group in groups if group.size == size}
        seconds = {label: took for label, group in own.items() if (took := _seconds(group))}
        if len(seconds) < 2:
            continue
        least = min(seconds.values())
        for label, took in seconds.items():
            then = Cell.over(accuracy_after(own[label], least))
            end = Cell.over(accuracy_after(own[label], float("inf")))
            rows.append(
                {
                    "configuration": label,
                    "seconds of training": f"{took:.1f}",
                    "equal seconds": f"{least:.1f}",
                    f"{CHOOSING} after these": shown(then, own[label]),
                    f"{CHOOSING} at its end": shown(end, own[label]),
                }
            )
    return markdown(rows)


def seconds_per_step(group: Group) -> float | None:
    """Return the mean over the trials of a group that tell their speed, None if none does."""
    found = [1 / rate for trial in group.trials if (rate := trial.metrics.get(RATE, 0.0)) > 0]
    return float(np.mean(found)) if found else None


def accuracy_after(group: Group, seconds: float) -> dict[str, float]:
    """Return the validation accuracy of each seed after so many seconds of training, or at its end before that.

    A seed that was not measured by then has none.
    """
    found: dict[str, list[float]] = {}
    for trial in group.trials:
        at_N, values_N = _measured(trial)
        if len(at_N) and seconds >= at_N[0]:
            value = float(np.interp(seconds, at_N, values_N))
            found.setdefault(seed_of(trial), []).append(value)
    return {seed: float(np.mean(own)) for seed, own in found.items()}


def _seconds(group: Group) -> float | None:
    """Mean seconds of training of the trials of a group whose curve and speed are known."""
    found = [at_N[-1] for at_N, _ in map(_measured, group.trials) if len(at_N)]
    return float(np.mean(found)) if found else None


def _measured(trial: TrialResult) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of training [N] at which validation accuracy was measured, and what it was; empty without a speed."""
    last, rate = float(trial.params.get("steps", "inf")), trial.metrics.get(RATE, 0.0)
    points = sorted(p for p in trial.curves.get(CHOOSING, ()) if p[0] <= last and rate > 0)
    steps_N, values_N = np.array(points, dtype=float).reshape(-1, 2).T
    return steps_N / max(rate, 1e-9), values_N
