"""Run the base model under A adapters at once, differentiable in the adapters.

Axis letters: see `llgbm`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llgbm.delta import EncodedProbes, read_states
from llgbm.lora import LoraBatch, LoraSpec
from llgbm.lora.adapters import StateDict
from llgbm.lora.apply import Applied, adapters_applied, final_hidden, head_logits, states_at
from llgbm.lora.graphs import PassGraphs
from llgbm.lora.shapes import TARGET_MODULES
from llgbm.models.quantised import refuse_quantised

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FunctionalLoRA:
    """Frozen base model that runs under many adapters in one pass, or merges one into its parameters.

    Sets `requires_grad` of the base to False and changes nothing else of it.
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
        self.graphs = PassGraphs()

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
        ids_ST = ids_APT.flatten(0, 1)
        if mask_APT is None:
            applied = Applied(batch, self.spec.scaling)
            hidden = states_at(self.model, ids_ST, applied=applied)
        else:
            with adapters_applied(self.model, batch, self.spec.scaling):
                hidden = final_hidden(self.model, ids_ST, mask_APT.flatten(0, 1))
        hidden = hidden.unflatten(0, ids_APT.shape[:2])
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
        """Return the parameters of the base with W + scaling * B A for W, for `torch.func.functional_call`.

        Gradients flow to the adapter through B A. Raises ValueError for an adapter that does not fit the base.
        """
        refuse_quantised(
            self.model,
            "its packed weights cannot be added to",
            "run it under the adapter instead, with `forward_with_lora`",
        )
        batch = LoraBatch.from_state_dicts([lora_weights])
        batch.check(self.spec)
        parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        for shape in self.spec.modules:
            name = shape.name
            update = batch.b[name][0] @ batch.a[name][0]
            if shape.is_transposed:
                update = update.T
            parameters[f"{name}.weight"] = parameters[f"{name}.weight"] + self.spec.scaling * update
        return parameters


def compute_delta_differentiable(
    lora_model: FunctionalLoRA,
    batch: LoraBatch,
    probes: EncodedProbes,
    base_APQD: Tensor,
    probe_chunk: int = 0,
    checkpointing: bool = False,
) -> Tensor:
    """Δ of A adapters at the marked positions of their probes, [A, P, Q, D], with gradients to the adapters.

    Two settings save memory for one more forward pass each and change no value: `probe_chunk` above 0 limits the
    probes of each adapter in memory, `checkpointing` keeps the activations of one block. Raises ValueError where the
    base's states are of other probes.
    """
    batch.check(lora_model.spec)

    applied = Applied(batch, lora_model.spec.scaling, checkpointing)

    def states(probes: EncodedProbes) -> Tensor:
        return read_states(lora_model.model, probes, applied)

    is_whole = not 0 < probe_chunk < probes.positions_APQ.shape[1]
    if is_whole and probes.ids_APT.is_cuda:
        ids_ST, positions_SQ = probes.ids_APT.flatten(0, 1), probes.positions_APQ.flatten(0, 1)
        found = lora_model.graphs.states_at(lora_model.model, ids_ST, positions_SQ, applied)
        states_APQD = found.float().unflatten(0, probes.positions_APQ.shape[:2])
    else:
        states_APQD = in_chunks(states, probes, probe_chunk)
    if states_APQD.shape != base_APQD.shape:
        raise ValueError(
            f"base states have shape {tuple(base_APQD.shape)}, the probes give {tuple(states_APQD.shape)}: "
            "they were read at other probes"
        )
    return states_APQD - base_APQD


def in_chunks(
    states: Callable[[EncodedProbes], Tensor], probes: EncodedProbes, probe_chunk: int
) -> Tensor:
    """Read [A, P, Q, D] at `probe_chunk` probes at a time, each chunk read again in the backward pass; 0 reads all."""
    n_probes = probes.positions_APQ.shape[1]
    if not 0 < probe_chunk < n_probes:
        return states(probes)
    pieces = []
    for start in range(0, n_probes, probe_chunk):
        chunk = probes.select(slice(None), slice(start, start + probe_chunk))
        pieces.append(checkpoint(states, chunk, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(pieces, dim=1)
