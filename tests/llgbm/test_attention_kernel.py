"""The kernel of attention: its formulas by Triton's interpreter, and on a GPU as compiled (marked `gpu`)."""

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
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from llgbm.functional import FunctionalLoRA, compute_delta_differentiable
from llgbm.lora import LoraBatch, attention, products

# Triton decides when it is imported whether it interprets, so this file runs itself in a process of its own.
INTERPRET = "TRITON_INTERPRET"


def dtypes(device: str) -> tuple[torch.dtype, ...]:
    """Half precisions that products are right in: the interpreter multiplies bfloat16 as the integers of its bits."""
    return (torch.float16,) if device == "cpu" else (torch.float16, torch.bfloat16)


@pytest.mark.whole
def test_attention_computes_its_formula_when_interpreted() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-W", "ignore", str(Path(__file__))]
    done = subprocess.run(
        command, env=os.environ | {INTERPRET: "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["attention", "pass"]


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype, passes: int = 1) -> None:
    """Assert that the difference is small beside the values, as far as the dtype that was computed in reaches."""
    share = passes * (2e-2 if dtype == torch.bfloat16 else 3e-3)
    assert torch.isfinite(got).all()
    assert (got.float() - wanted).norm() <= share * wanted.norm()
    assert (got.float() - wanted).abs().max() <= 2 * share * wanted.abs().max()


def drawn(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(device, dtype)


def check_attention(device: str) -> None:
    """Against Qwen2's own rotation, torch's attention and autograd, of texts shorter than a tile and as long."""
    cases = [(1, 4, 2, 32), (9, 4, 4, 32), (40, 6, 2, 64), (64, 3, 1, 128)]
    for dtype, (tokens, n_heads, n_kv, width) in ((d, c) for d in dtypes(device) for c in cases):
        assert attention.can_attend(n_heads, n_kv, width, dtype, device)
        own = drawn(2, tokens, (n_heads + 2 * n_kv) * width, dtype=dtype, device=device)
        g = drawn(2, tokens, n_heads * width, dtype=dtype, device=device, seed=1)
        angles = 3 * drawn(tokens, width // 2, dtype=torch.float32, device="cpu", seed=2)
        cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))
        cos, sin = cos.to(device, dtype), sin.to(device, dtype)
        leaf = own.float().requires_grad_()
        heads = leaf.unflatten(-1, (-1, width)).transpose(1, 2)
        q, k, v = heads.split([n_heads, n_kv, n_kv], dim=1)
        q, k = apply_rotary_pos_emb(q, k, cos.float()[None], sin.float()[None])
        wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        wanted = wanted.transpose(1, 2).flatten(2)
        (gradient,) = torch.autograd.grad(wanted, leaf, g.float())
        signed = torch.cat([-sin[:, : width // 2], sin[:, width // 2 :]], dim=-1)
        given = own, cos[:, None], signed[:, None], n_heads, n_kv
        close(attention.attend(*given), wanted.detach(), dtype)
        found = attention.attend_backward(*given, g)
        close(found, gradient, dtype)
        assert torch.equal(attention.attend_backward(*given, g), found)


def check_pass(device: str) -> None:
    """Deltas of a whole base and their gradient in half precision, against float32 on a CPU without kernels."""
    from test_kernels import problem, small_model

    plain_way = products.on_gpu
    found = []
    for own_device, dtype, way in (
        ("cpu", torch.float32, lambda x: False),
        (device, dtypes(device)[-1], (lambda x: True) if device == "cpu" else plain_way),
    ):
        products.on_gpu = way
        # Heads of 32, the narrowest that the kernel takes.
        model = nn.Module.to(small_model(own_device, (96, 104, 3, 3, 1), 0.1), dtype=dtype)
        lora_model = FunctionalLoRA(model, 3, 6.0)
        _, _, probes = problem(own_device)
        drawn_AV = drawn(3, lora_model.spec.n_values, dtype=torch.float32, device=own_device)
        values = (0.1 * drawn_AV).requires_grad_()
        batch = LoraBatch.unflatten(lora_model.spec, values)
        shape = (*probes.positions_APQ.shape, lora_model.model.config.hidden_size)
        states = compute_delta_differentiable(lora_model, batch, probes, values.new_zeros(shape))
        upstream = drawn(*shape, dtype=torch.float32, device="cpu", seed=1).to(own_device)
        (gradient,) = torch.autograd.grad(states, values, upstream)
        found.append((states.detach().cpu(), gradient.cpu()))
    products.on_gpu = plain_way
    for wanted, got in zip(*found, strict=True):
        close(got, wanted, dtypes(device)[-1], 2)


CHECKS: dict[str, Callable[[str], None]] = {
    "attention": check_attention,
    "pass": check_pass,
}


def test_a_gpu_that_the_kernel_does_not_fit_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(attention, "attend", refuse)
    monkeypatch.setattr(attention, "triton", object())
    attention.can_attend.cache_clear()
    answers = [attention.can_attend(4, 2, 32, torch.float16, "cpu") for _ in range(2)]
    attention.can_attend.cache_clear()
    assert answers == [False, False]
    assert capsys.readouterr().err.count("out of shared memory") == 1


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(32, torch.float32), (16, torch.float16), (96, torch.bfloat16), (256, torch.float16)],
)
def test_heads_that_no_tile_holds_are_left_to_the_library(
    monkeypatch: pytest.MonkeyPatch, width: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(attention, "triton", object())
    monkeypatch.setattr(attention, "attend", lambda *_: pytest.fail("tried"))
    assert not attention.can_attend(4, 2, width, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_attention_computes_its_formula_on_a_gpu(name: str) -> None:
    CHECKS[name]("cuda")


if __name__ == "__main__":
    for name, check in CHECKS.items():
        check("cpu")
        print(name)
