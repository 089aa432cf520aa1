"""Delta activations: the shift of the base's last-layer states under an adapter, at marked positions of probes.

    v(M) = mean over probes of the last-layer state of model M at the marked position      [D]
    Δ(M, B) = v(M) - v(B)                                                                  (Delta Activations, 2025)

Teacher and student, base and adapter are all read by `read_states`. Axis letters: see `llgbm`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llgbm.lora import LoraBatch, LoraSpec
from llgbm.lora.adapters import StateDict
from llgbm.lora.apply import Applied, chunks, states_at
from llgbm.models.encoding import encode_pairs, encode_prompts
from llgbm.models.load import Base
from llgbm.probes import Probe, ProbeSet
from llgbm.runtime import UserError, content_hash, progress, release_device_memory
from llgbm.system.cache import build_entry
from llgbm.teachers.bank import Bank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 2


@dataclass(frozen=True)
class EncodedProbes:
    """Probes of each adapter as tensors.

    `ids_APT` holds right-padded ids, `positions_APQ` the marked positions, `valid_APQ` is False for their padding.
    """

    ids_APT: Tensor
    positions_APQ: Tensor
    valid_APQ: Tensor

    def select(
        self, rows: Tensor | slice | list[int], probes: Tensor | slice = slice(None)
    ) -> EncodedProbes:
        """Select adapters, and some probes of each: a slice, or an index [A, K]."""
        parts = (self.ids_APT[rows], self.positions_APQ[rows], self.valid_APQ[rows])
        if isinstance(probes, slice):
            return EncodedProbes(*(t[:, probes] for t in parts))
        at = torch.arange(len(probes))[:, None]
        return EncodedProbes(*(t[at, probes] for t in parts))

    def to(self, device: str | torch.device) -> EncodedProbes:
        return EncodedProbes(
            *(t.to(device) for t in (self.ids_APT, self.positions_APQ, self.valid_APQ))
        )


def last_token_positions(attention_mask: Tensor) -> Tensor:
    """Index [S] of the last real token, whichever side is padded. Raises ValueError for an empty row."""
    if not attention_mask.bool().any(dim=1).all():
        raise ValueError("a text is all padding: it has no last token; leave empty texts out")
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (positions * attention_mask.bool()).argmax(dim=1)


def encode_probes(tokenizer: Any, probe_set: ProbeSet, tasks: Sequence[str]) -> EncodedProbes:
    """Encode the probes of each task's adapter. Raises ValueError unless all tasks have equally many."""
    if probe_set.scope == "shared":
        ids, positions, valid = _encode_probes(tokenizer, probe_set.of("shared"))
        return EncodedProbes(
            *(t[None].expand(len(tasks), *t.shape).contiguous() for t in (ids, positions, valid))
        )
    counts = {len(probe_set.of(task)) for task in tasks}
    if len(counts) != 1:
        raise ValueError(f"tasks have {sorted(counts)} probes; each needs as many as the others")
    parts = _encode_probes(tokenizer, list(chain.from_iterable(map(probe_set.of, tasks))))
    return EncodedProbes(*(t.unflatten(0, (len(tasks), -1)) for t in parts))


def _encode_probes(tokenizer: Any, probes: Sequence[Probe]) -> tuple[Tensor, Tensor, Tensor]:
    continued = [p.continuation is not None for p in probes]
    if all(continued):
        pairs = encode_pairs(tokenizer, [(p.prompt, p.continuation or "") for p in probes])
        marks = pairs.targets_ST >= 0
        counts = marks.sum(1)
        steps = torch.arange(int(counts.max()))[None]
        valid = steps < counts[:, None]
        return pairs.input_ids_ST, (marks.int().argmax(1)[:, None] + steps) * valid, valid
    if any(continued):
        raise ValueError("probes with and without a continuation cannot be read in one set")
    ids, mask = encode_prompts(tokenizer, [p.prompt for p in probes])
    last = last_token_positions(mask)[:, None]
    return ids, last, torch.ones_like(last, dtype=torch.bool)


def read_states(
    model: PreTrainedModel,
    probes: EncodedProbes,
    applied: Applied | None = None,
    layers: Sequence[int] | None = None,
) -> Tensor:
    """Read last-layer states [A, P, Q, D], float32, at the marked positions of every adapter's probes.

    With `layers`, the states [N, A, P, Q, D] after so many blocks each.
    """
    ids_ST, positions_SQ = probes.ids_APT.flatten(0, 1), probes.positions_APQ.flatten(0, 1)
    states = states_at(model, ids_ST, positions_SQ, applied, layers)
    return states.float().unflatten(-3, probes.positions_APQ.shape[:2])


