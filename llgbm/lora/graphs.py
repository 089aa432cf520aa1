"""CUDA graphs of the base under A adapters, forward and back: one call replays thousands of kernels.

A pass over a few thousand tokens keeps a GPU busy for less time than a processor needs to launch its kernels. The steps
of a training have one shape, so the second pass of a shape is recorded and later ones replay it. Values and gradients
are those of the same kernels without a graph. A recorded pass owns the memory of its activations until it is dropped.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from llgbm.lora import blocks
from llgbm.lora.adapters import LoraBatch
from llgbm.lora.apply import Applied, states_at
from llgbm.runtime import release_device_memory, say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Each recorded pass holds its activations. One makes room for another when so many passes ran without it: recording
# takes as long as several passes, so shapes that change from step to step are better left alone.
KEPT, IDLE = 2, 200


class _Use:
    """One replay forward, until its gradient was taken or nobody can ask for it any more."""

    is_over = False


@dataclass
class _Recorded:
    """A pass forward and one back over fixed tensors: `inputs` are flat adapters [A, V], ids and positions."""

    inputs: tuple[Tensor, Tensor, Tensor]
    states_SQD: Tensor
    upstream_SQD: Tensor
    gradient_AV: Tensor
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    use: weakref.ref[_Use] | None = None
    used_at: int = 0

    @property
    def is_free(self) -> bool:
        """False while the activations of a replay may be read by its way back."""
        use = self.use() if self.use else None
        return use is None or use.is_over


def _record(compute: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor]) -> _Recorded:
    values_AV = inputs[0].detach().clone().requires_grad_()
    fixed = (values_AV, inputs[1].clone(), inputs[2].clone())
    # The libraries set themselves up in a pass that is not recorded, on a stream of its own.
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.enable_grad():
        with torch.cuda.stream(aside):
            states = compute(*fixed)
            torch.autograd.grad(states, values_AV, torch.zeros_like(states))
            del states
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.empty_cache()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward):
            states = compute(*fixed)
        upstream = torch.zeros_like(states)
        with torch.cuda.graph(backward, pool=forward.pool()):
            (gradient,) = torch.autograd.grad(states, values_AV, upstream)
    return _Recorded(fixed, states.detach(), upstream, gradient, forward, backward)


class _Replay(Function):
    @staticmethod
    def forward(ctx: Any, recorded: _Recorded, *inputs: Tensor) -> Tensor:
        for fixed, given in zip(recorded.inputs, inputs, strict=True):
            fixed.detach().copy_(given)
        ctx.recorded, ctx.use = recorded, _Use()
        recorded.use = weakref.ref(ctx.use)
        recorded.forward.replay()
        return recorded.states_SQD.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_SQD: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.use.is_over:
            raise RuntimeError(
                "this pass was recorded as a CUDA graph, which goes back once: read the states again for a second time"
            )
        recorded, ctx.use.is_over = ctx.recorded, True
        recorded.upstream_SQD.copy_(g_SQD)
        recorded.backward.replay()
        return None, recorded.gradient_AV.clone(), None, None


@dataclass
class PassGraphs:
    """Recorded passes of one base by their shapes, those used last at the end."""

    recorded: OrderedDict[Any, _Recorded] = field(default_factory=OrderedDict)
    seen: set[Any] = field(default_factory=set)
    too_large: set[Any] = field(default_factory=set)
    passes: int = 0

    def states_at(
        self, base: PreTrainedModel, ids_ST: Tensor, positions_SQ: Tensor, applied: Applied
    ) -> Tensor:
        """States [S, Q, D] as `apply.states_at` reads them, from the second pass of a shape on by a replay."""
        if not _can_record(base, ids_ST, applied):
            return states_at(base, ids_ST, positions_SQ, applied)
        assert applied.batch.source is not None
        spec, values_AV = applied.batch.source
        inputs = (values_AV, ids_ST, positions_SQ)

        def compute(values_AV: Tensor, ids_ST: Tensor, positions_SQ: Tensor) -> Tensor:
            # In the base's dtype at once, in place of matrix by matrix.
            batch = LoraBatch.unflatten(spec, values_AV.to(base.dtype))
            return states_at(base, ids_ST, positions_SQ, Applied(batch, applied.scaling))

        # Weights that move in memory make another key: a graph reads where they were.
        key = (
            spec,
            *((t.shape, t.dtype) for t in inputs),
            *(p.data_ptr() for p in base.parameters()),
        )
        recorded = self._find(key, compute, inputs)
        return compute(*inputs) if recorded is None else _Replay.apply(recorded, *inputs)

    def _find(
        self, key: Any, compute: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor]
    ) -> _Recorded | None:
        """Return the recorded pass of a key where it is free; record it at the second sight of the key."""
        self.passes += 1
        known = key in self.recorded or (
            self._is_worth_recording(key) and self._has_recorded(key, compute, inputs)
        )
        if not known:
            self.seen.add(key)
            return None
        recorded = self.recorded[key]
        self.recorded.move_to_end(key)
        recorded.used_at = self.passes
        return recorded if recorded.is_free else None

    def _is_worth_recording(self, key: Any) -> bool:
        """True for a key seen before that fits the card, where there is room or one of the kept is out of use."""
        if key not in self.seen or key in self.too_large:
            return False
        return (
            len(self.recorded) < KEPT
            or self.passes - next(iter(self.recorded.values())).used_at > IDLE
        )

    def _has_recorded(
        self, key: Any, compute: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor]
    ) -> bool:
        """Record a pass in place of the one that is longest out of use; False where the card has no room for it."""
        while len(self.recorded) >= KEPT:
            self.recorded.popitem(last=False)
        try:
            self.recorded[key] = _record(compute, inputs)
        except torch.OutOfMemoryError:
            self.too_large.add(key)
            release_device_memory()
            say(
                "too little GPU memory to record the pass of a step, so each launches its kernels one by one"
            )
            return False
        return True


def _can_record(base: PreTrainedModel, ids_ST: Tensor, applied: Applied) -> bool:
    """True for a pass on a GPU whose gradient can be asked for and that keeps its activations."""
    source = applied.batch.source
    return (
        ids_ST.is_cuda
        and torch.is_grad_enabled()
        and source is not None
        and source[1].requires_grad
        and not applied.checkpointing
        and not torch.cuda.is_current_stream_capturing()
        and blocks.can_run(base, applied.batch)
    )
