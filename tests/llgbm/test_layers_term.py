"""The term `layers`: deltas at inner blocks, beside states of the merged model."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from term_steps import trial_batch
from torch import Tensor

from llgbm.dataset import batch_deltas
from llgbm.delta import EncodedProbes
from llgbm.lora import LoraBatch
from llgbm.losses import DELTA_LOSSES
from llgbm.runtime import UserError
from llgbm.terms import step as step_module
from llgbm.training import TrainingConfig
from llgbm.world import World


def inner_states(
    world: World, values_V: Tensor, probes: EncodedProbes, row: int, name: str
) -> Tensor:
    """Output [S, D] of a module at the valid marks of one adapter's probes, by transformers on merged weights."""
    found: list[Tensor] = []
    hook = world.base.model.get_submodule(name).register_forward_hook(
        lambda module, args, output: found.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    state = LoraBatch.unflatten(world.bank.spec, values_V[None]).to_state_dicts()[0]
    with contextlib.ExitStack() as stack:
        stack.callback(hook.remove)
        torch.func.functional_call(
            world.base.model,
            world.lora_model.apply_lora_weights(state),
            kwargs={"input_ids": probes.ids_APT[row]},
        )
    return torch.cat(
        [
            own[positions[valid]]
            for own, positions, valid in zip(
                found[0], probes.positions_APQ[row], probes.valid_APQ[row], strict=True
            )
        ]
    )


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["model.layers.0", "model.layers.1", "model.layers.2"]),
        ({"layers.layers": (3,)}, ["model.layers.2"]),
        (
            {"layers.place": "attention", "layers.layers": "2,4"},
            ["model.layers.1.self_attn", "model.layers.3.self_attn"],
        ),
    ],
)
def test_inner_deltas_are_those_of_modules_of_the_merged_model(
    world: World, config: TrainingConfig, options: dict, names: list[str]
) -> None:
    config = replace(config, batch_size=2)
    trial, batch = trial_batch(world, config, terms={"layers": 1, "kl": 1}, term_options=options)
    assert trial.loss.modules == tuple(names)
    tokens = trial.generator(batch["condition"]).detach().requires_grad_()

    def value(**savers: Any) -> tuple[Tensor, Tensor]:
        own = trial.loss
        step = step_module.Step(
            batch,
            tokens,
            trial.generator,
            world.lora_model,
            **savers,
            prepared=own.prepared,
            modules=own.modules,
        )
        found = own(step)["loss_layers"]
        return found.detach(), torch.autograd.grad(found, tokens)[0]

    got, gradient = value()
    for savers in ({"probe_chunk": 1}, {"checkpointing": True}):
        torch.testing.assert_close(value(**savers), (got, gradient), atol=1e-6, rtol=1e-4)

    probes = batch_deltas(batch).probes
    nothing = torch.zeros(world.bank.spec.n_values)
    losses = []
    for place, row in enumerate(batch["row"].tolist()):
        own = trial.generator.standardiser.decode(tokens)[place]
        taught = world.data.values_AV[world.data.rows["train"][row]]
        for name in names:
            base, pred, teacher = (
                inner_states(world, values, probes, place, name)
                for values in (nothing, own, taught)
            )
            losses.append(DELTA_LOSSES["cosine_norm"](pred - base, teacher.detach() - base))
    wanted = torch.cat(losses).mean()
    torch.testing.assert_close(got, wanted.detach(), atol=1e-4, rtol=1e-3)
    (other,) = torch.autograd.grad(wanted, tokens)
    torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-2)


def test_the_last_layer_reads_the_same_beside_inner_ones(
    world: World, config: TrainingConfig
) -> None:
    alone, batch = trial_batch(world, config, terms={"delta": 1, "kl": 1})
    beside, _ = trial_batch(world, config, terms={"delta": 1, "kl": 1, "layers": 1})
    one, other = (trial.compute_loss(batch) for trial in (alone, beside))
    for name in ("loss_delta", "loss_kl"):
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers.layers": (5,)}, "the base has blocks 1 to 4"),
        ({"layers.layers": (0,)}, "give numbers from 1"),
        ({"layers.layers": (1, 1)}, "none twice"),
        ({"layers.layers": "one"}, "must be a whole number"),
        ({"layers.place": "mlp"}, "there are: block, attention"),
        ({"layers.loss": "l7"}, "there are: mse"),
    ],
)
def test_layers_that_there_are_not_are_refused(
    world: World, config: TrainingConfig, options: dict, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        trial_batch(world, config, terms={"layers": 1}, term_options=options)
