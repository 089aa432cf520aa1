"""One problem and the ways of solving it: states of a base under A adapters, and the gradients to the adapters.

Each `Peer` holds the same adapters and gives the same states [A, P, D] at the last token of P texts and, with
`backward`, the gradient of <states, upstream> to every adapter value. Peers that take the adapters one after another go
back after each, so that they hold one graph at a time, as a user would. The preparation (adding adapters to PEFT) is
not timed.

Letters: A adapters, P probes, T tokens, D hidden size, V values of an adapter.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from transformers import PreTrainedModel, Qwen2ForCausalLM

from llgbm.delta import EncodedProbes
from llgbm.functional import FunctionalLoRA, compute_delta_differentiable
from llgbm.lora import LoraBatch, LoraSpec
from llgbm.models.load import SIZES, ModelSize, qwen2_config

# The first two are those of the studies; `wide` is where arithmetic outweighs all else on a CPU.
SETTINGS: dict[str, tuple[ModelSize, int, int]] = {
    "toy": (ModelSize(hidden=32, layers=2, heads=4, kv_heads=2, intermediate=48), 2, 64),
    "nano": (SIZES["nano"], 4, 512),
    "micro": (SIZES["micro"], 4, 512),
    "wide": (ModelSize(hidden=512, layers=6, heads=8, kv_heads=2, intermediate=1408), 8, 512),
    "qwen2.5-0.5b": (SIZES["qwen2.5-0.5b"], 8, 151936),
    "qwen2.5-1.5b": (SIZES["qwen2.5-1.5b"], 16, 151936),
}


@dataclass(frozen=True)
class Problem:
    """A base with random weights, A random adapters [A, V], P texts [P, T] and what is sent back [A, P, D]."""

    model: PreTrainedModel
    spec: LoraSpec
    values_AV: Tensor
    ids_PT: Tensor
    upstream_APD: Tensor

    @property
    def n_adapters(self) -> int:
        return len(self.values_AV)

    @property
    def linear_parameters(self) -> int:
        """Weights of the Linear layers in the blocks."""
        return sum(m.n_in * m.n_out for m in self.spec.modules)

    def flops(self, backward: bool) -> float:
        """4 * linear parameters * tokens for a pass forward and back to the activations, 2 for the one forward.

        No weight of the base gets a gradient. Attention, adapters and the head are not counted.
        """
        return (
            (4.0 if backward else 2.0)
            * self.linear_parameters
            * self.n_adapters
            * self.ids_PT.numel()
        )


def make_model(
    setting: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Build a frozen base of a setting with random weights, drawn on its device in float32."""
    size, _, vocabulary = SETTINGS[setting]
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM(
            qwen2_config(size, vocab_size=vocabulary, max_position_embeddings=4096)
        )
    return nn.Module.to(model, dtype).eval().requires_grad_(False)


def make_problem(
    model: PreTrainedModel, rank: int, adapters: int, probes: int, tokens: int
) -> Problem:
    """Draw adapters that move the base visibly, texts, and what is sent back; made on the CPU, then moved."""
    spec = LoraSpec.from_model(model, rank, 2.0 * rank)
    generator = torch.Generator().manual_seed(1)
    config = model.config
    values = 0.05 * torch.randn(adapters, spec.n_values, generator=generator)
    ids = torch.randint(config.vocab_size, (probes, tokens), generator=generator)
    upstream = torch.randn(adapters, probes, config.hidden_size, generator=generator)
    device = model.device
    return Problem(model, spec, values.to(device), ids.to(device), upstream.to(device))


class Peer(ABC):
    """One way of running a base under many adapters."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @abstractmethod
    def run(self, backward: bool) -> Tensor:
        """States [A, P, D] without their graph; with `backward` the leaves get their gradients anew."""

    @abstractmethod
    def gradients(self) -> Tensor:
        """The gradients [A, V] of the last run with `backward`."""


class Ours(Peer):
    """`llgbm.functional`: all adapters in one pass."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.values_AV = problem.values_AV.clone().requires_grad_()
        rank, alpha = problem.spec.rank, problem.spec.alpha
        self.lora_model = FunctionalLoRA(problem.model, rank, alpha, problem.spec.target_modules)
        shape = (problem.n_adapters, *problem.ids_PT.shape)
        last = torch.full((*shape[:2], 1), shape[2] - 1, device=problem.ids_PT.device)
        self.probes = EncodedProbes(
            problem.ids_PT.expand(shape), last, torch.ones_like(last, dtype=torch.bool)
        )
        hidden = problem.upstream_APD.shape[-1]
        self.zero = torch.zeros(*shape[:2], 1, hidden, device=last.device)

    def run(self, backward: bool) -> Tensor:
        self.values_AV.grad = None
        with torch.set_grad_enabled(backward):
            batch = LoraBatch.unflatten(self.problem.spec, self.values_AV)
            states = compute_delta_differentiable(
                self.lora_model, batch, self.probes, self.zero
            ).squeeze(2)
        if backward:
            states.backward(self.problem.upstream_APD)
        return states.detach()

    def gradients(self) -> Tensor:
        assert self.values_AV.grad is not None
        return self.values_AV.grad


