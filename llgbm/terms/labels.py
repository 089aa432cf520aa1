"""Cross-entropy of true answers: the end-to-end reference, which uses labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llgbm.lora.apply import Applied
from llgbm.models.cost import BaseShape
from llgbm.models.encoding import EncodedPairs
from llgbm.models.scoring import token_losses
from llgbm.runtime import UserError
from llgbm.terms.step import Step, TermData
from llgbm.terms.term import PassSize, Term


@dataclass(frozen=True)
class Labels(Term):
    """Cross-entropy of the right answers to `examples` training examples of each task, drawn anew at every step.

    Behaviour is matched without any label; a training with this term is a reference for what labels are worth.

    Source: Charakorn et al. 2025, "Text-to-LoRA: Instant Transformer Adaption" (arXiv 2506.06105): its training by
    supervised fine-tuning.
    """

    examples: int = 2

    name: ClassVar = "labels"
    title: ClassVar = "cross-entropy of true answers (a reference that uses labels)"
    reads: ClassVar = frozenset({"examples"})
    matches: ClassVar = "labels"

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise UserError(f"labels.examples is {self.examples}; it must be at least 1")

    def prepare(self, data: TermData) -> tuple[int, EncodedPairs]:
        """Return the number of labelled examples of each training row, and the examples, row after row."""
        if data.data.labelled is None:
            raise UserError(
                "this world holds no labelled examples, which the loss term labels needs"
            )
        each = len(data.data.labelled) // len(data.rows)
        if self.examples > each:
            raise UserError(f"labels.examples is {self.examples}; there are {each} of each task")
        return each, data.data.labelled

    def value(self, step: Step) -> Tensor:
        each, pool = step.prepared[self.name]
        texts = self._drawn(each, pool, step.batch)
        applied = Applied(step.adapters, step.lora_model.spec.scaling, step.checkpointing)
        losses_ST = token_losses(step.lora_model.model, texts, applied)
        answers_ST = texts.targets_ST >= 0
        sums_A, counts_A = (
            own.view(step.adapters.n_adapters, -1).sum(1) for own in (losses_ST, answers_ST)
        )
        return (sums_A / counts_A).mean()

    def count(self, batch: Mapping[str, Tensor]) -> int:
        return len(batch["tokens"])

    def own_texts(self, n_adapters: int) -> int:
        return n_adapters * self.examples

    def flops(self, shape: BaseShape, size: PassSize) -> float:
        texts = self.own_texts(size.adapters)
        marked = round(size.marked * self.examples / size.probes)
        passes = shape.forward_flops(texts, size.tokens) + shape.backward_flops(texts, size.tokens)
        return passes + shape.head_flops(marked)

    def _drawn(self, each: int, pool: EncodedPairs, batch: Mapping[str, Tensor]) -> EncodedPairs:
        """Draw examples of every adapter in a batch, adapter-major, cut to the longest of them."""
        places = []
        for row, draw in zip(batch["row"].tolist(), batch["draw"].tolist(), strict=True):
            order = torch.randperm(each, generator=torch.Generator().manual_seed(draw))
            places.append(row * each + order[: self.examples])
        at = torch.cat(places).to(pool.input_ids_ST.device)
        drawn = EncodedPairs(pool.input_ids_ST[at], pool.targets_ST[at])
        return drawn.select(slice(None))
