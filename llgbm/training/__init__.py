"""Train a generator: `config` says how, `loop` does it, evaluations come from `llgbm.evaluation`."""

from __future__ import annotations

from llgbm.evaluation.metrics import evaluate
from llgbm.losses import DeltaOnlyLoss, MultiTaskLoss
from llgbm.training.config import TrainingConfig
from llgbm.training.loop import VERSION, Outcome, Report, State, Trial, train

__all__ = [
    "VERSION",
    "DeltaOnlyLoss",
    "MultiTaskLoss",
    "Outcome",
    "Report",
    "State",
    "TrainingConfig",
    "Trial",
    "evaluate",
    "train",
]
