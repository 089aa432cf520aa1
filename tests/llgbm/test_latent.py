"""The generator `latent`: its divergence, its samples, the form of its adapters, and what it is without a latent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from contracts import (
    WIDTH,
    make_spec,
    random_conditions,
    random_rows,
    random_statistics,
    training_batch,
)
from torch import Tensor

from llgbm.generator import (
    GeneratorConfig,
    LatentConfig,
    LatentGenerator,
    generator_config,
    make_generator,
    read_generator,
)
from llgbm.generator.latent import gaussian
from llgbm.lora import LoraBatch, LoraSpec
from llgbm.lora.geometry import delta_w_error, fix_gauge
from llgbm.lora.shapes import LinearShape
from llgbm.runtime import UserError
from llgbm.training import TrainingConfig, Trial
from llgbm.world import World


def made(**options: Any) -> LatentGenerator:
    spec = make_spec()
    config = LatentConfig(**{"hidden": 16, "latent": 3, **options})
    generator = make_generator(config, spec, WIDTH, random_statistics(spec), 0)
    generator.prepare_training(random_rows(spec))
    assert isinstance(generator, LatentGenerator)
    return generator


def parts_of(generator: LatentGenerator, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return what the posterior's and the prior's layers give for a batch."""
    state_AH = generator.read(batch["condition"])
    both = torch.cat([state_AH, generator.encoder(batch["tokens"])], dim=1)
    return generator.posterior(both), generator.prior(state_AH)


def test_the_penalty_is_the_divergence_of_two_gaussians() -> None:
    """By its formula: log σp/σq + (σq² + (μq - μp)²) / 2σp² - 1/2, summed over the latent, averaged over rows."""
    generator, rows = made(), random_rows(make_spec())
    batch = training_batch(generator, rows)
    q, p = (gaussian(parts) for parts in parts_of(generator, batch))
    ratio = (q.stddev.square() + (q.mean - p.mean).square()) / (2 * p.stddev.square())
    wanted = (p.stddev.log() - q.stddev.log() + ratio - 0.5).sum(1).mean()
    (value,) = generator.training_forward(batch)[1].values()
    torch.testing.assert_close(value, wanted)
    assert value > 0.01 and (q.stddev > 0).all()


def test_free_bits_are_a_floor_below_which_nothing_pulls() -> None:
    generator, rows = made(free_bits=50.0), random_rows(make_spec())
    value = generator.training_forward(training_batch(generator, rows))[1]["kl"]
    assert value.item() == pytest.approx(3 * 50.0)
    value.backward()
    assert generator.prior.weight.grad is None or not generator.prior.weight.grad.any()


def test_training_reads_the_teacher_and_generation_does_not() -> None:
    generator, rows = made(), random_rows(make_spec())
    batch = training_batch(generator, rows)
    other = {**batch, "tokens": batch["tokens"].flip(0)}
    first, second = (generator.training_forward(own)[0] for own in (batch, other))
    assert (first - second).abs().max() > 1e-4
    assert generator.generate(batch["condition"]).n_adapters == 5


def test_samples_differ_and_are_told_by_seed_and_number_alone() -> None:
    generator, spec = made(), make_spec()
    condition_NC = random_conditions(1)[0]

    def drawn(seed: int, *numbers: int) -> Tensor:
        return generator.sample(condition_NC, seed, numbers).flatten(spec)

    three = drawn(0, 0, 1, 2)
    torch.manual_seed(9)
    torch.testing.assert_close(drawn(0, 0, 1, 2), three, rtol=0, atol=0)
    torch.testing.assert_close(drawn(0, 2, 5)[:1], three[2:])
    assert torch.pdist(torch.cat([three, drawn(1, 0)])).min() > 1e-3
    mean = generator.generate(condition_NC[None]).flatten(spec)
    assert (three - mean).abs().max(1).values.min() > 1e-4


def test_the_mean_of_many_samples_nears_the_adapter_that_is_generated() -> None:
    """The writer is nearly linear in so small a latent."""
    generator, spec = made(gauge="none"), make_spec()
    with torch.no_grad():
        generator.latent_inlet.weight *= 0.01
    condition_NC = random_conditions(1)[0]
    samples = generator.sample(condition_NC, 0, range(400)).flatten(spec)
    mean, spread = samples.mean(0), samples.std(0)
    wanted = generator.generate(condition_NC[None]).flatten(spec)[0]
    assert (mean - wanted).abs().max() < (6 * spread / 20).max() + 1e-5


def test_other_generators_draw_nothing() -> None:
    spec = make_spec()
    plain = make_generator(GeneratorConfig(), spec, WIDTH, random_statistics(spec), 0)
    with pytest.raises(UserError, match="train the generator `latent`"):
        plain.sample(random_conditions(1)[0], 0, [0])