def compute_base_activation(base: Base, probe_set: ProbeSet) -> Tensor:
    """v(B), [D]: mean over shared probes of the base's last-layer state at the marked positions."""
    probes = encode_probes(base.tokenizer, probe_set, ["shared"]).to(base.model.device)
    with torch.no_grad():
        return mean_over_probes(read_states(base.model, probes), probes.valid_APQ)[0]


def compute_adapter_delta(
    base: Base, spec: LoraSpec, adapter: StateDict, probe_set: ProbeSet, base_activation: Tensor
) -> Tensor:
    """Δ of one adapter on shared probes, [D]. Raises ValueError if `base_activation` has another width.

    Source: Xu et al. 2025, "Delta Activations: A Representation for Finetuned Large Language Models" (arXiv
    2509.04442).
    """
    probes = encode_probes(base.tokenizer, probe_set, ["shared"]).to(base.model.device)
    batch = LoraBatch.from_state_dicts([adapter]).to(base.model.device)
    applied = Applied(batch, spec.scaling)
    with torch.no_grad():
        activation = mean_over_probes(read_states(base.model, probes, applied), probes.valid_APQ)[0]
    if activation.shape != base_activation.shape:
        raise ValueError(
            f"the base activation has shape {tuple(base_activation.shape)}, the adapter's {tuple(activation.shape)}: "
            "it was computed with another base"
        )
    return activation - base_activation


def mean_over_probes(values_APQD: Tensor, valid_APQ: Tensor) -> Tensor:
    """Mean [A, D] over the valid marked positions of all probes."""
    weights = valid_APQ.to(values_APQD.dtype)[..., None]
    return (values_APQD * weights).sum((-3, -2)) / weights.sum((-3, -2))


@dataclass(frozen=True)
class DeltaTable:
    """Probes of each adapter, the base's states there (`base_APQD`) and the adapter's shift (`delta_APQD`)."""

    probes: EncodedProbes
    base_APQD: Tensor
    delta_APQD: Tensor

    def select(
        self, rows: Tensor | slice | list[int], probes: Tensor | slice = slice(None)
    ) -> DeltaTable:
        """Select adapters and probes as `EncodedProbes.select` does."""
        chosen = self.probes.select(rows, probes)
        if isinstance(probes, slice):
            return DeltaTable(
                chosen, self.base_APQD[rows][:, probes], self.delta_APQD[rows][:, probes]
            )
        at = torch.arange(len(probes))[:, None]
        return DeltaTable(
            chosen, self.base_APQD[rows][at, probes], self.delta_APQD[rows][at, probes]
        )

    def to(self, device: str | torch.device) -> DeltaTable:
        return DeltaTable(
            self.probes.to(device), self.base_APQD.to(device), self.delta_APQD.to(device)
        )

    @property
    def mean_AD(self) -> Tensor:
        """Δ [A, D]: the mean over probes and positions."""
        return mean_over_probes(self.delta_APQD, self.probes.valid_APQ)


def measure_deltas(
    model: PreTrainedModel,
    spec: LoraSpec,
    batch: LoraBatch,
    probes: EncodedProbes,
    shared: bool,
    chunk: int = 32,
) -> DeltaTable:
    """Read the deltas of A adapters, `chunk` adapters a pass, without gradient.

    With `shared` all adapters have the same probes, and the base is read once. Raises ValueError unless each adapter
    has its row of probes.
    """
    if probes.ids_APT.shape[0] != batch.n_adapters:
        raise ValueError(
            f"{batch.n_adapters} adapters but probes for {probes.ids_APT.shape[0]}: each needs its own row"
        )
    pieces, base_pieces = [], []
    with torch.no_grad():
        if shared:
            base_pieces = [
                read_states(model, probes.select(slice(0, 1))).expand(batch.n_adapters, -1, -1, -1)
            ]
        for rows in progress(chunks(batch.n_adapters, probes.ids_APT[0].numel(), chunk), "deltas"):
            mine = probes.select(rows)
            base_states = base_pieces[0][rows] if shared else read_states(model, mine)
            own = batch.select(rows).packed().to(model.device)
            applied = Applied(own, spec.scaling)
            pieces.append(read_states(model, mine, applied) - base_states)
            if not shared:
                base_pieces.append(base_states)
    return DeltaTable(probes, torch.cat(base_pieces), torch.cat(pieces))


