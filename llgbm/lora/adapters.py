"""LoRA adapters: which Linear layers they touch, their shapes and key names, PEFT files, stacks of many adapters.

Shapes: A adapters, R rank, V values of a whole adapter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from llgbm.lora.plain import check_plain, check_types
from llgbm.lora.shapes import LoraSpec
from llgbm.runtime import UserError, split_revision
from llgbm.system.documents import decode, parse_json
from llgbm.system.lineage import card, signed, with_lineage
from llgbm.system.output import ADAPTER_PATTERNS, CARD, Output

PEFT_PREFIX = "base_model.model."
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_PICKLE = "adapter_model.bin"
_KEY = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.\w+)?\.weight$"
)
# Kinds of numbers that weights are read in; whole numbers are those of quantised adapters.
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
StateDict = Mapping[str, Tensor]


@dataclass(frozen=True)
class LoraBatch:
    """Adapters at once: `a[module]` is [A, R, in], `b[module]` is [A, out, R].

    `source` are the flat adapters whose views they are, with the shapes of their order.
    """

    a: dict[str, Tensor]
    b: dict[str, Tensor]
    source: tuple[LoraSpec, Tensor] | None = field(
        default=None, repr=False, compare=False, kw_only=True
    )

    def __post_init__(self) -> None:
        if not self.a or self.a.keys() != self.b.keys():
            raise ValueError(
                f"an adapter batch needs A and B for the same modules, got {len(self.a)} A, {len(self.b)} B"
            )

    @property
    def n_adapters(self) -> int:
        return next(iter(self.a.values())).shape[0]

    @classmethod
    def from_state_dicts(cls, states: Sequence[StateDict]) -> LoraBatch:
        """Stack PEFT state dicts (keys with or without `base_model.model.`).

        Raises ValueError for no adapter at all, foreign keys, and adapters that differ in keys or shapes.
        """
        if not states:
            raise ValueError("no adapter to stack: a batch needs at least one state dict")
        parsed = [_parse_state(state) for state in states]
        for index, (a, b) in enumerate(parsed):
            _check_alike(index, {"A": a, "B": b}, {"A": parsed[0][0], "B": parsed[0][1]})
        names = list(parsed[0][0])
        return cls(
            {n: torch.stack([a[n] for a, _ in parsed]) for n in names},
            {n: torch.stack([b[n] for _, b in parsed]) for n in names},
        )

    def to_state_dicts(self, prefix: str = PEFT_PREFIX) -> list[dict[str, Tensor]]:
        """One PEFT state dict an adapter; the way back from `from_state_dicts`."""
        return [
            {
                f"{prefix}{name}.lora_{side}.weight": stack[name][index].contiguous()
                for name in self.a
                for side, stack in (("A", self.a), ("B", self.b))
            }
            for index in range(self.n_adapters)
        ]

    def flatten(self, spec: LoraSpec) -> Tensor:
        """[A, V], matrix after matrix in the order of `spec.pieces`. Raises ValueError where a shape differs."""
        self.check(spec)
        sides = {"A": self.a, "B": self.b}
        return torch.cat([sides[side][name].flatten(1) for name, side, _ in spec.pieces], dim=1)

    @classmethod
    def unflatten(cls, spec: LoraSpec, values_AV: Tensor) -> LoraBatch:
        """Way back from `flatten`; differentiable, no copy. Raises ValueError for a wrong width."""
        if values_AV.ndim != 2 or values_AV.shape[1] != spec.n_values:
            raise ValueError(
                f"flat adapters have shape {tuple(values_AV.shape)}; the spec needs [A, {spec.n_values}]"
            )
        parts = values_AV.split(spec.piece_sizes, dim=1)
        sides: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
        for (name, side, shape), part in zip(spec.pieces, parts, strict=True):
            sides[side][name] = part.unflatten(1, shape)
        return cls(sides["A"], sides["B"], source=(spec, values_AV))

    def select(self, index: Tensor | slice | list[int]) -> LoraBatch:
        """Adapters at `index`, as a batch."""
        return LoraBatch(
            {n: t[index] for n, t in self.a.items()}, {n: t[index] for n, t in self.b.items()}
        )

    def packed(self) -> LoraBatch:
        """Return the batch with each stack contiguous: a copy where it is a view of a table."""
        return LoraBatch(
            {n: t.contiguous() for n, t in self.a.items()},
            {n: t.contiguous() for n, t in self.b.items()},
        )

    def to(self, device: str | torch.device) -> LoraBatch:
        return LoraBatch(
            {n: t.to(device) for n, t in self.a.items()},
            {n: t.to(device) for n, t in self.b.items()},
        )

    def check(self, spec: LoraSpec) -> None:
        """Raise ValueError unless modules and shapes are those of `spec`."""
        wanted = {m.name for m in spec.modules}
        if self.a.keys() != wanted:
            odd = sorted(self.a.keys() ^ wanted)
            raise ValueError(
                f"{len(odd)} modules of the adapter and of the base differ, such as {odd[0]}: another base?"
            )
        for m in spec.modules:
            got = (tuple(self.a[m.name].shape[1:]), tuple(self.b[m.name].shape[1:]))
            need = ((spec.rank, m.n_in), (m.n_out, spec.rank))
            if got != need:
                raise ValueError(
                    f"{m.name}: A and B have shapes {got[0]} and {got[1]}, needed are {need[0]} and {need[1]}: "
                    "the adapter is of another rank or base"
                )


def _parse_state(state: StateDict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    sides: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    for key, tensor in state.items():
        match = _KEY.match(key)
        if match is None:
            raise ValueError(
                f"{key!r} is no LoRA weight key: expected '….lora_A.weight' or '….lora_B.weight'"
            )
        sides[match["side"]][match["module"]] = tensor
    if not sides["A"] or sides["A"].keys() != sides["B"].keys():
        raise ValueError(
            f"{len(sides['A'])} lora_A and {len(sides['B'])} lora_B keys: each module needs one of both"
        )
    return sides["A"], {name: sides["B"][name] for name in sides["A"]}


def _check_alike(
    index: int, got: dict[str, dict[str, Tensor]], first: dict[str, dict[str, Tensor]]
) -> None:
    for side in ("A", "B"):
        if got[side].keys() != first[side].keys():
            odd = sorted(got[side].keys() ^ first[side].keys())
            raise ValueError(
                f"adapter {index} and adapter 0 differ in {len(odd)} modules, such as {odd[0]}"
            )
        for name, tensor in got[side].items():
            if tensor.shape != first[side][name].shape:
                raise ValueError(
                    f"{name}.lora_{side} is {tuple(tensor.shape)} in adapter {index} and "
                    f"{tuple(first[side][name].shape)} in adapter 0: adapters of one batch share rank and base"
                )


def adapter_config(spec: LoraSpec, base: str) -> dict[str, Any]:
    """Return `adapter_config.json`: the fields of plain LoRA; `base` is a folder, a hub id, or id@revision.

    PEFT fills in the other fields. It is not asked: importing it takes longer than generating an adapter.
    """
    name, revision = split_revision(base)
    alpha = int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
        "r": spec.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(spec.target_modules),
        "bias": "none",
        "fan_in_fan_out": spec.is_transposed,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def pack_weights(
    state: StateDict, config: Mapping[str, Any], lineage: Mapping[str, Any] | None = None
) -> tuple[bytes, Mapping[str, Any] | None]:
    """Return the content of a weights file, and the lineage in its metadata with the hashes of both files."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    if lineage is None:
        return save(tensors, {"format": "pt"}), None
    content = save(tensors)
    lineage = signed(lineage, content, config)
    return with_lineage(content, lineage), lineage


