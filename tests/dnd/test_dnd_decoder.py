"""The decoder of `dnd`: parity with stored values and with a plain implementation, checkpoints, loss, refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from dnd.errors import DndError
from dnd.model.decoderonly import (
    HyperConvDecoder,
    HyperConvDecoderModel,
    HyperConvDecoderModel_SuperLarge,
    load_checkpoint,
    trained_state,
    weighted_token_mse,
)
from helpers import SHARED
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FEATURES = [(3, 5, 4), (2, 6, 7), (2, 6, 7), (5, 4, 8)]
CONFIG = {"features": FEATURES, "condition_dim": FEATURES[0], "kernel_size": 3}
N_TOKENS = FEATURES[-1][0]


def make_model() -> HyperConvDecoderModel:
    return HyperConvDecoderModel(CONFIG, torch.linspace(0.5, 2, N_TOKENS))


def plain_conv(image_chw: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """ "Same" convolution of one image, one kernel position at a time."""
    k, (_, height, width) = kernel.shape[-1], image_chw.shape
    low = (k - 1) // 2
    padded = torch.zeros(image_chw.shape[0], height + k - 1, width + k - 1, dtype=image_chw.dtype)
    padded[:, low : low + height, low : low + width] = image_chw
    out = torch.zeros(kernel.shape[0], height, width, dtype=image_chw.dtype)
    for i in range(k):
        for j in range(k):
            out += torch.einsum(
                "oc,chw->ohw", kernel[:, :, i, j], padded[:, i : i + height, j : j + width]
            )
    return out if bias is None else out + bias[:, None, None]


def plain_layer(x_nlc: Tensor, state: dict[str, Tensor]) -> Tensor:
    """One layer on one sample, axis by axis as the formulas say."""
    centred = x_nlc - x_nlc.mean((1, 2), keepdim=True)
    spread = (centred.square().mean((1, 2), keepdim=True) + 1e-5).sqrt()
    x = centred / spread * state["linear1.norm.weight"] + state["linear1.norm.bias"]

    def over_c(y: Tensor, kernel: Tensor) -> Tensor:  # plane (L, N)
        return plain_conv(y.permute(2, 1, 0), kernel).permute(2, 1, 0)

    def over_l(y: Tensor, kernel: Tensor) -> Tensor:  # plane (N, C)
        return plain_conv(y.permute(1, 0, 2), kernel).permute(1, 0, 2)

    first = over_l(over_c(x, state["linear1.conv1w.weight"]), state["linear1.conv1h.weight"])
    second = over_c(
        over_l(x, state["linear1.conv2h.weight"]), state["linear1.conv2w.weight"]
    ).tanh()
    mixed = (first + second + state["linear1.bias"]) / 3
    return plain_conv(mixed, state["linear2.weight"], state["linear2.bias"])


def plain_decoder(x_nlc: Tensor, state: dict[str, Tensor], n_layers: int) -> Tensor:
    for index in range(n_layers):
        prefix = f"decoder.module_list.{index}."
        y = plain_layer(
            x_nlc, {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        )
        x_nlc = x_nlc + y if x_nlc.shape == y.shape else y
    return x_nlc


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 5])
def test_decoder_equals_a_plain_implementation(kernel_size: int) -> None:
    torch.manual_seed(0)
    model = HyperConvDecoder(FEATURES, FEATURES[0], kernel_size).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, *FEATURES[0], dtype=torch.float64)
    kept = x.clone()
    wanted = torch.stack([plain_decoder(one, model.state_dict(), len(FEATURES) - 1) for one in x])
    torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)
    assert torch.equal(x, kept), "the input was changed in place"


def test_decoder_equals_the_stored_values() -> None:
    file = SHARED / "goldens" / "hyperconv_decoder.safetensors"
    if not file.is_file():
        pytest.skip("../shared/goldens is absent: no stored decoder output to compare with")
    with safe_open(file, "pt") as stored:
        tensors = {k: stored.get_tensor(k) for k in stored.keys()}
        facts = stored.metadata()
    features = json.loads(facts["features"])
    model = HyperConvDecoder(features, features[0], int(facts["kernel_size"]))
    model.load_state_dict(
        {k[6:]: v for k, v in tensors.items() if k.startswith("state.")}, strict=True
    )
    torch.testing.assert_close(model(tensors["input"]), tensors["output"], rtol=0, atol=1e-5)


def test_gradients_reach_every_weight_and_are_right() -> None:
    torch.manual_seed(0)
    model = HyperConvDecoder([(2, 3, 2), (2, 3, 2), (1, 2, 3)], (2, 3, 2), 3).double()
    x = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (x,))
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_loss_is_the_weighted_mean_over_what_is_no_padding() -> None:
    target = torch.tensor([[[[1.0, float("nan")]], [[2.0, 3.0]]]])
    tokens = torch.zeros(1, 2, 1, 2, requires_grad=True)
    kept = target.clone()
    loss = weighted_token_mse(tokens, target, torch.tensor([3.0, 0.5]))
    assert loss.item() == pytest.approx((3 * 1 + 0.5 * 4 + 0.5 * 9) / 3)
    loss.backward()
    torch.testing.assert_close(tokens.grad, torch.tensor([[[[-2.0, 0.0]], [[-2 / 3, -1.0]]]]))
    assert torch.equal(target.isnan(), kept.isnan()) and torch.equal(
        target.nan_to_num(), kept.nan_to_num()
    )


def test_loss_leaves_out_what_the_mask_leaves_out() -> None:
    target = torch.tensor([[[[1.0, 5.0]]]])
    loss = weighted_token_mse(
        torch.zeros_like(target), target, torch.ones(1), torch.tensor([[[[True, False]]]])
    )
    assert loss.item() == 1.0


@pytest.mark.parametrize(
    ("tokens", "target", "weight", "message"),
    [
        (
            torch.zeros(1, 2, 2, 2),
            torch.full((1, 2, 2, 2), float("nan")),
            torch.ones(2),
            "nothing but padding",
        ),
        (
            torch.full((1, 2, 2, 2), float("nan")),
            torch.zeros(1, 2, 2, 2),
            torch.ones(2),
            "prediction holds NaN",
        ),
        (torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 3), torch.ones(2), "must agree"),
        (torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2), torch.ones(3), "one weight a token"),
    ],
)
def test_loss_cannot_be_nothing(
    tokens: Tensor, target: Tensor, weight: Tensor, message: str
) -> None:
    with pytest.raises(DndError, match=message):
        weighted_token_mse(tokens, target, weight)


def test_long_prompts_are_shortened_along_the_text() -> None:
    torch.manual_seed(0)
    model = HyperConvDecoderModel_SuperLarge(
        CONFIG, torch.ones(N_TOKENS), max_length=11, modified_length=5
    )
    features = torch.randn(2, 3, 11, 4)
    first = (
        torch.einsum("bnlc,ml->bnmc", features, model.down_proj.weight)
        + model.down_proj.bias[:, None]
    )
    second = torch.einsum("bnlc,ml->bnmc", first * first.sigmoid(), model.gate_proj.weight)
    short = second + model.gate_proj.bias[:, None]
    torch.testing.assert_close(model.generate(features), model.model(short))
    with pytest.raises(DndError, match="length of 5, 11 is needed"):
        model.generate(features[:, :, :5])


def test_the_extractor_is_frozen_and_not_in_a_checkpoint() -> None:
    extractor = torch.nn.Linear(4, 4)
    model = HyperConvDecoderModel(CONFIG, torch.ones(N_TOKENS), extractor)
    model(torch.randn(1, *FEATURES[0]), torch.randn(1, *FEATURES[-1])).backward()
    assert all(p.grad is None for p in extractor.parameters())
    assert "criterion_weight" in trained_state(model)
    assert not any(name.startswith("condition_module") for name in trained_state(model))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_checkpoint_loads_into_a_fresh_model(tmp_path: Path, suffix: str) -> None:
    trained, path = make_model(), tmp_path / f"model{suffix}"
    state = {k: v.contiguous() for k, v in trained_state(trained).items()}
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    extractor = torch.nn.Linear(4, 4)
    fresh = HyperConvDecoderModel(CONFIG, torch.ones(N_TOKENS), extractor)
    load_checkpoint(fresh, path)
    x = extractor(torch.randn(1, *FEATURES[0]))
    torch.testing.assert_close(fresh.model(x), trained.model(x), rtol=0, atol=0)
    assert torch.equal(fresh.criterion_weight, trained.criterion_weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.decoder.module_list.0.linear1.bias"), "1 names are missing"),
        (lambda s: s.update(surplus=torch.zeros(1)), "1 are not known"),
        (lambda s: s.update({"criterion_weight": torch.zeros(1, 2, 1, 1)}), "has shape"),
        (lambda s: s.update(surplus="text"), "no state dict"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, change, message: str) -> None:
    model, path = make_model(), tmp_path / "model.pth"
    state = trained_state(model)
    change(state)
    torch.save(state, path)
    before = trained_state(make_model())
    fresh = make_model()
    fresh.load_state_dict(before)
    with pytest.raises(DndError, match=message):
        load_checkpoint(fresh, path)
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())


class Planted:
    """An object whose unpickling makes a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    path, mark = tmp_path / "model.pth", tmp_path / "ran"
    torch.save({"weight": Planted(str(mark))}, path)
    with pytest.raises(DndError, match="code besides tensors"):
        load_checkpoint(make_model(), path)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_a_torn_or_missing_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DndError, match="does not exist"):
        load_checkpoint(make_model(), tmp_path / name)
    (tmp_path / name).write_bytes(b"PK\x03\x04 no weights")
    with pytest.raises(DndError, match="is torn"):
        load_checkpoint(make_model(), tmp_path / name)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(DndError, match="the condition's"):
        HyperConvDecoder(FEATURES, (3, 5, 5), 3)
    with pytest.raises(DndError, match="kernel size"):
        HyperConvDecoder(FEATURES, FEATURES[0], 0)
    with pytest.raises(DndError, match="another number of prompts"):
        make_model().generate(torch.zeros(1, 4, 5, 4))
    with pytest.raises(DndError, match="another model size"):
        HyperConvDecoderModel(CONFIG, torch.ones(N_TOKENS + 1))
    with pytest.raises(DndError, match="make the two equal"):
        HyperConvDecoderModel_SuperLarge(
            CONFIG, torch.ones(N_TOKENS), max_length=11, modified_length=6
        )