def test_with_the_latent_ignored_and_free_it_is_the_plain_map(
    world: World, config: TrainingConfig
) -> None:
    """Loss and gradients are those of the default generator, to the bit."""
    latent, plain = (
        Trial(replace(config, generator=own), world.data, world.lora_model)
        for own in (LatentConfig(beta=0.0, gauge="none"), GeneratorConfig())
    )
    assert isinstance(latent.generator, LatentGenerator)
    left = latent.generator.load_state_dict(plain.generator.state_dict(), strict=False)
    assert not left.unexpected_keys
    torch.nn.init.zeros_(latent.generator.latent_inlet.weight)
    found = []
    for trial in (latent, plain):
        values = trial.compute_loss(next(iter(trial.batches())))
        values["loss"].backward()
        found.append(values["loss"])
    assert torch.equal(*found)
    own = dict(latent.generator.named_parameters())
    for name, parameter in plain.generator.named_parameters():
        assert torch.equal(own[name].grad, parameter.grad), name


def test_beta_weighs_the_divergence_in_the_loss_and_it_is_reported(
    world: World, config: TrainingConfig
) -> None:
    totals = []
    for beta in (0.0, 0.5):
        generator = LatentConfig(beta=beta)
        trial = Trial(replace(config, generator=generator), world.data, world.lora_model)
        totals.append(trial.advance(next(iter(trial.batches()))))
    free, weighed = totals
    assert free["generator/kl"] == weighed["generator/kl"] > 0
    assert weighed["loss/total"] - free["loss/total"] == pytest.approx(
        0.5 * free["generator/kl"], rel=1e-4
    )


def changed_gauge(batch: LoraBatch, seed: int) -> LoraBatch:
    """Return other factors of the same updates: A' = G A, B' = B G⁻¹."""
    noise = torch.Generator().manual_seed(seed)
    a, b = {}, {}
    for name, own in batch.a.items():
        mix = torch.randn(len(own), own.shape[1], own.shape[1], generator=noise).double()
        a[name] = (mix @ own.double()).float()
        b[name] = (batch.b[name].double() @ torch.linalg.inv(mix)).float()
    return LoraBatch(a, b)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_fixed_form_is_of_the_update_alone(rank: int) -> None:
    spec = make_spec(rank)
    noise = torch.randn(4, spec.n_values, generator=torch.Generator().manual_seed(rank))
    batch = LoraBatch.unflatten(spec, noise)
    fixed = fix_gauge(batch)
    assert delta_w_error(fixed, batch).max() < 1e-3
    other = changed_gauge(batch, seed=rank)
    assert (other.flatten(spec) - noise).abs().max() > 0.1
    torch.testing.assert_close(
        fix_gauge(other).flatten(spec), fixed.flatten(spec), rtol=1e-2, atol=1e-3
    )
    for name in fixed.a:
        sizes = (fixed.a[name].square().sum(2), fixed.b[name].square().sum(1))
        torch.testing.assert_close(*sizes, rtol=1e-3, atol=1e-4)


def test_an_adapter_of_zeros_and_a_rank_above_the_width_have_a_form() -> None:
    shapes = (LinearShape("layers.0.q_proj", 3, 5), LinearShape("layers.0.v_proj", 6, 2))
    spec = LoraSpec(shapes, rank=4, alpha=4.0)
    noise = torch.randn(2, spec.n_values, generator=torch.Generator().manual_seed(0))
    noise[1] = 0
    batch = LoraBatch.unflatten(spec, noise)
    fixed = fix_gauge(batch)
    fixed.check(spec)
    for name in batch.a:
        torch.testing.assert_close(
            fixed.b[name] @ fixed.a[name], batch.b[name] @ batch.a[name], rtol=1e-4, atol=1e-4
        )
    assert not fixed.flatten(spec)[1].any()


def test_statistics_and_tokens_are_of_the_fixed_form(world: World, config: TrainingConfig) -> None:
    trial = Trial(replace(config, generator=LatentConfig()), world.data, world.lora_model)
    spec, rows = world.lora_model.spec, list(world.data.rows["train"])
    teachers = LoraBatch.unflatten(spec, world.data.teachers(rows))
    tokens_BV = trial.generator.standardiser.encode(world.data.teachers(rows))
    torch.testing.assert_close(tokens_BV.mean(0), torch.zeros(spec.n_values), rtol=0, atol=1e-4)
    assert delta_w_error(trial.generator.to_lora(tokens_BV), teachers).max() < 1e-3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("latent,latent=0", "says nothing"),
        ("latent,beta=-1", "beta is -1"),
        ("latent,beta=nan", "beta is nan"),
        ("latent,free_bits=inf", "free_bits is inf"),
        ("latent,gauge=qr", "unknown gauge 'qr'; there are: svd, none"),
    ],
)
def test_options_that_cannot_be_are_a_users_mistake(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_generator(text)


def test_it_is_found_by_its_name() -> None:
    assert generator_config("latent", beta="0.5") == LatentConfig(beta=0.5)