def write_adapter_files(
    folder: Path,
    state: StateDict,
    config: Mapping[str, Any],
    lineage: Mapping[str, Any] | None = None,
    with_card: bool = True,
) -> None:
    """Write one adapter's weights and config into an existing folder; with a lineage its card, too."""
    content, lineage = pack_weights(state, config, lineage)
    (folder / ADAPTER_WEIGHTS).write_bytes(content)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
    if lineage and with_card:
        (folder / CARD).write_text(card(lineage, config), encoding="utf-8")


def adapter_output(folder: str | Path) -> Output:
    """Check a folder that an adapter will be written to. Raises UserError as `save_adapter`."""
    return Output(folder, ADAPTER_PATTERNS)


def save_adapter(folder: Path, state: StateDict, config: Mapping[str, Any]) -> None:
    """Write an adapter as a PEFT folder, whole or not at all.

    Raises UserError for an unwritable folder, and one with an adapter that this program did not write.
    """
    with adapter_output(folder).writing() as stage:
        write_adapter_files(stage, state, config)


def load_adapter(folder: Path, spec: LoraSpec | None = None) -> dict[str, Tensor]:
    """Read the state dict of a plain adapter as float32; `lora.external` reads those of others.

    Raises UserError as `read_adapter_weights` and, where a `spec` is given, for another rank, alpha or base shape, or a
    kind of LoRA whose factor on B A is not alpha / rank.
    """
    state = {key: tensor.float() for key, tensor in read_adapter_weights(folder).items()}
    if spec is not None:
        _check_adapter(folder, state, spec)
    return state


