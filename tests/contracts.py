"""What every generator and every loss must do; a subclass gives a fixture and inherits the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llgbm.generator import GeneratorConfig, LoraGenerator
from llgbm.generator.bundle import load_generator, save_generator
from llgbm.generator.networks import Standardiser, TrainingRows
from llgbm.lora import LoraSpec
from llgbm.lora.shapes import LinearShape

Loss = Callable[[Tensor, Tensor], Tensor]
WIDTH = 6


def make_spec(rank: int = 2) -> LoraSpec:
    """Two layers of three kinds, no two sides alike, so that a transposed or exchanged shape shows."""
    kinds = (("q_proj", 5, 7), ("k_proj", 5, 3), ("down_proj", 9, 5))
    modules = tuple(
        LinearShape(f"layers.{i}.{kind}", n_in, n_out)
        for i in range(2)
        for kind, n_in, n_out in kinds
    )
    return LoraSpec(modules, rank, alpha=4.0)


def random_statistics(spec: LoraSpec) -> Standardiser:
    noise = torch.Generator().manual_seed(7)
    return Standardiser(
        torch.randn(spec.n_values, generator=noise),
        torch.rand(spec.n_values, generator=noise) + 0.5,
    )


def random_conditions(n_adapters: int = 3, n_prompts: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n_adapters, n_prompts, WIDTH, generator=torch.Generator().manual_seed(seed))


def random_rows(spec: LoraSpec, n_rows: int = 5) -> TrainingRows:
    """Training rows of random numbers, the last two of one task."""
    noise = torch.Generator().manual_seed(8)
    values_BV = torch.randn(n_rows, spec.n_values, generator=noise)
    tasks = tuple(f"task {min(row, n_rows - 2)}" for row in range(n_rows))
    condition_BNC = random_conditions(n_rows, 6, seed=9)
    return TrainingRows(tasks, lambda: condition_BNC, lambda: values_BV)


def training_batch(generator: LoraGenerator, rows: TrainingRows) -> dict[str, Tensor]:
    """Batch of all training rows, with what generators read of one."""
    each = torch.arange(len(rows.tasks))
    tokens = generator.standardiser.encode(rows.read_teachers())
    condition = rows.read_conditions()
    return {"condition": condition, "tokens": tokens, "row": each, "draw": each + 100}


class GeneratorContract:
    """The subclass gives the fixture `config`; generators of it are made with `self.make`.

    Where a generator keeps something of the training rows, `make` prepares it with `random_rows`.
    """

    def make(
        self, config: GeneratorConfig, spec: LoraSpec | None = None, seed: int = 0
    ) -> LoraGenerator:
        raise NotImplementedError

    @pytest.mark.parametrize("rank", [1, 3])
    @pytest.mark.parametrize(("n_adapters", "n_prompts"), [(1, 1), (3, 4)])
    def test_output_has_the_shapes_of_the_spec(
        self, config: GeneratorConfig, rank: int, n_adapters: int, n_prompts: int
    ) -> None:
        spec = make_spec(rank)
        batch = self.make(config, spec).generate(random_conditions(n_adapters, n_prompts))
        assert {n: tuple(t.shape) for n, t in batch.a.items()} == {
            m.name: (n_adapters, rank, m.n_in) for m in spec.modules
        }
        assert {n: tuple(t.shape) for n, t in batch.b.items()} == {
            m.name: (n_adapters, m.n_out, rank) for m in spec.modules
        }

    def test_generate_undoes_the_standardisation(self, config: GeneratorConfig) -> None:
        spec, generator = make_spec(), self.make(config).eval()
        wanted = generator.standardiser.decode(generator(random_conditions()))
        torch.testing.assert_close(generator.generate(random_conditions()).flatten(spec), wanted)

    def test_same_seed_same_weights_and_no_trace_in_the_global_stream(
        self, config: GeneratorConfig
    ) -> None:
        torch.manual_seed(3)
        wanted = torch.rand(3)
        torch.manual_seed(3)
        first, again, other = self.make(config), self.make(config), self.make(config, seed=1)
        assert torch.equal(torch.rand(3), wanted)
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in first.state_dict().items())
        assert any(
            not torch.equal(p, q)
            for p, q in zip(first.parameters(), other.parameters(), strict=True)
        )

    @pytest.mark.parametrize(
        "shape", [(3, 4, WIDTH + 1), (3, 4, WIDTH - 1), (4, WIDTH), (1, 3, 2, 4, WIDTH)]
    )
    def test_refuses_conditions_of_another_width_or_rank(
        self, config: GeneratorConfig, shape: tuple[int, ...]
    ) -> None:
        with pytest.raises(ValueError, match=f"needed.*{WIDTH}"):
            self.make(config).generate(torch.randn(shape))

    def test_refuses_conditions_that_hold_nothing_or_nan(self, config: GeneratorConfig) -> None:
        poisoned = random_conditions()
        poisoned[1, 2, 3] = float("nan")
        for condition in (torch.zeros(2, 0, WIDTH), torch.zeros(0, 3, WIDTH), poisoned):
            with pytest.raises(ValueError, match="no prompt, or NaN"):
                self.make(config).generate(condition)

    def test_padding_is_left_out_of_account(self, config: GeneratorConfig) -> None:
        """Rows of NaN behind prompts and behind tokens; each adapter of the batch has another number of them."""
        generator, spec = self.make(config), make_spec()
        states = random_conditions(3, 4 * 2, seed=2).unflatten(1, (4, 2))
        counts = [(4, (2, 1, 2, 2)), (1, (1,)), (3, (2, 2, 1))]
        padded, alone = torch.full_like(states, torch.nan), []
        for row, (n_prompts, n_tokens) in enumerate(counts):
            own = torch.full_like(states[row, :n_prompts], torch.nan)
            for prompt, count in enumerate(n_tokens):
                own[prompt, :count] = states[row, prompt, :count]
            padded[row, :n_prompts] = own
            alone.append(generator.generate(own[None, :, : max(n_tokens)]).flatten(spec))
        torch.testing.assert_close(
            generator.generate(padded).flatten(spec), torch.cat(alone), atol=1e-5, rtol=1e-5
        )
        assert not torch.allclose(generator.generate(states).flatten(spec), torch.cat(alone))

    def test_one_token_a_prompt_is_one_vector_a_prompt(self, config: GeneratorConfig) -> None:
        generator, condition = self.make(config), random_conditions()
        assert torch.equal(
            generator.generate(condition[:, :, None]).flatten(make_spec()),
            generator.generate(condition).flatten(make_spec()),
        )

    def test_a_row_that_is_in_part_nan_is_no_padding(self, config: GeneratorConfig) -> None:
        states = random_conditions()[:, :, None].repeat(1, 1, 2, 1)
        states[0, 1, 1, 2] = torch.nan
        with pytest.raises(ValueError, match="no prompt, or NaN"):
            self.make(config).generate(states)

    def test_order_of_the_prompts_does_not_matter(self, config: GeneratorConfig) -> None:
        generator, condition = self.make(config).eval(), random_conditions(2, 5)
        for seed in range(3):
            order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(
                generator(condition[:, order]), generator(condition), atol=1e-5, rtol=1e-5
            )

    def test_a_batch_gives_what_single_calls_give(self, config: GeneratorConfig) -> None:
        generator, condition, spec = self.make(config), random_conditions(4), make_spec()
        alone = torch.cat([generator.generate(one[None]).flatten(spec) for one in condition])
        torch.testing.assert_close(
            generator.generate(condition).flatten(spec), alone, atol=1e-5, rtol=1e-5
        )
        assert all((alone[i] - alone[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))

    def test_every_prompt_gets_a_gradient(self, config: GeneratorConfig) -> None:
        generator, condition = self.make(config), random_conditions().requires_grad_()
        tokens = generator(condition)
        (tokens * torch.randn_like(tokens)).sum().backward()
        assert condition.grad is not None and torch.isfinite(condition.grad).all()
        assert (condition.grad.norm(dim=-1) > 0).all()

    def test_every_parameter_gets_a_gradient(self, config: GeneratorConfig) -> None:
        generator, rows = self.make(config), random_rows(make_spec())
        tokens, penalties = generator.training_forward(training_batch(generator, rows))
        assert penalties.keys() == generator.penalties.keys()
        values = generator.to_lora(tokens).flatten(make_spec())
        (values * torch.randn_like(values)).sum().add(sum(penalties.values())).backward()
        dead = [
            n
            for n, p in generator.named_parameters()
            if p.grad is None or not p.grad.abs().sum() > 0
        ]
        assert not dead
        assert all(
            torch.isfinite(p.grad).all() for p in generator.parameters() if p.grad is not None
        )

    def test_a_training_batch_gives_the_same_twice_and_leaves_the_global_stream_alone(
        self, config: GeneratorConfig
    ) -> None:
        """Without dropout: a resumed training must see what an unbroken one sees."""
        generator, rows = self.make(replace(config, dropout=0.0)), random_rows(make_spec())
        batch, before = training_batch(generator, rows), torch.get_rng_state()
        (first, own), (again, twice) = (generator.training_forward(batch) for _ in range(2))
        assert torch.equal(first, again) and own == twice
        assert torch.equal(torch.get_rng_state(), before)

    def test_learns_one_adapter_for_each_condition(self, config: GeneratorConfig) -> None:
        generator, condition = self.make(config), random_conditions(2)
        noise = torch.randn(2, make_spec().n_values, generator=torch.Generator().manual_seed(4))
        wanted = generator.standardiser.encode(random_statistics(make_spec()).decode(noise))
        real = ~wanted.isnan()
        optimizer = torch.optim.Adam(generator.parameters(), lr=3e-3)
        for _ in range(150):
            loss = (generator(condition) - wanted)[real].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        learned = generator.eval()(condition)  # without the noise of dropout
        loss = (learned - wanted)[real].square().mean()
        assert loss.item() < 0.02 * wanted[real].square().mean().item()

    def test_survives_a_round_trip_through_the_disk(
        self, config: GeneratorConfig, tmp_path: Path
    ) -> None:
        generator, spec = self.make(config, seed=5), make_spec()
        save_generator(tmp_path, generator, config, {"note": "kept"})
        loaded, facts = load_generator(tmp_path)
        assert facts["note"] == "kept" and loaded.spec == spec
        condition = random_conditions()
        assert torch.equal(
            loaded.generate(condition).flatten(spec), generator.generate(condition).flatten(spec)
        )

    def test_generate_leaves_input_and_mode_alone_and_carries_no_gradient(
        self, config: GeneratorConfig
    ) -> None:
        generator, condition = self.make(config).train(), random_conditions()
        kept = condition.clone()
        first, again = (generator.generate(condition).flatten(make_spec()) for _ in range(2))
        assert torch.equal(condition, kept) and generator.training
        assert torch.equal(first, again) and not first.requires_grad


def random_pair(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=noise), torch.randn(shape, generator=noise)


class LossContract:
    """The subclass gives the fixture `loss` and `masked`: the loss over the vectors where `keep` is true."""

    def masked(self, loss: Loss, pred: Tensor, teacher: Tensor, keep: Tensor) -> Tensor:
        raise NotImplementedError

    @pytest.mark.parametrize("shape", [(1, 2), (4, 7), (2, 3, 4, 5)])
    def test_is_zero_for_equal_inputs_and_positive_for_others(
        self, loss: Loss, shape: tuple[int, ...]
    ) -> None:
        pred, teacher = random_pair(shape, seed=len(shape))
        assert loss(teacher, teacher).shape == ()
        assert abs(loss(teacher, teacher).item()) < 1e-6
        assert loss(pred, teacher).item() > 1e-3
        assert loss(-teacher, teacher).item() > 1e-3

    def test_gradient_is_there_and_points_down(self, loss: Loss) -> None:
        pred, teacher = random_pair((3, 5), seed=1)
        pred.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(pred, teacher), pred)
        assert (gradient.norm(dim=-1) > 1e-6).all() and torch.isfinite(gradient).all()
        assert loss(pred - 0.01 * gradient / gradient.norm(), teacher) < loss(pred, teacher)

    def test_gradient_agrees_with_finite_differences(self, loss: Loss) -> None:
        pred, teacher = (t.double() for t in random_pair((2, 4), seed=2))
        assert torch.autograd.gradcheck(lambda p: loss(p, teacher), (pred.requires_grad_(),))

    def test_gradient_is_finite_where_the_prediction_is_zero(self, loss: Loss) -> None:
        pred, teacher = torch.zeros(2, 4, requires_grad=True), random_pair((2, 4), seed=3)[1]
        (gradient,) = torch.autograd.grad(loss(pred, teacher), pred)
        assert torch.isfinite(gradient).all()

    @pytest.mark.parametrize(
        "shapes", [((2, 3), (3, 2)), ((2, 1, 4), (2, 3, 4)), ((1, 4), (2, 4)), ((4,), (1, 4))]
    )
    def test_refuses_other_shapes_even_those_that_broadcast(
        self, loss: Loss, shapes: tuple[tuple[int, ...], tuple[int, ...]]
    ) -> None:
        with pytest.raises(ValueError, match="shape"):
            loss(torch.randn(shapes[0]), torch.randn(shapes[1]))

    @pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 5)])
    def test_refuses_an_empty_batch(self, loss: Loss, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="empty"):
            loss(torch.zeros(shape), torch.zeros(shape))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_refuses_a_prediction_that_is_not_finite(self, loss: Loss, value: float) -> None:
        pred, teacher = random_pair((2, 4), seed=4)
        pred[1, 2] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            loss(pred, teacher)

    def test_refuses_what_is_no_tensor(self, loss: Loss) -> None:
        for pair in ((None, torch.ones(2, 2)), (torch.ones(2, 2), None), (None, None)):
            with pytest.raises(ValueError, match="needs a prediction and a teacher"):
                loss(*pair)

    def test_padding_changes_neither_value_nor_gradient(self, loss: Loss) -> None:
        pred, teacher = random_pair((4, 5), seed=5)
        keep = torch.tensor([True, False, True, False])
        pred[1], pred[3] = 1e9, float("nan")
        pred.requires_grad_()
        value = self.masked(loss, pred, teacher, keep)
        torch.testing.assert_close(value, loss(pred[keep], teacher[keep]))
        (gradient,) = torch.autograd.grad(value, pred)
        assert (gradient[~keep] == 0).all() and (gradient[keep].norm(dim=-1) > 1e-6).all()

    def test_refuses_a_target_that_is_all_padding(self, loss: Loss) -> None:
        with pytest.raises(ValueError, match="padding"):
            self.masked(loss, *random_pair((3, 4), seed=6), torch.zeros(3, dtype=torch.bool))
