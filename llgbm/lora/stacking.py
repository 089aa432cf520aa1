"""Several adapters of one base in one: PEFT's own combinations, and how far each is from the exact mixture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llgbm.lora.adapters import PEFT_PREFIX, LoraBatch, LoraSpec
from llgbm.lora.external import PlainAdapter
from llgbm.lora.geometry import delta_w_error
from llgbm.lora.mixtures import sum_of_updates
from llgbm.runtime import UserError

if TYPE_CHECKING:
    from peft import PeftModel

# How PEFT puts adapters together (`add_weighted_adapter`): exact, cut to a rank, or a mixture of A and of B apart.
WAYS = ("cat", "svd", "linear")
STACKED = "stacked"


@dataclass(frozen=True)
class Mixture:
    """Adapters with a weight each: the update is the weighted sum of theirs, `rank` that of `svd`."""

    adapters: Sequence[PlainAdapter]
    weights: Sequence[float]
    way: str = "cat"
    rank: int | None = None

    def __post_init__(self) -> None:
        ranks = {adapter.spec.rank for adapter in self.adapters}
        if len(self.adapters) < 2:
            raise UserError("one adapter alone cannot be stacked: name two or more")
        if len(self.weights) != len(self.adapters):
            raise UserError(
                f"{len(self.weights)} weights for {len(self.adapters)} adapters: give one for each"
            )
        if self.way == "linear" and len(ranks) > 1:
            raise UserError(
                f"adapters of the ranks {', '.join(map(str, sorted(ranks)))} have no linear mixture: take `cat`, which "
                "is exact, or `svd` with a rank"
            )
        if (self.rank is not None) != (self.way == "svd"):
            raise UserError("a rank goes with `svd`, and `svd` needs one")


def stack_adapters(model: nn.Module, mixture: Mixture) -> tuple[dict[str, Tensor], LoraSpec, float]:
    """Put adapters of a base into one; return its PEFT state, its shapes, and its relative error in ΔW.

    The model is as it was afterwards. The error is that to the exact mixture, sum of w_i alpha_i / rank_i B_i A_i.
    """
    from peft import get_peft_model_state_dict

    with _injected(model, mixture) as peft_model:
        lora_model: Any = peft_model.base_model
        lora_model.add_weighted_adapter(
            _names(mixture), list(mixture.weights), STACKED, mixture.way, svd_rank=mixture.rank
        )
        state = get_peft_model_state_dict(peft_model, adapter_name=STACKED)
        config: Any = peft_model.peft_config[STACKED]
        state = {key: tensor.detach().float().cpu().clone() for key, tensor in state.items()}
    kinds = sorted({m.kind for adapter in mixture.adapters for m in adapter.spec.modules})
    spec = LoraSpec.from_model(model, config.r, float(config.lora_alpha), kinds)
    error = delta_w_error(_scaled(state, spec.scaling), exact_mixture(mixture))
    return state, spec, float(error)


def exact_mixture(mixture: Mixture) -> LoraBatch:
    """Return the weighted sum of the updates as one adapter of factor 1: ranks side by side."""
    parts = [LoraBatch.from_state_dicts([own.state]).to("cpu") for own in mixture.adapters]
    scalings = [adapter.spec.scaling for adapter in mixture.adapters]
    weights = [w * scaling for w, scaling in zip(mixture.weights, scalings, strict=True)]
    return sum_of_updates(parts, weights)


def _scaled(state: Mapping[str, Tensor], scaling: float) -> LoraBatch:
    batch = LoraBatch.from_state_dicts([state])
    return LoraBatch(batch.a, {name: scaling * b for name, b in batch.b.items()})


def _names(mixture: Mixture) -> list[str]:
    return [f"part_{number}" for number in range(len(mixture.adapters))]


@contextmanager
def _injected(model: nn.Module, mixture: Mixture) -> Iterator[PeftModel]:
    """Yield the model with all adapters of a mixture in it, by PEFT; take them out afterwards."""
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict

    peft_model: Any = None
    try:
        for name, adapter in zip(_names(mixture), mixture.adapters, strict=True):
            alpha: Any = (
                adapter.spec.alpha
            )  # PEFT computes with any number; its annotation says int
            own = LoraConfig(
                r=adapter.spec.rank,
                lora_alpha=alpha,
                target_modules=[m.name for m in adapter.spec.modules],
                fan_in_fan_out=adapter.spec.is_transposed,
            )
            if peft_model is None:
                peft_model = PeftModel(model, own, adapter_name=name)
            else:
                peft_model.add_adapter(name, own)
            wanted = {_with_prefix(key): value for key, value in adapter.state.items()}
            set_peft_model_state_dict(peft_model, wanted, adapter_name=name)
        yield peft_model
    finally:
        if peft_model is not None:
            peft_model.unload()
        model.requires_grad_(False)


def _with_prefix(key: str) -> str:
    return key if key.startswith(PEFT_PREFIX) else PEFT_PREFIX + key
