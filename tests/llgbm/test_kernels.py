"""Triton kernels: their formulas by Triton's interpreter on the CPU, and on a GPU as compiled (marked `gpu`)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb

from llgbm.dataset import batch_deltas
from llgbm.delta import EncodedProbes
from llgbm.functional import FunctionalLoRA, compute_delta_differentiable
from llgbm.lora import LoraBatch, graphs, kernels, products
from llgbm.lora.apply import adapters_applied, final_hidden

# Triton decides when it is imported whether it interprets, so this file runs itself in a process of its own.
INTERPRET = "TRITON_INTERPRET"
DTYPES = (torch.float32, torch.bfloat16)
Pass = Callable[[FunctionalLoRA, Tensor, EncodedProbes], Tensor]


@pytest.mark.whole
def test_kernels_compute_their_formulas_when_interpreted() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-W", "ignore", str(Path(__file__))]
    done = subprocess.run(
        command, env=os.environ | {INTERPRET: "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["gate", "normalise", "rotate", "pass"]


def close(got: Tensor, wanted: Tensor) -> None:
    """Assert equality as far as the dtype of `got` reaches."""
    tolerance = 1e-5 if got.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got.float(), wanted.float(), rtol=tolerance, atol=tolerance)


def drawn(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(device, dtype)


def check_gate(device: str) -> None:
    """Against torch's silu and autograd, at widths beside the size of a part."""
    for dtype in DTYPES:
        for width in (1, 24, kernels.PART, kernels.PART + 8):
            both = drawn(2, 3, 2 * width, dtype=dtype, device=device)
            g = drawn(2, 3, width, dtype=dtype, device=device, seed=1)
            leaf = both.float().requires_grad_()
            left, right = leaf.chunk(2, dim=-1)
            wanted = F.silu(left) * right
            (gradient,) = torch.autograd.grad(wanted, leaf, g.float())
            close(kernels.gate(both), wanted)
            close(kernels.gate_backward(both, g), gradient)


def check_normalise(device: str) -> None:
    """Against Qwen2's own norm and autograd."""
    for dtype in DTYPES:
        for width in (8, 24, 130):
            x = drawn(2, 3, width, dtype=dtype, device=device)
            g = drawn(2, 3, width, dtype=dtype, device=device, seed=1)
            norm = Qwen2RMSNorm(width, eps=1e-3).to(device)
            nn.init.normal_(norm.weight, 1.0, 0.3)
            more = drawn(2, 3, width, dtype=dtype, device=device, seed=2)
            leaf = x.float().requires_grad_()
            wanted = norm(leaf)
            (gradient,) = torch.autograd.grad(wanted, leaf, g.float())
            got, scales = kernels.normalise(x, norm.weight.detach(), 1e-3)
            close(got, wanted)
            found = kernels.normalise_backward(g, x, norm.weight.detach(), scales, more)
            close(found, gradient + more)


