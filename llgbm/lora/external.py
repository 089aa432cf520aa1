"""Read LoRA adapters that others saved with PEFT, as plain LoRA: W + alpha / rank * B A on Linear layers.

What `plain` does not allow is refused by name. Converted exactly are rank and alpha patterns (zero rows, scaled B),
rsLoRA (its factor goes into alpha), PiSSA and OLoRA (minus their initial part, which doubles the rank), layers without
weights (zeros), and keys with the names of wrappers.

Source: Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (arXiv 2312.03732); Meng
et al. 2024, "PiSSA" (arXiv 2404.02948); Büyükakyüz 2024, "OLoRA" (arXiv 2406.01775).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llgbm.lora.adapters import (
    ADAPTER_CONFIG,
    PEFT_PREFIX,
    LoraSpec,
    StateDict,
    read_adapter_config,
    read_adapter_weights,
)
from llgbm.lora.plain import CONVERTED_INIT, check_plain, is_empty
from llgbm.lora.shapes import LinearShape, linear_shape
from llgbm.lora.targets import head_of, text_layers
from llgbm.runtime import UserError
from llgbm.system.documents import brief

WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_LORA_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<name>\w+))?\.weight$")
_EMBEDDING_KEY = re.compile(r"^(?P<module>.+?)(?:\.base_layer|\.original_module)?\.weight$")
# Names of what an adapter is not plain with, by a part of its keys.
OTHER_KEYS = {
    "lora_magnitude_vector": "DoRA (use_dora)",
    "lora_embedding": "an adapted embedding (target_modules)",
    "modules_to_save": "modules_to_save",
    "trainable_tokens": "trainable_token_indices",
    ".bias": "bias or lora_bias",
}


@dataclass(frozen=True)
class PlainAdapter:
    """Adapter as plain LoRA: its shapes, its weights under PEFT's keys, and what was converted."""

    spec: LoraSpec
    state: dict[str, Tensor]
    converted: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Part:
    """A [R, in] and B [out, R] of one module, with the factor on B A."""

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def to_rank(self, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
        """Return A and B of a larger rank for another factor: zeros below A and beside B, B scaled."""
        more = rank - self.rank
        a = nn.functional.pad(self.a, (0, 0, 0, more))
        b = nn.functional.pad(self.b, (0, more))
        if self.scaling != scaling:
            b = b * (self.scaling / scaling)
        return a, b


class AdapterReader:
    """Reads adapters of one base. Initial parts of PiSSA and OLoRA are computed once a module and setting."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = dict(model.named_modules())
        self.names = {part for name in self.layers for part in name.split(".")}
        self._initial: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def read(self, folder: Path) -> PlainAdapter:
        """Read an adapter as plain LoRA. Raises UserError, naming it, for one that is not, or of another base."""
        config = read_adapter_config(folder)
        check_plain(folder, config)
        sides, converted = self._sort(folder, read_adapter_weights(folder))
        with _config_errors(folder):
            return self._as_plain(folder, config, sides, converted)

    def _as_plain(
        self,
        folder: Path,
        config: Mapping[str, Any],
        sides: Mapping[str, Mapping[str, Tensor]],
        converted: list[str],
    ) -> PlainAdapter:
        """Bring A and B of the modules to plain LoRA, as the config says that they are meant."""
        self._check_targets(folder, config, sides)
        parts = {name: self._part(folder, config, name, own) for name, own in sides.items()}
        init = config.get("init_lora_weights")
        if init in CONVERTED_INIT:
            parts = {name: self._less_initial(name, p, init) for name, p in parts.items()}
            converted.append(f"{init}, less its initial part, of twice the rank")
        if config.get("use_rslora"):
            converted.append("rsLoRA, its factor in alpha")
        state, spec = self._stack(folder, parts, converted)
        if not all(torch.isfinite(value).all() for value in state.values()):
            raise ValueError("its alphas are too large or too small")
        return PlainAdapter(spec, state, tuple(converted))

    def _sort(
        self, folder: Path, weights: StateDict
    ) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
        """Return A and B by module, and what was left out or renamed. Raises UserError for a key of another kind."""
        sides: dict[str, dict[str, Tensor]] = {}
        converted: list[str] = []
        for key, tensor in weights.items():
            name = self._strip(key)
            if f"{PEFT_PREFIX}{name}" != key and "keys without wrappers' names" not in converted:
                converted.append("keys without wrappers' names")
            lora = _LORA_KEY.match(name)
            if lora is None:
                converted += self._left_out(folder, name, key, tensor)
                continue
            self._check_module(folder, lora["module"])
            own = sides.setdefault(lora["module"], {})
            if lora["side"] in own:
                raise UserError(f"{folder} holds several adapters in one file ({key}): part them")
            own[lora["side"]] = tensor.float()
        halves = [name for name, own in sides.items() if len(own) < 2]
        if halves or not sides:
            where = f"{halves[0]} lacks one of its two" if halves else "it has none"
            raise UserError(f"the adapter in {folder} needs lora_A and lora_B: {where}")
        return sides, converted

    def _strip(self, key: str) -> str:
        """Return a key without PEFT's prefix and the names of wrappers such as torch.compile's."""
        parts = [p for p in key.split(".") if p in self.names or p not in WRAPPERS]
        name = ".".join(parts)
        while name.startswith(PEFT_PREFIX):
            name = name.removeprefix(PEFT_PREFIX)
        return name

    def _left_out(self, folder: Path, name: str, key: str, tensor: Tensor) -> list[str]:
        """Leave out a weight that is the base's own. Raises UserError for any other."""
        found = [what for part, what in OTHER_KEYS.items() if part in name]
        if found:
            raise UserError(
                f"the adapter in {folder} sets {found[0]} (it holds {key}), which plain LoRA does not have: make it "
                "without, or merge it into its base with PEFT"
            )
        saved = _EMBEDDING_KEY.match(name)
        layer = self.layers.get(saved["module"]) if saved else None
        own = getattr(layer, "weight", None)
        if own is None:
            raise UserError(f"the adapter in {folder} holds {key}, which is no LoRA weight")
        if own.shape != tensor.shape or not _alike(own, tensor):
            raise UserError(
                f"the adapter in {folder} holds weights of its own for {name}, other than the base's: its training "
                "changed them (or the base is another); make it without, or merge it into its base with PEFT"
            )
        return [f"{name} left out, as it is the base's own"]

    def _check_module(self, folder: Path, name: str) -> None:
        layer = self.layers.get(name)
        if layer is None:
            raise UserError(
                f"the adapter in {folder} does not fit the base: that has no module {name}: another base?"
            )
        if layer is head_of(self.model):
            raise UserError(
                f"the adapter in {folder} adapts {name}, the head, which only layers below it can be here: make it "
                "without, or merge it into its base with PEFT"
            )
        if linear_shape(name, layer) is None:
            kind = type(layer).__name__
            raise UserError(
                f"the adapter in {folder} adapts {name}, a {kind}: only Linear and Conv1D can be"
            )

    def _check_targets(
        self, folder: Path, config: Mapping[str, Any], sides: Mapping[str, Any]
    ) -> None:
        """Raise UserError where the weights are not of the modules that PEFT would adapt by the config."""
        wanted = targeted(self.model, config)
        if missing := sorted(wanted - sides.keys()):
            raise UserError(
                f"the adapter in {folder} lacks the weights of {len(missing)} modules that its target_modules name, "
                f"such as {missing[0]}: a torn file, or another base?"
            )
        if more := sorted(sides.keys() - wanted):
            raise UserError(
                f"the adapter in {folder} holds weights of {len(more)} modules that its target_modules do not name, "
                f"such as {more[0]}: PEFT would leave them out; mend {folder}/adapter_config.json"
            )

    def _part(
        self, folder: Path, config: Mapping[str, Any], name: str, own: Mapping[str, Tensor]
    ) -> _Part:
        rank = int(_by_pattern(config.get("rank_pattern"), name, config["r"]))
        alpha = float(_by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
        layer, a, b = linear_shape(name, self.layers[name]), own["A"], own["B"]
        assert layer is not None
        got, need = (
            (tuple(a.shape), tuple(b.shape)),
            ((rank, layer.n_in), (layer.n_out, rank)),
        )
        if got != need:
            raise UserError(
                f"the adapter in {folder} does not fit the base: A and B of {name} have shapes {got[0]} and {got[1]}, "
                f"needed are {need[0]} and {need[1]}: it is of another rank or base"
            )
        return _Part(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))

    def _less_initial(self, name: str, part: _Part, init: str) -> _Part:
        """Subtract the initial part, which PEFT took out of the base's own weight: [A; A0] and [B, -B0]."""
        if not self.layers[name].get_parameter("weight").is_floating_point():
            raise UserError(
                f"{init} starts from the base's own weights, which are quantised here: convert the adapter with PEFT "
                "(`save_pretrained(path_initial_model_for_weight_conversion=...)`), or name the unquantised base"
            )
        key = (name, part.rank, part.scaling, init)
        if key not in self._initial:
            self._initial[key] = initial_part(self.layers[name], part.rank, part.scaling, init)
        a0, b0 = self._initial[key]
        return _Part(torch.cat([part.a, a0]), torch.cat([part.b, -b0], dim=1), part.scaling)

    def _stack(
        self, folder: Path, parts: Mapping[str, _Part], converted: list[str]
    ) -> tuple[dict[str, Tensor], LoraSpec]:
        """Bring all modules to one rank and factor, and give every module of their kinds a part."""
        rank = max(part.rank for part in parts.values())
        scalings = [part.scaling for part in parts.values()]
        scaling = max(sorted(set(scalings)), key=scalings.count)
        if len({part.rank for part in parts.values()}) > 1 or len(set(scalings)) > 1:
            converted.append(f"ranks and alphas by module, as rank {rank}")
        outside = sorted(parts.keys() - set(text_layers(self.model)))
        if outside:
            raise UserError(
                f"the adapter in {folder} adapts {outside[0]}, which is no part of the text model: make it without"
            )
        kinds = sorted({name.rsplit(".", 1)[-1] for name in parts})
        spec = LoraSpec.from_model(self.model, rank, _plain_number(scaling * rank), kinds)
        if len(parts) < len(spec.modules):
            converted.append(f"{len(spec.modules) - len(parts)} layers without an adapter, as 0")
        state = {}
        for shape in spec.modules:
            part = parts.get(shape.name) or _nothing(shape, scaling)
            a, b = part.to_rank(rank, scaling)
            state[f"{PEFT_PREFIX}{shape.name}.lora_A.weight"] = a.contiguous()
            state[f"{PEFT_PREFIX}{shape.name}.lora_B.weight"] = b.contiguous()
        return state, spec


@contextmanager
def _config_errors(folder: Path) -> Iterator[None]:
    """Turn what fields of odd types and values raise, here and in PEFT, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError, re.error) as error:
        raise UserError(
            f"{folder}/{ADAPTER_CONFIG} cannot be used ({brief(error)}): make or fetch the adapter again"
        ) from error


def read_external(folder: Path, model: nn.Module) -> PlainAdapter:
    """Read one adapter of a base as plain LoRA. Raises UserError as `AdapterReader.read`."""
    return AdapterReader(model).read(folder)


def targeted(model: nn.Module, config: Mapping[str, Any]) -> set[str]:
    """Return the names of the modules that PEFT adapts in a base by an adapter's config."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    leaves = {n: m for n, m in model.named_modules() if n and not any(m.children())}
    targets = config["target_modules"]
    if targets == "all-linear":
        head = head_of(model)
        targets = [n for n, m in leaves.items() if linear_shape(n, m) and m is not head]
    names = ("exclude_modules", "layers_to_transform", "layers_pattern")
    more = {name: config[name] for name in names if not is_empty(config.get(name))}
    own = LoraConfig(target_modules=targets, **more)
    return {name for name in leaves if check_target_module_exists(own, name)}


def initial_part(layer: nn.Module, rank: int, scaling: float, init: str) -> tuple[Tensor, Tensor]:
    """Return the A [R, in] and B [out, R] that PEFT starts an adapter of this layer with."""
    from peft import LoraConfig, inject_adapter_in_model

    shape, weight = linear_shape("", layer), layer.get_parameter("weight").detach().cpu()
    assert shape is not None
    copy = nn.Linear(shape.n_in, shape.n_out, bias=False, dtype=weight.dtype)
    copy.weight.data = weight.T.contiguous() if shape.is_transposed else weight.clone()
    holder = nn.Sequential(copy)
    config = LoraConfig(
        r=rank,
        lora_alpha=scaling * rank,  # type: ignore[arg-type]
        target_modules=["0"],
        init_lora_weights=init,  # type: ignore[arg-type]
    )
    inject_adapter_in_model(config, holder)
    own: Any = holder[0]
    a, b = own.lora_A["default"].weight, own.lora_B["default"].weight
    return a.detach().float(), b.detach().float()


def _by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of the first pattern that a module's name ends with, as PEFT matches them."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _nothing(shape: LinearShape, scaling: float) -> _Part:
    return _Part(torch.zeros(0, shape.n_in), torch.zeros(shape.n_out, 0), scaling)


def _plain_number(value: float) -> float:
    """Return a whole number where rounding alone keeps the value from being one."""
    return float(round(value)) if math.isclose(value, round(value), rel_tol=1e-12) else value


def _alike(own: Tensor, saved: Tensor) -> bool:
    """Say if saved weights are the base's own, to the precision of the coarser of the two."""
    own = own.detach().cpu()
    return torch.equal(own.to(saved.dtype), saved) or torch.equal(own, saved.to(own.dtype))
