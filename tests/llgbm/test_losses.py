from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from contracts import Loss, LossContract, make_spec, random_pair
from helpers import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from llgbm.lora import LoraBatch, LoraSpec
from llgbm.lora.geometry import delta_w_error, delta_w_inner
from llgbm.losses import DELTA_LOSSES, DeltaOnlyLoss, MultiTaskLoss, delta_loss, weight_loss
from llgbm.runtime import UserError
from llgbm.training import TrainingConfig

GOLDEN = SHARED / "goldens" / "losses.safetensors"
NAN = float("nan")


class TestDeltaLosses(LossContract):
    @pytest.fixture(params=sorted(DELTA_LOSSES))
    def loss(self, request: pytest.FixtureRequest) -> Loss:
        def named(pred: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
            return delta_loss(request.param, pred, teacher, valid)

        return named

    def masked(
        self, loss: Callable[..., Tensor], pred: Tensor, teacher: Tensor, keep: Tensor
    ) -> Tensor:
        return loss(pred, teacher, keep)

    def test_refuses_a_teacher_that_is_not_finite(self, loss: Loss) -> None:
        for value in (NAN, math.inf):
            with pytest.raises(ValueError, match="teacher's delta holds NaN or infinite"):
                loss(torch.ones(2, 3), torch.full((2, 3), value))

    @pytest.mark.parametrize("shape", [(3,), (2, 1), (2, 3, 4), ()])
    def test_refuses_a_mask_of_another_shape(
        self, loss: Callable[..., Tensor], shape: tuple[int, ...]
    ) -> None:
        with pytest.raises(ValueError, match="`valid` has shape"):
            loss(*random_pair((2, 3, 4), seed=0), torch.ones(shape, dtype=torch.bool))

    def test_refuses_a_mask_of_numbers_which_would_index(self, loss: Callable[..., Tensor]) -> None:
        with pytest.raises(ValueError, match="of torch.int64, needed: .* of bool"):
            loss(*random_pair((2, 3, 4), seed=0), torch.ones(2, 3, dtype=torch.long))


@pytest.mark.parametrize("kind", sorted(set(DELTA_LOSSES) - {"mse_raw"}))
def test_a_teacher_that_changes_nothing_has_no_direction(kind: str) -> None:
    pred, teacher = random_pair((2, 3, 4), seed=0)
    teacher[1, 2] = 0
    with pytest.raises(ValueError, match="teacher's delta is zero"):
        delta_loss(kind, pred, teacher)


class TestWeightLoss(LossContract):
    @pytest.fixture
    def loss(self) -> Loss:
        return weight_loss

    def masked(self, loss: Loss, pred: Tensor, teacher: Tensor, keep: Tensor) -> Tensor:
        return loss(pred, teacher.masked_fill(~keep[:, None], NAN))

    def test_is_the_mean_over_what_is_no_padding(self, loss: Loss) -> None:
        pred, teacher = (
            torch.tensor([[1.0, 5.0], [2.0, 7.0]]),
            torch.tensor([[0.0, NAN], [4.0, NAN]]),
        )
        assert loss(pred, teacher).item() == pytest.approx((1 + 4) / 2)


@given(cosine=st.floats(-0.99, 0.99), norm=st.floats(0.1, 10), width=st.integers(2, 64))
@settings(max_examples=40, deadline=None)
def test_delta_losses_have_their_closed_forms(cosine: float, norm: float, width: int) -> None:
    teacher, pred = (
        torch.zeros(1, width, dtype=torch.double),
        torch.zeros(1, width, dtype=torch.double),
    )
    teacher[0, 0] = 2.0
    pred[0, 0], pred[0, 1] = 2 * norm * cosine, 2 * norm * math.sqrt(1 - cosine**2)
    wanted = {
        "mse": 2 * (1 - cosine) / width,
        "mse_raw": ((2 * norm * cosine - 2) ** 2 + 4 * norm**2 * (1 - cosine**2)) / width,
        "cosine": 1 - cosine,
        "cosine_norm": 1 - cosine + (norm - 1) ** 2,
    }
    assert wanted.keys() == DELTA_LOSSES.keys()
    for kind, value in wanted.items():
        assert delta_loss(kind, pred, teacher).item() == pytest.approx(value, rel=1e-5, abs=1e-7), (
            kind
        )


def random_batch(spec: LoraSpec, n_adapters: int, seed: int) -> LoraBatch:
    return LoraBatch.unflatten(
        spec, torch.randn(n_adapters, spec.n_values, generator=torch.Generator().manual_seed(seed))
    )


def explicit(batch: LoraBatch) -> Tensor:
    """[A, everything]: every ΔW of every module, formed and laid end to end."""
    products = [(batch.b[name].double() @ batch.a[name].double()).flatten(1) for name in batch.a]
    return torch.cat(products, dim=1)


@given(
    rank=st.integers(1, 4),
    n_left=st.integers(1, 3),
    n_right=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_inner_products_are_those_of_the_formed_matrices(
    rank: int, n_left: int, n_right: int, seed: int
) -> None:
    left, right = (
        random_batch(make_spec(rank), n_left, seed),
        random_batch(make_spec(rank), n_right, seed + 100),
    )
    wanted = explicit(left) @ explicit(right).T
    torch.testing.assert_close(delta_w_inner(left, right).double(), wanted, atol=1e-3, rtol=1e-4)


@given(rank=st.integers(1, 4), seed=st.integers(0, 99), closeness=st.sampled_from([0.0, 0.5, 0.98]))
@settings(max_examples=25, deadline=None)
def test_relative_error_is_that_of_the_formed_matrices(
    rank: int, seed: int, closeness: float
) -> None:
    spec = make_spec(rank)
    teacher, noise = random_batch(spec, 3, seed), random_batch(spec, 3, seed + 100)
    pred = LoraBatch.unflatten(
        spec, closeness * teacher.flatten(spec) + (1 - closeness) * noise.flatten(spec)
    )
    wanted = (explicit(pred) - explicit(teacher)).norm(dim=1) / explicit(teacher).norm(dim=1)
    torch.testing.assert_close(delta_w_error(pred, teacher).double(), wanted, atol=1e-4, rtol=1e-3)


def test_relative_error_is_free_of_the_gauge_and_one_for_no_adapter() -> None:
    teacher = random_batch(make_spec(3), 2, seed=0)
    turn = torch.randn(3, 3, generator=torch.Generator().manual_seed(9)) + 2 * torch.eye(3)
    turned = LoraBatch(
        {n: torch.linalg.inv(turn) @ a for n, a in teacher.a.items()},
        {n: b @ turn for n, b in teacher.b.items()},
    )
    nothing = LoraBatch(teacher.a, {n: torch.zeros_like(b) for n, b in teacher.b.items()})
    torch.testing.assert_close(delta_w_error(turned, teacher), torch.zeros(2), atol=3e-3, rtol=0)
    torch.testing.assert_close(delta_w_error(nothing, teacher), torch.ones(2))


def test_relative_error_refuses_adapters_of_another_base_or_number() -> None:
    teacher = random_batch(make_spec(), 2, seed=0)
    first = next(iter(teacher.a))
    other = LoraBatch({first: teacher.a[first]}, {first: teacher.b[first]})
    for wrong in (other, teacher.select([0])):
        with pytest.raises(ValueError, match="differ in modules or in number"):
            delta_w_error(wrong, teacher)
    for pair in ((other, teacher), (teacher, other)):
        with pytest.raises(ValueError, match="different modules"):
            delta_w_inner(*pair)


@pytest.mark.parametrize(
    "make", [MultiTaskLoss, lambda w, d: TrainingConfig(lambda_weight=w, lambda_delta=d)]
)
@pytest.mark.parametrize(
    "weights", [(-0.1, 1.0), (1.0, -1e-9), (0.0, 0.0), (NAN, 1.0), (1.0, math.inf)]
)
def test_impossible_lambdas_are_a_users_mistake(
    make: Callable[[float, float], object], weights: tuple[float, float]
) -> None:
    with pytest.raises(UserError, match="lambda_"):
        make(*weights)


def test_unknown_kind_is_answered_with_the_known_ones() -> None:
    for make in (lambda: MultiTaskLoss(loss_type="l7"), lambda: TrainingConfig(delta_loss="l7")):
        with pytest.raises(UserError, match="'l7'; there are: mse"):
            make()
    with pytest.raises(UserError, match="'l7'; there are: mse"):
        delta_loss("l7", torch.ones(1, 2), torch.ones(1, 2))


@given(
    weight=st.floats(0.01, 10),
    delta=st.floats(0.01, 10),
    kind=st.sampled_from(sorted(DELTA_LOSSES)),
)
@settings(max_examples=25, deadline=None)
def test_total_is_the_weighted_sum_of_its_terms(weight: float, delta: float, kind: str) -> None:
    tokens, deltas = random_pair((3, 8), seed=1), random_pair((3, 2, 5), seed=2)
    terms = MultiTaskLoss(weight, delta, kind)(*deltas, *tokens)
    assert terms.keys() == {"loss", "loss_weight", "loss_delta"}
    assert terms["loss_weight"].item() == pytest.approx(weight_loss(*tokens).item())
    assert terms["loss_delta"].item() == pytest.approx(delta_loss(kind, *deltas).item())
    wanted = weight * terms["loss_weight"].item() + delta * terms["loss_delta"].item()
    assert terms["loss"].item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("weight", "delta", "used"), [(1.0, 0.0, "tokens"), (0.0, 1.0, "delta")])
@pytest.mark.parametrize("broken", [None, torch.full((2, 3), NAN), torch.ones(7, 1)])
def test_a_term_whose_lambda_is_zero_is_not_computed(
    weight: float, delta: float, used: str, broken: Tensor | None
) -> None:
    unused = "delta" if used == "tokens" else "tokens"
    pred, teacher = random_pair((3, 4), seed=0)
    terms = MultiTaskLoss(weight, delta)(
        **{
            f"{used}_pred": pred,
            f"{used}_teacher": teacher,
            f"{unused}_pred": broken,
            f"{unused}_teacher": pred,
        }
    )
    assert terms.keys() == {"loss", "loss_weight" if used == "tokens" else "loss_delta"}
    assert terms["loss"].item() > 0


@pytest.mark.parametrize(
    "missing", ["delta_pred", "delta_teacher", "tokens_pred", "tokens_teacher"]
)
def test_a_missing_input_is_never_a_loss_of_zero(missing: str) -> None:
    inputs = dict.fromkeys(
        ("delta_pred", "delta_teacher", "tokens_pred", "tokens_teacher"), torch.ones(2, 3)
    )
    with pytest.raises(ValueError, match=f"weight above 0 but no.*{missing}"):
        MultiTaskLoss()(**{**inputs, missing: None})


def test_losses_give_the_golden_numbers() -> None:
    if not GOLDEN.is_file():
        pytest.skip("no golden losses.safetensors beside the repository")
    with safe_open(GOLDEN, "pt") as stream:
        given_ = {key: stream.get_tensor(key) for key in stream.keys()}
        wanted = json.loads(stream.metadata()["expected"])
    deltas = {"delta_pred": given_["delta_pred"], "delta_teacher": given_["delta_teacher"]}
    tokens = {"tokens_pred": given_["tokens_pred"], "tokens_teacher": given_["tokens_teacher"]}
    got = {
        "multitask_w1_d0.1": MultiTaskLoss(1.0, 0.1)(**deltas, **tokens)["loss"],
        "delta_only_mse_normalize_True": DeltaOnlyLoss(normalize=True)(**deltas),
        "delta_only_mse_normalize_False": DeltaOnlyLoss(normalize=False)(**deltas),
        "delta_only_cosine": DeltaOnlyLoss(loss_type="cosine")(**deltas),
    }
    for name, value in got.items():
        expected = wanted[name]["loss"] if isinstance(wanted[name], dict) else wanted[name]
        assert value.item() == pytest.approx(expected, rel=1e-5), name