def check_rotate(device: str) -> None:
    """Against Qwen2's own rotation: of part of a row, with angles of a position and of each text, there and back."""
    for dtype in DTYPES:
        texts, tokens, heads, width = 2, 3, 5, 6
        own = drawn(texts, tokens, (heads + 2) * width, dtype=dtype, device=device)
        x = own.unflatten(-1, (-1, width))[:, :, :heads]
        angles = drawn(tokens, width // 2, dtype=torch.float32, device=device, seed=1)
        cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))
        signed = torch.cat([-sin[:, : width // 2], sin[:, width // 2 :]], dim=-1)
        wanted = apply_rotary_pos_emb(x.float(), x.float(), cos[None], sin[None], unsqueeze_dim=2)[
            0
        ]
        got = kernels.rotate(x, cos[:, None], signed[:, None])
        close(got, wanted)
        close(kernels.rotate(got, cos[:, None], signed[:, None], back=True), x)
        each = torch.stack([cos, -cos])[:, :, None], torch.stack([signed, -signed])[:, :, None]
        close(kernels.rotate(x, *each), torch.stack([wanted[0], -wanted[1]]))
        # The gradient of one position has the layout of attention, whose strides of an axis of 1 say nothing.
        for swapped in (x.transpose(1, 2).contiguous().transpose(1, 2), x[..., :1].expand_as(x)):
            for part in (swapped, swapped[:, :1].transpose(1, 2).contiguous().transpose(1, 2)):
                plain = torch.empty(part.shape, dtype=dtype, device=device).copy_(part)
                angle = [t[: part.shape[1], None] for t in (cos, signed)]
                assert torch.equal(kernels.rotate(part, *angle), kernels.rotate(plain, *angle))


def small_model(
    device: str, sizes: tuple[int, int, int, int, int] = (24, 40, 2, 4, 2), scale: float = 0.2
) -> Qwen2ForCausalLM:
    """A base whose norms, biases and weights all move its states: width, of the MLP, layers, heads, of keys."""
    hidden, intermediate, layers, heads, kv_heads = sizes
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, scale)
    return model.to(device)


def problem(device: str, n_adapters: int = 3) -> tuple[FunctionalLoRA, Tensor, EncodedProbes]:
    """A base, flat adapters [A, V] and probes of two texts with two marks each."""
    lora_model = FunctionalLoRA(small_model(device), 3, 6.0)
    values = 0.1 * drawn(n_adapters, lora_model.spec.n_values, dtype=torch.float32, device="cpu")
    ids = torch.arange(n_adapters * 2 * 9).view(n_adapters, 2, 9) * 7 % 50
    positions = torch.tensor([3, 8]).expand(n_adapters, 2, 2).contiguous()
    probes = EncodedProbes(ids, positions, torch.ones_like(positions, dtype=torch.bool))
    return lora_model, values.to(device), probes.to(device)


def by_hooks(lora_model: FunctionalLoRA, values: Tensor, probes: EncodedProbes) -> Tensor:
    batch = LoraBatch.unflatten(lora_model.spec, values)
    with adapters_applied(lora_model.model, batch, lora_model.spec.scaling):
        hidden = final_hidden(lora_model.model, probes.ids_APT.flatten(0, 1))
    at = probes.positions_APQ.flatten(0, 1)[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, at).unflatten(0, probes.ids_APT.shape[:2])


def written_out(lora_model: FunctionalLoRA, values: Tensor, probes: EncodedProbes) -> Tensor:
    batch = LoraBatch.unflatten(lora_model.spec, values)
    shape = (*probes.positions_APQ.shape, lora_model.model.config.hidden_size)
    return compute_delta_differentiable(lora_model, batch, probes, values.new_zeros(shape))


def states_and_gradient(
    compute: Pass, lora_model: FunctionalLoRA, values: Tensor, probes: EncodedProbes
) -> tuple[Tensor, Tensor]:
    leaf = values.clone().requires_grad_()
    states = compute(lora_model, leaf, probes)
    (gradient,) = torch.autograd.grad(states, leaf, torch.cos(states.detach() * 9))
    return states.detach(), gradient


def check_pass(device: str) -> None:
    """A whole pass and its gradient against the model's own modules with hooks."""
    given = problem(device)
    for got, wanted in zip(
        states_and_gradient(written_out, *given), states_and_gradient(by_hooks, *given), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("check", [check_gate, check_normalise, check_rotate, check_pass])
def test_kernels_compute_their_formulas_on_a_gpu(check: Callable[[str], None]) -> None:
    assert kernels.are_usable()
    check("cuda")


@pytest.mark.gpu
def test_a_recorded_pass_gives_the_bits_of_the_pass_itself() -> None:
    lora_model, values, probes = problem("cuda")
    given = (lora_model, values, probes)
    first = states_and_gradient(written_out, *given)
    assert not lora_model.graphs.recorded
    for _ in range(3):
        again = states_and_gradient(written_out, *given)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    assert len(lora_model.graphs.recorded) == 1
    other = states_and_gradient(written_out, lora_model, 2 * values, probes)
    wanted = states_and_gradient(by_hooks, lora_model, 2 * values, probes)
    for got, expected in zip(other, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_two_passes_before_one_gradient_do_not_share_activations() -> None:
    lora_model, values, probes = problem("cuda")
    wanted = [
        states_and_gradient(written_out, lora_model, f * values, probes)[1] for f in (1, 2, 3)
    ]
    leaves = [(f * values).requires_grad_() for f in (1, 2, 3)]
    states = [written_out(lora_model, leaf, probes) for leaf in leaves]
    total = sum((s * torch.cos(s.detach() * 9)).sum() for s in states)
    for got, expected in zip(torch.autograd.grad(total, leaves), wanted, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.gpu
def test_what_a_replay_gave_stays_as_it_was() -> None:
    lora_model, values, probes = problem("cuda")
    leaf = values.clone().requires_grad_()
    for _ in range(3):
        states = written_out(lora_model, leaf, probes)
        (gradient,) = torch.autograd.grad(states.sum(), leaf)
    kept = states.detach().clone(), gradient.clone()
    states_and_gradient(written_out, lora_model, 2 * values, probes)
    assert torch.equal(states, kept[0])
    assert torch.equal(gradient, kept[1])


@pytest.mark.gpu
def test_weights_that_were_put_elsewhere_are_read_from_there() -> None:
    lora_model, values, probes = problem("cuda")
    for _ in range(3):
        before = states_and_gradient(written_out, lora_model, values, probes)
    for parameter in lora_model.model.parameters():
        parameter.data = parameter.data * 0.9
    got = states_and_gradient(written_out, lora_model, values, probes)
    wanted = states_and_gradient(by_hooks, lora_model, values, probes)
    for own, expected, old in zip(got, wanted, before, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(own, old, rtol=1e-2)


@pytest.mark.gpu
def test_a_recorded_pass_goes_back_once() -> None:
    lora_model, values, probes = problem("cuda")
    for _ in range(2):
        states_and_gradient(written_out, lora_model, values, probes)
    leaf = values.clone().requires_grad_()
    total = written_out(lora_model, leaf, probes).sum()
    torch.autograd.grad(total, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="goes back once"):
        torch.autograd.grad(total, leaf)


@pytest.mark.gpu
def test_few_passes_are_kept_and_only_one_out_of_use_makes_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lora_model, values, probes = problem("cuda", 5)
    monkeypatch.setattr(graphs, "IDLE", 5)

    def run(n_adapters: int, times: int = 2) -> None:
        part = probes.select(slice(0, n_adapters))
        for _ in range(times):
            got = states_and_gradient(written_out, lora_model, values[:n_adapters].clone(), part)
            wanted = states_and_gradient(by_hooks, lora_model, values[:n_adapters].clone(), part)
            for own, expected in zip(got, wanted, strict=True):
                torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)

    for n_adapters in (1, 2, 3):
        run(n_adapters)
    first = list(lora_model.graphs.recorded)
    assert len(first) == graphs.KEPT
    run(4, 6)
    assert len(lora_model.graphs.recorded) == graphs.KEPT
    assert list(lora_model.graphs.recorded) != first


@pytest.mark.gpu
def test_batches_of_any_texts_have_one_shape_on_a_gpu() -> None:
    ids, positions = torch.zeros(3, 2, 9, dtype=torch.long), torch.full((3, 2, 4), 5)
    valid = torch.tensor([True, True, False, False]).expand(3, 2, 4)
    states = torch.zeros(3, 2, 4, 8)
    batch = {"probe_ids": ids, "positions": positions, "valid": valid}
    batch |= {"base_states": states, "delta": states}
    on_cpu, on_gpu = (batch_deltas({k: v.to(d) for k, v in batch.items()}) for d in ("cpu", "cuda"))
    assert on_cpu.probes.ids_APT.shape == (3, 2, 6) and on_cpu.delta_APQD.shape == (3, 2, 2, 8)
    assert on_gpu.probes.ids_APT.shape == ids.shape and on_gpu.delta_APQD.shape == states.shape


@pytest.mark.gpu
def test_a_pass_that_cannot_be_recorded_for_want_of_memory_is_run_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graphs, "_record", refuse)
    given = problem("cuda")
    first = states_and_gradient(written_out, *given)
    for _ in range(2):
        again = states_and_gradient(written_out, *given)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    assert capsys.readouterr().err.count("too little GPU memory") == 1


if __name__ == "__main__":
    products.on_gpu = lambda x: True  # CPU tensors take the way of the GPU
    for name, check in (
        ("gate", check_gate),
        ("normalise", check_normalise),
        ("rotate", check_rotate),
        ("pass", check_pass),
    ):
        check("cpu")
        print(name)
