"""Muon: momentum whose matrices are orthogonalised before each step.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". Why not `torch.optim.Muon`:
docs/decisions/0039-muon.md. Axis letters: K matrices, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Coefficients of the quintic iteration that sends singular values towards 1 (Jordan et al. 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 3


def orthogonalise(m_KRC: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Send the singular values of matrices [K, R, C] towards 1 by Newton-Schulz iteration; directions stay."""
    tall = m_KRC.shape[1] > m_KRC.shape[2]
    x = m_KRC.mT if tall else m_KRC
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum of matrices, orthogonalised; the step of a tall matrix is longer by sqrt(R / C).

    Raises ValueError for a parameter that is no matrix.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        given = [p for group in self.param_groups for p in group["params"]]
        if any(p.ndim != 2 for p in given):
            raise ValueError("Muon steps matrices only: leave vectors and embeddings to AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for alike in by_shape.values():
                self._step_alike(alike, group)
        return loss

    def _step_alike(self, alike: list[nn.Parameter], group: dict[str, float]) -> None:
        """Step matrices of one shape together."""
        rate, momentum = group["lr"], group["momentum"]
        grads = torch.stack([p.grad for p in alike if p.grad is not None])
        means = torch.stack([self.state[p].get("mean", torch.zeros_like(p)) for p in alike])
        means.lerp_(grads, 1 - momentum)
        steps = orthogonalise(grads.lerp(means, momentum))
        length = rate * max(1.0, grads.shape[1] / grads.shape[2]) ** 0.5
        for parameter, mean, step in zip(alike, means, steps, strict=True):
            self.state[parameter]["mean"] = mean
            parameter.mul_(1 - rate * group["weight_decay"]).sub_(step, alpha=length)
