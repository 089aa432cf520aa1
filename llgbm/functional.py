"""The base model under A adapters at once, differentiable in the adapters.

Letters: A adapters, P probes, T tokens, Q marked positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llgbm.delta import EncodedProbes, read_states
from llgbm.lora import LoraBatch, LoraSpec
from llgbm.lora.adapters import TARGET_MODULES, StateDict
from llgbm.lora.apply import adapters_applied, final_hidden, head_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FunctionalLoRA:
    """Runs a frozen base under many adapters in one pass, or gives one adapter's effective parameters.

    The base's own weights stop asking for gradients; nothing else of it is changed.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        lora_rank: int,
        lora_alpha: float,
        target_modules: Sequence[str] = TARGET_MODULES,
    ) -> None:
        self.model = base_model.requires_grad_(False)
        self.spec = LoraSpec.from_model(base_model, lora_rank, lora_alpha, target_modules)

    def forward_with_lora(
        self,
        batch: LoraBatch,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        hidden_only: bool = False,
    ) -> Tensor:
        """Logits [A, P, T, vocabulary], or last-layer hidden states [A, P, T, D] with `hidden_only`.

        `input_ids` is [P, T] for texts that all adapters read, or [A, P, T]. Raises ValueError for an adapter that does
        not fit the base, or ids of another number of adapters.
        """
        batch.check(self.spec)
        n_adapters = batch.n_adapters
        ids_APT, mask_APT = (self._per_adapter(t, n_adapters) for t in (input_ids, attention_mask))
        assert ids_APT is not None
        flat_mask = None if mask_APT is None else mask_APT.flatten(0, 1)
        with adapters_applied(self.model, batch, self.spec.scaling):
            hidden = final_hidden(self.model, ids_APT.flatten(0, 1), flat_mask).unflatten(
                0, ids_APT.shape[:2]
            )
        return hidden if hidden_only else head_logits(self.model, hidden)

    @staticmethod
    def _per_adapter(ids: Tensor | None, n_adapters: int) -> Tensor | None:
        if ids is None:
            return None
        if ids.ndim == 2:
            return ids.expand(n_adapters, *ids.shape)
        if ids.ndim != 3 or ids.shape[0] != n_adapters:
            raise ValueError(
                f"ids have shape {tuple(ids.shape)}, needed: [P, T] or [{n_adapters}, P, T]"
            )
        return ids

    def apply_lora_weights(self, lora_weights: StateDict) -> dict[str, Tensor]:
        """All parameters of the base with W + scaling * B A in place of W, for `torch.func.functional_call`.

        Gradients flow to the adapter through B A. Raises ValueError for an adapter that does not fit the base.
        """
        batch = LoraBatch.from_state_dicts([lora_weights])
        batch.check(self.spec)
        parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        for name in batch.a:
            update = batch.b[name][0] @ batch.a[name][0]
            parameters[f"{name}.weight"] = parameters[f"{name}.weight"] + self.spec.scaling * update
        return parameters


def compute_delta_differentiable(
    flora: FunctionalLoRA,
    batch: LoraBatch,
    probes: EncodedProbes,
    base_APQD: Tensor,
    probe_chunk: int = 0,
    checkpointing: bool = False,
) -> Tensor:
    """Δ of A adapters at the marked positions of their probes, [A, P, Q, D], with gradients to the adapters.

    Two savers of memory leave values and gradients as they are and cost a forward pass each: with `probe_chunk` above
    0 a backward pass holds so many probes of each adapter at a time, with `checkpointing` one block of the base.
    Raises ValueError where the base's states are of other probes.
    """
    batch.check(flora.spec)

    def states(probes: EncodedProbes) -> Tensor:
        with adapters_applied(flora.model, batch, flora.spec.scaling, checkpointing):
            return read_states(flora.model, probes)

    n_probes = probes.positions_APQ.shape[1]
    if 0 < probe_chunk < n_probes:
        pieces = [
            probes.select(slice(None), slice(i, i + probe_chunk))
            for i in range(0, n_probes, probe_chunk)
        ]
        states_APQD = torch.cat(
            [
                checkpoint(states, piece, use_reentrant=False, preserve_rng_state=False)
                for piece in pieces
            ],
            dim=1,
        )
    else:
        states_APQD = states(probes)
    if states_APQD.shape != base_APQD.shape:
        raise ValueError(
            f"base states have shape {tuple(base_APQD.shape)}, the probes give {tuple(states_APQD.shape)}: "
            "they were read at other probes"
        )
    return states_APQD - base_APQD
