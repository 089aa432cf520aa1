"""What spends time to save memory: the same values and gradients, and less held between the two passes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llgbm.delta import DeltaTable, EncodedProbes, measure_deltas
from llgbm.functional import FunctionalLoRA, compute_delta_differentiable
from llgbm.lora import LoraBatch, LoraSpec
from llgbm.lora.apply import adapters_applied, final_hidden
from llgbm.lora.shapes import LinearShape
from llgbm.models.load import Base
from llgbm.runtime import UserError, freeze_gc
from llgbm.training import TrainingConfig, train
from llgbm.world import World

SAVERS = {
    "blocks": {"checkpointing": True},
    "probes": {"probe_chunk": 2},
    "single probes": {"probe_chunk": 1},
    "both": {"probe_chunk": 2, "checkpointing": True},
}


@pytest.fixture(scope="module")
def lora_model(tiny_base: Base) -> FunctionalLoRA:
    return FunctionalLoRA(tiny_base.model, 3, 6.0)


@pytest.fixture(scope="module")
def table(lora_model: FunctionalLoRA, tiny_adapters: LoraBatch) -> DeltaTable:
    """Five probes of 12 tokens for each of three adapters, read at three positions."""
    noise = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 400, (3, 5, 12), generator=noise)
    positions = torch.randint(0, 12, (3, 5, 3), generator=noise)
    probes = EncodedProbes(ids, positions, torch.ones_like(positions, dtype=torch.bool))
    return measure_deltas(lora_model.model, lora_model.spec, tiny_adapters, probes, shared=False)


def leaves_of(batch: LoraBatch) -> LoraBatch:
    return LoraBatch(
        *({n: t.clone().requires_grad_() for n, t in side.items()} for side in (batch.a, batch.b))
    )


def bytes_held(forward: Callable[[], Tensor], ignore: Collection[int] = ()) -> tuple[Tensor, int]:
    """What `forward` gives, and the bytes that autograd keeps for its backward pass.

    Each storage counts once, those at the addresses in `ignore` not at all.
    """
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        return forward(), sum(n for address, n in storages.items() if address not in ignore)


@pytest.mark.parametrize("saver", SAVERS.values(), ids=list(SAVERS))
def test_gradients_are_those_of_the_plain_pass_in_less_memory(
    lora_model: FunctionalLoRA,
    tiny_adapters: LoraBatch,
    table: DeltaTable,
    saver: Mapping[str, int],
) -> None:
    results = []
    for options in ({}, saver):
        leaves = leaves_of(tiny_adapters)
        delta, held = bytes_held(
            lambda leaves=leaves, options=options: compute_delta_differentiable(
                lora_model, leaves, table.probes, table.base_APQD, **options
            )
        )
        (delta * table.delta_APQD.roll(1, 0)).sum().backward()
        results.append(
            (delta.detach(), [t.grad for t in (*leaves.a.values(), *leaves.b.values())], held)
        )
    (delta, gradients, held), (saved_delta, saved_gradients, saved_held) = results
    torch.testing.assert_close(saved_delta, delta, atol=1e-6, rtol=1e-6)
    for plain, saved in zip(gradients, saved_gradients, strict=True):
        assert plain is not None and plain.abs().max() > 1e-4
        torch.testing.assert_close(
            saved / plain.abs().max(), plain / plain.abs().max(), atol=1e-6, rtol=1e-5
        )
    assert saved_held < held / 4


def test_modules_outside_the_blocks_are_adapted_too(tiny_base: Base) -> None:
    """Without a numbered block around it (as an LM head), a module keeps its plain hook."""
    head = tiny_base.model.lm_head
    inside = LoraSpec.from_model(tiny_base.model, 2, 4.0, ("q_proj",)).modules
    spec = LoraSpec((*inside, LinearShape("lm_head", head.in_features, head.out_features)), 2, 4.0)
    batch = LoraBatch.unflatten(
        spec, torch.randn(1, spec.n_values, generator=torch.Generator().manual_seed(0))
    )
    ids = torch.arange(6)[None]
    outputs = []
    for checkpointing in (False, True):
        with torch.no_grad(), adapters_applied(tiny_base.model, batch, spec.scaling, checkpointing):
            outputs.append(tiny_base.model(input_ids=ids).logits)
    torch.testing.assert_close(outputs[0], outputs[1])
    with torch.no_grad():
        assert (tiny_base.model(input_ids=ids).logits - outputs[0]).abs().max() > 0.1


def test_the_base_is_left_as_it_was(
    tiny_base: Base, tiny_spec: LoraSpec, tiny_adapters: LoraBatch
) -> None:
    ids = torch.arange(6)[None].expand(3, -1)
    before = [dict(module._forward_hooks) for module in tiny_base.model.modules()]
    with (
        pytest.raises(IndexError),
        adapters_applied(tiny_base.model, tiny_adapters, tiny_spec.scaling, True),
    ):
        final_hidden(tiny_base.model, torch.full((3, 2), 10**6))
    hidden = [final_hidden(tiny_base.model, ids)]
    leaves = leaves_of(tiny_adapters)
    with adapters_applied(tiny_base.model, leaves, tiny_spec.scaling, checkpointing=True):
        final_hidden(tiny_base.model, ids).sum().backward()
    hidden.append(final_hidden(tiny_base.model, ids))
    assert torch.equal(hidden[0], hidden[1])
    assert before == [dict(module._forward_hooks) for module in tiny_base.model.modules()]
    assert not any("forward" in vars(module) for module in tiny_base.model.modules())


@pytest.mark.whole
def test_a_training_that_saves_memory_follows_the_plain_one(
    world: World, config: TrainingConfig
) -> None:
    curves = []
    for change in ({}, {"activation_checkpointing": True, "probe_chunk": 1}):
        found: list[float] = []
        settings = replace(config, steps=6, eval_every=6, n_probes=3, **change)
        train(
            settings,
            world.data,
            world.lora_model,
            lambda step, m, found=found: found.append(m["loss/total"]) or True,
        )
        curves.append(torch.tensor(found))
    torch.testing.assert_close(curves[1], curves[0], atol=0, rtol=1e-4)


def test_a_chunk_below_zero_is_refused() -> None:
    with pytest.raises(UserError, match="probe_chunk is -1"):
        TrainingConfig(probe_chunk=-1)


def test_the_collector_is_spared_what_was_loaded_and_still_finds_later_garbage() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.me = self

    freeze_gc()
    try:
        assert gc.get_freeze_count() > 10 * len(gc.get_objects())
        later = Cycle()
        gone = weakref.ref(later)
        del later
        gc.collect()
        assert gone() is None
    finally:
        freeze_gc.cache_clear()
        gc.unfreeze()