class InTurn(Peer):
    """One adapter after another."""

    def run(self, backward: bool) -> Tensor:
        self.clear()
        found = []
        for index in range(self.problem.n_adapters):
            with torch.set_grad_enabled(backward):
                states = self.states(index)
            if backward:
                states.backward(self.problem.upstream_APD[index])
            found.append(states.detach())
        return torch.stack(found)

    @abstractmethod
    def states(self, index: int) -> Tensor:
        """States [P, D] under one adapter, with its graph."""

    @abstractmethod
    def clear(self) -> None:
        """Forget the gradients."""


class _OwnLeaves(InTurn):
    """Adapters as a list of vectors [V]."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.leaves = [row.clone().requires_grad_() for row in problem.values_AV]

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def gradients(self) -> Tensor:
        return torch.stack([leaf.grad for leaf in self.leaves if leaf.grad is not None])


class FunctionalCall(_OwnLeaves):
    """W + s B A of one adapter for `torch.func.functional_call`."""

    def states(self, index: int) -> Tensor:
        problem = self.problem
        inner, weights = effective_weights(problem, pieces(problem.spec, self.leaves[index]))
        return last_states(partial(functional_call, inner, weights, ()), problem.ids_PT)


class Hooks(_OwnLeaves):
    """Forward hooks that add s B A x of one adapter."""

    def states(self, index: int) -> Tensor:
        problem = self.problem
        with ExitStack() as stack:
            for name, (a_RI, b_OR) in pieces(problem.spec, self.leaves[index]).items():
                hook = partial(_add_low_rank, a_RI=a_RI, b_OR=b_OR, scaling=problem.spec.scaling)
                module = problem.model.get_submodule(name)
                stack.callback(module.register_forward_hook(hook).remove)
            return last_states(_kwargs_only(problem.model.base_model), problem.ids_PT)


def _add_low_rank(
    _module: nn.Module,
    args: tuple[Tensor, ...],
    output: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    scaling: float,
) -> Tensor:
    x = args[0]
    return output + scaling * ((x @ a_RI.to(x).T) @ b_OR.to(x).T)


class Vmap(Peer):
    """`torch.vmap` over `functional_call`: W + s B A of all adapters at once."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.values_AV = problem.values_AV.clone().requires_grad_()

    def run(self, backward: bool) -> Tensor:
        problem = self.problem
        self.values_AV.grad = None

        def one(values_V: Tensor) -> Tensor:
            inner, weights = effective_weights(problem, pieces(problem.spec, values_V))
            return last_states(partial(functional_call, inner, weights, ()), problem.ids_PT)

        with torch.set_grad_enabled(backward):
            states = vmap(one)(self.values_AV)
        if backward:
            states.backward(problem.upstream_APD)
        return states.detach()

    def gradients(self) -> Tensor:
        assert self.values_AV.grad is not None
        return self.values_AV.grad