def read_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of one adapter as they are saved.

    Raises UserError for a missing, truncated or foreign file, for whole numbers, and for NaN or infinite values.
    """
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        if (folder / ADAPTER_PICKLE).is_file():
            raise UserError(
                f"{folder} holds {ADAPTER_PICKLE}, a pickle, which is not read here: load it with PEFT and save it "
                f"again, which writes {ADAPTER_WEIGHTS}"
            )
        raise UserError(f"{folder} holds no {ADAPTER_WEIGHTS}: name the folder of a PEFT adapter")
    try:
        state = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{weights} is truncated or no safetensors file ({error}): make or fetch it again"
        ) from error
    for key, tensor in state.items():
        if tensor.dtype not in FLOATS:
            raise UserError(
                f"{weights} holds {key} as {str(tensor.dtype).removeprefix('torch.')}: a quantised adapter cannot be "
                "read here; save it as float32, float16 or bfloat16"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{weights} holds NaN or infinite values in {key}: train this adapter again or leave it out"
            )
    return state


def _check_adapter(folder: Path, state: StateDict, spec: LoraSpec) -> None:
    try:
        LoraBatch.from_state_dicts([state]).check(spec)
    except ValueError as error:
        raise UserError(f"the adapter in {folder} does not fit the base: {error}") from error
    config = read_adapter_config(folder)
    check_plain(folder, config, convert=False)
    check_scale(folder, LoraSpec(spec.modules, config["r"], config["lora_alpha"]), spec)


def check_scale(folder: Path, found: LoraSpec, spec: LoraSpec) -> None:
    """Raise UserError unless an adapter has the rank and alpha of `spec`."""
    if (found.rank, found.alpha) != (spec.rank, float(spec.alpha)):
        raise UserError(
            f"the adapter in {folder} has rank {found.rank} and alpha {found.alpha:g}; "
            f"here they are {spec.rank} and {spec.alpha:g}: leave it out or set rank and alpha to match"
        )


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json`; r is an int, lora_alpha a float. Raises UserError for a missing or foreign file."""
    config_file = folder / ADAPTER_CONFIG
    try:
        config = parse_json(decode(config_file.read_bytes()))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        check_types(config)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{folder} holds no {ADAPTER_CONFIG}: name the folder of a PEFT adapter"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(
            f"{config_file} is no adapter config ({error}): make or fetch the adapter again"
        ) from error
    base = config.get("base_model_name_or_path") or ""
    named = {"revision": None, **config, "base_model_name_or_path": base}
    return {**named, "r": rank, "lora_alpha": alpha}
