"""Read states inside the base: outputs of its blocks or of their attention, beside the last layer, in one pass.

Axis letters: see `llgbm`. N is the number of modules read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llgbm.delta import EncodedProbes
from llgbm.functional import FunctionalLoRA, in_chunks
from llgbm.lora import LoraBatch
from llgbm.lora.apply import adapters_applied, chunks, final_hidden
from llgbm.runtime import UserError, progress, release_device_memory

PLACES = ("block", "attention")
# Names of a block's attention, by family.
ATTENTION = ("self_attn", "attn", "attention", "self_attention")


def inner_modules(model: nn.Module, layers: Sequence[int], place: str) -> tuple[str, ...]:
    """Name the modules whose outputs are read: of the blocks `layers`, counted from 1; of all but the last for none.

    Raises UserError for a base whose blocks are not found, and for a block that it does not have.
    """
    attention = [
        name
        for name, _ in model.named_modules()
        if name.rpartition(".")[2] in ATTENTION and name.split(".")[-2:-1][0].isdigit()
    ]
    if not attention:
        raise UserError(
            "the blocks of this base are not found, so no inner layer can be read: use the term delta"
        )
    chosen = tuple(layers) or tuple(range(1, len(attention)))
    if not chosen or not all(1 <= layer <= len(attention) for layer in chosen):
        raise UserError(
            f"layers {', '.join(map(str, chosen)) or 'of one block'} cannot be read: the base has blocks 1 to "
            f"{len(attention)}"
        )
    names = [attention[layer - 1] for layer in chosen]
    return tuple(name if place == "attention" else name.rpartition(".")[0] for name in names)


@contextmanager
def captured(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Keep the outputs of modules, of tuples the first, that run in the block."""
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in names:

            def keep(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
                found[name] = output[0] if isinstance(output, tuple) else output

            stack.callback(model.get_submodule(name).register_forward_hook(keep).remove)
        yield found


def read_inner(
    lora_model: FunctionalLoRA,
    batch: LoraBatch | None,
    probes: EncodedProbes,
    names: Sequence[str],
    probe_chunk: int = 0,
    checkpointing: bool = False,
) -> Tensor:
    """Read states [A, P, Q, 1 + N, D] at the marked positions: of the last layer, then of the modules. float32.

    Without a `batch` the states are the base's own. The two settings save memory as in `compute_delta_differentiable`.
    """
    model, scaling = lora_model.model, lora_model.spec.scaling

    def read(probes: EncodedProbes) -> Tensor:
        with ExitStack() as stack:
            if batch is not None:
                stack.enter_context(adapters_applied(model, batch, scaling, checkpointing))
            found = stack.enter_context(captured(model, names))
            last_STD = final_hidden(model, probes.ids_APT.flatten(0, 1))
            hidden_STND = torch.stack([last_STD, *(found[name] for name in names)], dim=2)
        places_SQ = probes.positions_APQ.flatten(0, 1)
        index = places_SQ[..., None, None].expand(-1, -1, *hidden_STND.shape[2:])
        picked = hidden_STND.gather(1, index).float()
        return picked.unflatten(0, probes.positions_APQ.shape[:2])

    return in_chunks(read, probes, probe_chunk)


def measure_inner(
    lora_model: FunctionalLoRA, teachers: LoraBatch, probes: EncodedProbes, names: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Read the modules under the base and under each teacher, without gradient: states and deltas, [A, P, Q, N, D]."""
    states, deltas = [], []
    with torch.no_grad():
        size = probes.ids_APT[0].numel()
        for rows in progress(chunks(teachers.n_adapters, size, 32), "inner layers"):
            own = probes.select(rows)
            base = read_inner(lora_model, None, own, names)[..., 1:, :]
            taught = read_inner(lora_model, teachers.select(rows), own, names)[..., 1:, :]
            states.append(base)
            deltas.append(taught - base)
    release_device_memory()
    return torch.cat(states), torch.cat(deltas)