@dataclass(frozen=True)
class DeltaCache:
    """Deltas of a bank on disk: `manifest.json`, `base_activation.npy`, `{adapter_id}.npy` (each [P, Q, D])."""

    folder: Path

    @classmethod
    def build(
        cls,
        root: Path,
        base: Base,
        bank: Bank,
        probe_set: ProbeSet,
        batch: LoraBatch | None = None,
    ) -> DeltaCache:
        """Measure the adapters of a bank, or find their deltas in the cache.

        The key holds base, bank, probes and the version of this code. `batch` is `bank.load()`, where that was called
        before. Raises ValueError for an empty bank.
        """
        batch = bank.load() if batch is None else batch
        if not bank.adapters or len(bank.adapters) != batch.n_adapters:
            raise ValueError(
                f"{len(bank.adapters)} adapter ids for {batch.n_adapters} adapters: each needs one"
            )
        key = deltas_key(base, bank, probe_set)

        def write(entry: Path) -> None:
            tasks = list(bank.adapters.values())
            probes = encode_probes(base.tokenizer, probe_set, tasks).to(base.model.device)
            shared = probe_set.scope == "shared"
            table = measure_deltas(base.model, bank.spec, batch, probes, shared)
            manifest = {
                "version": VERSION,
                "base": base.hash,
                "probe_set": probe_set.hash,
                "probes": probe_set.name,
                "adapters": dict(bank.adapters),
            }
            _write_deltas(entry / "deltas", table, shared, manifest)
            release_device_memory()

        return cls(build_entry(root, "deltas", key, write) / "deltas")

    @property
    def manifest(self) -> dict[str, Any]:
        """Adapters, probes and the base's hash. Raises UserError where there is none."""
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise UserError(
                f"{self.folder} holds no manifest.json: name the folder of a delta cache"
            )
        return json.loads(path.read_text())

    @property
    def base_activation(self) -> Tensor:
        """Base states: [1, P, Q, D] on shared probes, [A, P, Q, D] on each task's own."""
        return torch.from_numpy(np.load(self.folder / "base_activation.npy", allow_pickle=False))

    def per_probe(self, adapter_id: str) -> Tensor:
        """Δ of one adapter per probe and position, [P, Q, D]. Raises UserError for an adapter that is not there."""
        path = self.folder / f"{adapter_id}.npy"
        if not path.is_file():
            raise UserError(
                f"no delta of adapter {adapter_id!r} in {self.folder}: build the cache with its bank"
            )
        return torch.from_numpy(np.load(path, allow_pickle=False))

    def table(self, base: Base, probe_set: ProbeSet) -> DeltaTable:
        """Read all deltas in the manifest's order. Raises UserError for another base or other probes."""
        manifest = self.manifest
        if not base.is_named(manifest["base"]) or manifest["probe_set"] != probe_set.hash:
            raise UserError(
                f"the deltas in {self.folder} belong to another base or probe set: build them again"
            )
        deltas = torch.stack([self.per_probe(adapter_id) for adapter_id in manifest["adapters"]])
        probes = encode_probes(base.tokenizer, probe_set, list(manifest["adapters"].values()))
        return DeltaTable(probes, self.base_activation.expand_as(deltas).contiguous(), deltas)


def deltas_key(base: Base, bank: Bank, probe_set: ProbeSet) -> str:
    """Key of a bank's deltas in the cache: base, bank, probes and code version."""
    return content_hash("deltas", VERSION, base.hash, bank.hash, probe_set.hash, bank.spec)


def _write_deltas(folder: Path, table: DeltaTable, shared: bool, manifest: dict[str, Any]) -> None:
    folder.mkdir()
    base_APQD = table.base_APQD[:1] if shared else table.base_APQD
    np.save(folder / "base_activation.npy", base_APQD.cpu().numpy())
    for adapter_id, delta_PQD in zip(manifest["adapters"], table.delta_APQD, strict=True):
        np.save(folder / f"{adapter_id}.npy", delta_PQD.cpu().numpy())
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
