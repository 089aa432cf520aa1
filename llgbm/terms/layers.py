"""Distance of delta activations at inner layers of the base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llgbm.lora import LoraBatch
from llgbm.losses import DELTA_LOSSES, delta_loss
from llgbm.runtime import UserError
from llgbm.terms.inner import PLACES, inner_modules, measure_inner
from llgbm.terms.step import Step, TermData
from llgbm.terms.term import Term


@dataclass(frozen=True)
class Layers(Term):
    """Loss of Δ at the marked positions after the blocks `layers`, counted from 1, or in their attention's output.

    Without `layers` all blocks but the last are read. The teachers' states are measured once, before the training, and
    kept in memory.

    Source: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets" (arXiv 1412.6550), with deltas in place of states.
    """

    layers: tuple[int, ...] = ()
    place: str = "block"
    loss: str = "cosine_norm"

    name: ClassVar = "layers"
    title: ClassVar = "distance of deltas at inner layers from the teachers'"
    reads: ClassVar = frozenset({"layers"})
    matches: ClassVar = "behaviour"

    def __post_init__(self) -> None:
        for key, value, known in (
            ("place", self.place, PLACES),
            ("loss", self.loss, tuple(DELTA_LOSSES)),
        ):
            if value not in known:
                raise UserError(f"layers.{key} is {value!r}; there are: {', '.join(known)}")
        if len(set(self.layers)) < len(self.layers) or min(self.layers, default=1) < 1:
            raise UserError(
                f"layers.layers is {','.join(map(str, self.layers))}: give numbers from 1, none twice"
            )

    def modules(self, data: TermData) -> tuple[str, ...]:
        return inner_modules(data.lora_model.model, self.layers, self.place)

    def prepare(self, data: TermData) -> tuple[tuple[str, ...], Tensor, Tensor]:
        """Return the modules, the base's states there and the teachers' deltas, [rows, P, Q, N, D] each."""
        names = self.modules(data)
        teachers = LoraBatch.unflatten(data.lora_model.spec, data.data.teachers(data.rows))
        probes = data.data.loss_deltas.probes.select(data.rows)
        return names, *measure_inner(data.lora_model, teachers, probes, names)

    def value(self, step: Step) -> Tensor:
        names, base, teacher = step.prepared[self.name]
        valid_APQ = step.deltas.probes.valid_APQ
        rows, marks = step.batch["row"][:, None], valid_APQ.shape[-1]
        # Both [A, P, Q, N, D]: the probes of this step, cut to its longest answer.
        at = (rows, step.batch["probes"])
        pred = step.inner(names) - base[at][:, :, :marks]
        wanted = teacher[at][:, :, :marks]
        valid = valid_APQ[..., None].expand(wanted.shape[:-1])
        return delta_loss(self.loss, pred, wanted, valid)
