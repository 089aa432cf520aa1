"""Hold adapters, deltas and losses to reference values that `tests/make_goldens.py` computed without this code."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from safetensors import safe_open
from torch import Tensor
from torch.func import functional_call
from transformers import Qwen2Config, Qwen2ForCausalLM

from llgbm.delta import EncodedProbes, mean_over_probes, read_states
from llgbm.functional import FunctionalLoRA, compute_delta_differentiable
from llgbm.lora import LoraBatch
from llgbm.lora.geometry import delta_w_error, delta_w_inner, update_products
from llgbm.losses import DELTA_LOSSES, delta_loss
from llgbm.terms.kl import KL
from llgbm.training import DeltaOnlyLoss, MultiTaskLoss

FOLDER = ROOT / "tests" / "data" / "goldens"
RANK, ALPHA, TEMPERATURE = 3, 6.0, 2.0
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
Tensors = dict[str, Tensor]


def read(name: str) -> tuple[Tensors, Mapping[str, str]]:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        names = file.keys()  # the file itself cannot be looped over
        return {name: file.get_tensor(name) for name in names}, file.metadata()


def below(found: Tensors, prefix: str) -> Tensors:
    return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def adapters() -> Tensors:
    return read("adapters")[0]


@pytest.fixture(scope="module")
def lora_model(adapters: Tensors) -> FunctionalLoRA:
    shape = json.loads(read("adapters")[1]["shape"])
    base = Qwen2ForCausalLM(Qwen2Config(**shape)).float().eval()
    base.load_state_dict(below(adapters, "base."), strict=False)
    assert torch.equal(base.lm_head.weight, adapters["base.model.embed_tokens.weight"])
    return FunctionalLoRA(base, RANK, ALPHA)


@pytest.fixture
def batch(adapters: Tensors) -> LoraBatch:
    return LoraBatch.from_state_dicts([below(adapters, f"{index}.lora.") for index in range(2)])


@pytest.fixture(scope="module")
def probes(adapters: Tensors) -> EncodedProbes:
    """The texts, marked at their last tokens, for both adapters."""
    mask = adapters["mask"]
    positions = (mask.sum(-1) - 1)[None, :, None].expand(2, -1, -1)
    ids = adapters["ids"].expand(2, -1, -1)
    return EncodedProbes(ids, positions, torch.ones_like(positions, dtype=torch.bool))


def test_logits_are_those_of_peft(
    lora_model: FunctionalLoRA, batch: LoraBatch, adapters: Tensors
) -> None:
    ids, mask = adapters["ids"], adapters["mask"]
    with torch.no_grad():
        logits = lora_model.forward_with_lora(batch, ids, mask)
        unpadded = lora_model.forward_with_lora(batch, ids[:1])  # the first text is the longest
    for index, own in enumerate(batch.to_state_dicts()):
        wanted = adapters[f"{index}.logits"]
        torch.testing.assert_close(logits[index][mask.bool()], wanted, **CLOSE)
        torch.testing.assert_close(unpadded[index, 0], wanted[: ids.shape[1]], **CLOSE)
        parameters = lora_model.apply_lora_weights(own)
        merged = functional_call(lora_model.model, parameters, (ids, mask), tie_weights=True)
        torch.testing.assert_close(merged.logits[mask.bool()], wanted, **CLOSE)
    assert (adapters["0.logits"] - adapters["1.logits"]).abs().max() > 0.1


def test_deltas_and_their_gradients_are_those_of_peft(
    lora_model: FunctionalLoRA, batch: LoraBatch, adapters: Tensors, probes: EncodedProbes
) -> None:
    for tensor in (*batch.a.values(), *batch.b.values()):
        tensor.requires_grad_()
    with torch.no_grad():
        base_APQD = read_states(lora_model.model, probes)
    delta_APQD = compute_delta_differentiable(lora_model, batch, probes, base_APQD)
    delta_AD = mean_over_probes(delta_APQD, probes.valid_APQ)
    wanted_AD = torch.stack([adapters[f"{index}.delta"] for index in range(2)])
    torch.testing.assert_close(delta_AD.detach(), wanted_AD, **CLOSE)
    states_APQD = (base_APQD + delta_APQD).detach().squeeze(2)
    torch.testing.assert_close(states_APQD[1], adapters["1.states"], **CLOSE)
    (delta_AD @ adapters["pull"]).sum().backward()
    for name in batch.a:
        for side, tensors in (("A", batch.a), ("B", batch.b)):
            grad = tensors[name].grad
            assert grad is not None
            for index in range(2):
                key = f"{index}.grad.base_model.model.{name}.lora_{side}.weight"
                torch.testing.assert_close(grad[index], adapters[key], **CLOSE)
                assert adapters[key].abs().max() > 1e-3


def test_losses_are_those_of_float64() -> None:
    found, metadata = read("losses")
    expected = json.loads(metadata["expected"])
    pair = found["delta_pred"], found["delta_teacher"]
    for kind in DELTA_LOSSES:
        assert float(delta_loss(kind, *pair)) == pytest.approx(expected[kind], rel=1e-5)
    tokens = found["tokens_pred"], found["tokens_teacher"]
    both = MultiTaskLoss(lambda_weight=1.0, lambda_delta=0.1)(*pair, *tokens)
    wanted = expected["weight"] + 0.1 * expected["mse"]
    assert float(both["loss"]) == pytest.approx(wanted, rel=1e-5)
    alone = DeltaOnlyLoss(normalize=False)(delta_pred=pair[0], delta_teacher=pair[1])
    alone = alone["loss"] if isinstance(alone, dict) else alone
    assert float(alone) == pytest.approx(expected["mse_raw"], rel=1e-5)


def test_divergence_and_its_gradient_are_those_of_kl_div() -> None:
    found, _ = read("losses")
    student = found["student"].clone().requires_grad_()
    divergence = KL(temperature=TEMPERATURE).divergence(student, found["taught"])
    torch.testing.assert_close(divergence.detach().double(), found["kl"], rtol=1e-5, atol=1e-6)
    divergence.sum().backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad.double(), found["kl_grad"], rtol=1e-4, atol=1e-6)


def test_distances_of_updates_are_those_of_formed_ones() -> None:
    found, metadata = read("losses")
    expected = json.loads(metadata["expected"])
    own, teacher = (
        LoraBatch({"m": a}, {"m": b}) for a, b in zip(found["a"], found["b"], strict=True)
    )
    assert float(delta_w_error(own, teacher).mean()) == pytest.approx(
        expected["delta_w_error"], rel=1e-5
    )
    inner = delta_w_inner(own, teacher)
    assert float(inner[0, 2]) == pytest.approx(expected["delta_w_inner_0_2"], rel=1e-4)
    sizes, cross, wanted = update_products(own, teacher)
    relative = ((sizes - 2 * cross + wanted) / wanted).mean()
    assert float(relative) == pytest.approx(expected["delta_w_relative"], rel=1e-5)
    cosine, ratio = cross / (sizes * wanted).sqrt(), (sizes / wanted).sqrt()
    both = (1 - cosine + (ratio - 1).square()).mean()
    assert float(both) == pytest.approx(expected["delta_w_cosine_norm"], rel=1e-5)


def test_the_goldens_are_small_and_their_script_imports_nothing_of_ours() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 100_000
    tree = ast.parse((Path(ROOT) / "tests" / "make_goldens.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    known = {"__future__", "json", "pathlib", "peft", "safetensors.torch"}
    assert names == known | {"torch", "torch.nn", "transformers"}
