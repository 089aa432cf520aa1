"""Muon, beside the singular values that its iteration acts on and beside torch's own; who steps what in pretraining."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llgbm.models.load import Base
from llgbm.models.muon import QUINTIC, Muon, orthogonalise
from llgbm.models.pretrain import PretrainConfig, make_optimizers, rate_at


def by_singular_values(m_RC: Tensor, iterations: int) -> Tensor:
    """Apply the quintic polynomial to the singular values, again and again."""
    u, s, vh = torch.linalg.svd(m_RC, full_matrices=False)
    s = s / (s.square().sum().sqrt() + 1e-7)
    a, b, c = QUINTIC
    for _ in range(iterations):
        s = a * s + b * s**3 + c * s**5
    return u * s @ vh


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("iterations", [1, 3, 5])
def test_the_iteration_acts_on_singular_values(shape: tuple[int, int], iterations: int) -> None:
    m_KRC = torch.randn(3, *shape, dtype=torch.float64)
    found = orthogonalise(m_KRC, iterations)
    expected = torch.stack([by_singular_values(m, iterations) for m in m_KRC])
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
def test_steps_are_those_of_torch_but_for_its_bfloat16(shape: tuple[int, int]) -> None:
    start, grads = torch.randn(shape), torch.randn(4, *shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    own = Muon([ours, nn.Parameter(start.clone())], 0.1, momentum=0.9, weight_decay=0.1)
    other = torch.optim.Muon(
        [theirs], 0.1, momentum=0.9, weight_decay=0.1, ns_steps=3, adjust_lr_fn="original"
    )
    for grad in grads:
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        own.step()
        other.step()
    assert (ours - theirs).norm() < 0.02 * (ours - start).norm()


def test_a_closure_gives_the_loss_and_the_gradient() -> None:
    weight = nn.Parameter(torch.eye(2))

    def closure() -> Tensor:
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert Muon([weight], 0.1).step(closure) == 2.0
    assert not torch.equal(weight, torch.eye(2))


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="matrices only"):
        Muon([nn.Parameter(torch.zeros(3))], 0.1)


def test_every_weight_is_stepped_once_and_embeddings_by_adamw(tiny_base: Base) -> None:
    muon, adamw = make_optimizers(tiny_base.model, PretrainConfig())
    stepped = [[p for g in own.param_groups for p in g["params"]] for own in (muon, adamw)]
    assert sorted(map(id, sum(stepped, []))) == sorted(map(id, tiny_base.model.parameters()))
    names = {id(p): name for name, p in tiny_base.model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in stepped[0]} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }


def test_rates_are_a_trapezoid() -> None:
    found = [rate_at(step, 100) for step in range(101)]
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[5:61] == [1.0] * 56
    assert found[80] == pytest.approx(0.5) and found[100] == 0.0
