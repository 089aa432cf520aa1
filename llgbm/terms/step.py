"""Inputs of loss terms: what a training step has of teachers and of predicted adapters, each computed once.

Axis letters: see `llgbm`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llgbm.dataset import ExperimentData, TeacherTokens, batch_deltas
from llgbm.delta import DeltaTable
from llgbm.functional import FunctionalLoRA, compute_delta_differentiable
from llgbm.generator.networks import LoraGenerator
from llgbm.lora import LoraBatch
from llgbm.lora.apply import PASS_LOGITS, head_logits
from llgbm.terms.inner import read_inner

Compare = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TermData:
    """Inputs that do not change in a training: the world's data, its training rows, and the teachers' tokens.

    Of a bank that is read from the disk, `tokens` are encoded when they are indexed: `tokens[:]` are all of them.
    """

    data: ExperimentData
    rows: list[int]
    tokens: Tensor | TeacherTokens
    lora_model: FunctionalLoRA
    generator: LoraGenerator


@dataclass(frozen=True, eq=False)
class Step:
    """One batch and the tokens predicted for it. What follows from them is computed when first asked for.

    `batch` is that of `create_dataloader`; `prepared` holds by name what terms computed before the training, `modules`
    the modules of the base that terms read beside its last layer.
    """

    batch: Mapping[str, Tensor]
    tokens: Tensor
    generator: LoraGenerator
    lora_model: FunctionalLoRA
    probe_chunk: int = 0
    checkpointing: bool = False
    prepared: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = ()

    @property
    def teacher_tokens(self) -> Tensor:
        return self.batch["tokens"]

    @cached_property
    def adapters(self) -> LoraBatch:
        """Predicted adapters, with gradient."""
        return self.generator.to_lora(self.tokens)

    @property
    def values_AV(self) -> Tensor:
        """Predicted adapters, flat."""
        return self.adapters.flatten(self.lora_model.spec)

    @cached_property
    def teachers(self) -> LoraBatch:
        """The teachers' adapters."""
        with torch.no_grad():
            return self.generator.to_lora(self.teacher_tokens)

    @cached_property
    def deltas(self) -> DeltaTable:
        """Probes of the step, the base's states there and the teachers' deltas.

        Raises ValueError where no marked position is valid.
        """
        if not self.batch["valid"].any():
            raise ValueError(
                "no marked position is valid: every probe is padding; check the probe set"
            )
        return batch_deltas(self.batch)

    @cached_property
    def delta_pred(self) -> Tensor:
        """Δ of the predicted adapters [A, P, Q, D], with gradient."""
        if self.modules:
            return self._with_inner[..., 0, :] - self.deltas.base_APQD
        return compute_delta_differentiable(
            self.lora_model,
            self.adapters,
            self.deltas.probes,
            self.deltas.base_APQD,
            self.probe_chunk,
            self.checkpointing,
        )

    @cached_property
    def _with_inner(self) -> Tensor:
        """States of the last layer and of the modules, [A, P, Q, 1 + N, D]."""
        return read_inner(
            self.lora_model,
            self.adapters,
            self.deltas.probes,
            self.modules,
            self.probe_chunk,
            self.checkpointing,
        )

    def inner(self, names: Sequence[str]) -> Tensor:
        """Return states at the outputs of modules that a term named, [A, P, Q, N, D], with gradient."""
        return self._with_inner[..., [1 + self.modules.index(name) for name in names], :]

    def over_positions(self, compare: Compare) -> Tensor:
        """Average `compare(student, teacher)` over the marked positions; both are logits [S, vocabulary], float32.

        The teacher's logits are the head of its states, which are the base's plus its delta. Logits that are too many
        for one pass are taken in pieces and computed again for the gradient. Raises ValueError where a state is not
        finite, and as `deltas`.
        """
        valid_APQ = self.deltas.probes.valid_APQ
        base_SD = self.deltas.base_APQD[valid_APQ]
        pred_SD = base_SD + self.delta_pred[valid_APQ]
        teacher_SD = base_SD + self.deltas.delta_APQD[valid_APQ]
        for name, states in (("predicted", pred_SD), ("teacher's", teacher_SD)):
            if not torch.isfinite(states).all():
                raise ValueError(
                    f"the {name} states hold NaN or infinite values: check the adapters and the learning rate"
                )
        return _in_pieces(self._logits, compare, pred_SD, teacher_SD, self.n_at_once).mean()

    @property
    def n_at_once(self) -> int:
        """Positions whose logits are held at once."""
        return max(1, PASS_LOGITS // self.lora_model.model.config.get_text_config().vocab_size)

    def _logits(self, states_SD: Tensor) -> Tensor:
        head = self.lora_model.model.get_output_embeddings()
        return head_logits(self.lora_model.model, states_SD.to(head.weight.dtype)).float()


def _in_pieces(
    logits: Callable[[Tensor], Tensor],
    compare: Compare,
    pred_SD: Tensor,
    teacher_SD: Tensor,
    n_at_once: int,
) -> Tensor:
    """Compare position by position, [S], `n_at_once` at a time."""

    def piece(pred: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = logits(teacher)
        return compare(logits(pred), wanted)

    if len(pred_SD) <= n_at_once:
        return piece(pred_SD, teacher_SD)
    pairs = zip(pred_SD.split(n_at_once), teacher_SD.split(n_at_once), strict=True)
    pieces = [
        checkpoint(piece, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs
    ]
    return torch.cat(pieces)