class PeftInTurn(InTurn):
    """A PEFT model that holds all adapters; `set_adapter`, then a pass, one after another."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.model = peft_model(problem)

    def states(self, index: int) -> Tensor:
        self.model.set_adapter(f"a{index}")
        return last_states(
            _kwargs_only(self.model.base_model.model.base_model), self.problem.ids_PT
        )

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def gradients(self) -> Tensor:
        rows = range(self.problem.n_adapters)
        return torch.stack(
            [peft_flat(self.model, self.problem.spec, f"a{index}", True) for index in rows]
        )


class PeftMixed(Peer):
    """PEFT's mixed batches: one pass in which `adapter_names` says whose each row is. They need eval mode."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.model = peft_model(problem).eval()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        n_probes = len(problem.ids_PT)
        self.names = [f"a{index}" for index in range(problem.n_adapters) for _ in range(n_probes)]

    def run(self, backward: bool) -> Tensor:
        problem = self.problem
        self.model.zero_grad(set_to_none=True)
        ids_ST = problem.ids_PT.repeat(problem.n_adapters, 1)
        with torch.set_grad_enabled(backward):
            out = self.model(
                input_ids=ids_ST,
                adapter_names=self.names,
                use_cache=False,
                output_hidden_states=True,
                logits_to_keep=1,
            )
            states = out.hidden_states[-1][:, -1].unflatten(0, (problem.n_adapters, -1)).float()
        if backward:
            states.backward(problem.upstream_APD)
        return states.detach()

    def gradients(self) -> Tensor:
        rows = range(self.problem.n_adapters)
        return torch.stack(
            [peft_flat(self.model, self.problem.spec, f"a{index}", True) for index in rows]
        )


PEERS: dict[str, Callable[[Problem], Peer]] = {
    "ours": Ours,
    "peft_in_turn": PeftInTurn,
    "peft_adapter_names": PeftMixed,
    "functional_call": FunctionalCall,
    "vmap": Vmap,
    "hooks": Hooks,
}


def pieces(spec: LoraSpec, values_V: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """A [R, in] and B [out, R] of every module of a flat adapter, by name."""
    parts = values_V.split([rows * columns for _, _, (rows, columns) in spec.pieces])
    shaped = [part.view(shape) for part, (_, _, shape) in zip(parts, spec.pieces, strict=True)]
    return {m.name: (shaped[2 * i], shaped[2 * i + 1]) for i, m in enumerate(spec.modules)}


def effective_weights(
    problem: Problem, adapter: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The base without its head, and its adapted weights W + s B A by their names in it."""
    inner, weights = problem.model.base_model, {}
    for name, (a_RI, b_OR) in adapter.items():
        own = name.removeprefix(f"{problem.model.base_model_prefix}.")
        weight = inner.get_submodule(own).weight
        weights[f"{own}.weight"] = weight + problem.spec.scaling * (b_OR @ a_RI).to(weight)
    return inner, weights


def last_states(forward: Callable[[dict[str, Any]], Any], ids_PT: Tensor) -> Tensor:
    """States [P, D], float32, at the last token. No mask is given: the attention is causal by itself."""
    out = forward(
        {"input_ids": ids_PT, "attention_mask": {"full_attention": None}, "use_cache": False}
    )
    return out.last_hidden_state[:, -1].float()


def _kwargs_only(module: nn.Module) -> Callable[[dict[str, Any]], Any]:
    return lambda kwargs: module(**kwargs)


def peft_model(problem: Problem) -> Any:
    """A copy of the base with all adapters in it, as `a0`, `a1`, …, in eval mode (there is no dropout)."""
    from peft import LoraConfig, get_peft_model

    spec = problem.spec
    config = LoraConfig(
        r=spec.rank, lora_alpha=int(spec.alpha), target_modules=list(spec.target_modules)
    )
    model = get_peft_model(copy.deepcopy(problem.model), config, adapter_name="a0")
    for index in range(1, problem.n_adapters):
        model.add_adapter(f"a{index}", config)
    with torch.no_grad():
        for index, values_V in enumerate(problem.values_AV):
            set_peft_values(model, spec, f"a{index}", values_V)
    return model.eval()


def set_peft_values(model: Any, spec: LoraSpec, adapter: str, values_V: Tensor) -> None:
    """Copy a flat adapter into a PEFT model."""
    for name, (a_RI, b_OR) in pieces(spec, values_V).items():
        module = model.base_model.model.get_submodule(name)
        module.lora_A[adapter].weight.data.copy_(a_RI)
        module.lora_B[adapter].weight.data.copy_(b_OR)


def peft_flat(model: Any, spec: LoraSpec, adapter: str, gradient: bool = False) -> Tensor:
    """The values [V] of an adapter in a PEFT model, or their gradients."""
    found = []
    for m in spec.modules:
        module = model.base_model.model.get_submodule(m.name)
        for side in (module.lora_A, module.lora_B):
            weight = side[adapter].weight
            found.append((weight.grad if gradient else weight.detach()).flatten())
    return torch.cat(found)
