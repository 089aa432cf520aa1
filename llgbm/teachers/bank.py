"""Read a bank of teacher adapters, a folder of one format.

`manifest.json` lists the adapters with their task and the SHA-256 of their weights, and what was measured once all of
them were there. `checkpoints/{task}/{task}_{idx}/` holds weights, config and prompts of each adapter, and
`trajectories.json` each task's prompts with the answers of its first teacher.

Banks of version 1, which list their finished adapters in `bank.json` beside the manifest (or, in caches, instead of
it), are read as they are.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llgbm.lora.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    LoraBatch,
    LoraSpec,
    load_adapter,
)
from llgbm.models.load import Base
from llgbm.probes import Probe, ProbeSet
from llgbm.runtime import UserError, content_hash, say
from llgbm.system.cache import describe_file
from llgbm.system.documents import check_format
from llgbm.tasks.suite import Suite

FORMAT_VERSION = 2
# Bank hashes leave the format out, so that a bank keeps its hash when its manifest is written in a newer one.
HASH_VERSION = 2
MANIFEST, PROMPTS, TRAJECTORIES = "manifest.json", "prompts.json", "trajectories.json"
OLD_LISTING = "bank.json"
CHECKPOINTS = "checkpoints"
COMMON = ("base", "rank", "alpha", "target_modules")
Prompts = dict[str, list[str]]
Manifest = dict[str, Any]


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a bank. Raises UserError for a missing or torn one, or a newer one."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8-sig"))
        check_format(manifest["version"], FORMAT_VERSION, f"the bank in {folder}")
        if manifest["version"] == 1:
            manifest = _upgraded(manifest, folder)
        needed = {name: manifest[name] for name in (*COMMON, "adapters", "measured")}
        if not isinstance(needed["adapters"], dict):
            raise ValueError("its adapters are no table")
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no {MANIFEST}: name the folder of a bank") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is torn: make the bank again") from error
    return manifest


def _upgraded(manifest: Manifest, folder: Path) -> Manifest:
    """Return a manifest of version 1 as one of today, with what its `bank.json` says."""
    measured, adapters = None, manifest["adapters"]
    if (folder / OLD_LISTING).is_file():
        measured = json.loads((folder / OLD_LISTING).read_text(encoding="utf-8-sig"))
        adapters = {adapter_id: adapters[adapter_id] for adapter_id in measured.pop("adapters")}
    return {**manifest, "version": FORMAT_VERSION, "adapters": adapters, "measured": measured}


def _read_cached(folder: Path) -> Manifest:
    """Read the manifest of a cache entry; those of version 1 have `bank.json` alone."""
    if (folder / MANIFEST).is_file():
        return read_manifest(folder)
    measured = json.loads((folder / OLD_LISTING).read_text(encoding="utf-8-sig"))
    adapters = {i: {"task": task} for i, task in measured.pop("adapters").items()}
    return {"version": FORMAT_VERSION, "adapters": adapters, "measured": measured}


def adapter_folder(folder: Path, adapter_id: str, task: str) -> Path:
    """Return the folder of one adapter of a bank."""
    return folder / CHECKPOINTS / task / adapter_id


def is_whole(folder: Path, adapter_id: str, entry: Mapping[str, Any]) -> bool:
    """Say if the files of an adapter are there and its weights are those that the manifest lists."""
    own = adapter_folder(folder, adapter_id, entry["task"])
    if not all((own / name).is_file() for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG, PROMPTS)):
        return False
    return describe_file(own / ADAPTER_WEIGHTS)[1] == entry["sha256"]


def bank_hash(folder: Path) -> str:
    """Hash the content of a bank: weights, prompts, scaling and trajectories. Its deltas are named by that."""
    manifest = read_manifest(folder)
    shape = [manifest[name] for name in ("rank", "alpha", "target_modules")]
    return _content(folder, shape, manifest["adapters"])


def _content(folder: Path, shape: Sequence[Any], entries: Mapping[str, Mapping[str, Any]]) -> str:
    adapters = []
    for adapter_id, entry in entries.items():
        own = adapter_folder(folder, adapter_id, entry["task"])
        weights = entry.get("sha256") or describe_file(own / ADAPTER_WEIGHTS)[1]
        adapters.append([adapter_id, entry["task"], weights, _read_json(own / PROMPTS)])
    return content_hash("bank", HASH_VERSION, shape, adapters, _read_json(folder / TRAJECTORIES))


def _read_json(path: Path) -> Any:
    """Read a file of JSON, None where there is none. Raises UserError for a torn one."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is torn: run the command that made the bank again") from error


def show_bank(folder: Path) -> dict[str, Any]:
    """Return the contents of a bank, task by task, with its torn adapters. Raises UserError as `read_manifest`."""
    manifest = read_manifest(folder)
    adapters = manifest["adapters"]
    return {
        "folder": str(folder),
        **{name: manifest[name] for name in COMMON},
        "adapters": len(adapters),
        "tasks": dict(Counter(entry["task"] for entry in adapters.values())),
        "sources": {i: entry["source"] for i, entry in adapters.items() if "source" in entry},
        "torn": [i for i, entry in adapters.items() if not is_whole(folder, i, entry)],
        "finished": manifest["measured"] is not None,
        "cut_answers": (manifest["measured"] or {}).get("cut_answers"),
    }


@dataclass(frozen=True)
class Bank:
    """Finished bank: its folder, its hash, the shapes of its adapters, and the task of each."""

    folder: Path
    hash: str
    spec: LoraSpec
    adapters: Mapping[str, str]

    @classmethod
    def open(cls, folder: Path, base: Base) -> Bank:
        """Open a bank after checking it against a base.

        Raises UserError for a bank of another base, an unfinished one, and a torn adapter, naming it.
        """
        manifest = read_manifest(folder)
        if not base.is_named(manifest["base"]["hash"]):
            raise UserError(
                f"the bank {folder} is of the base {manifest['base']['path']}, not of {base.path}: name that"
            )
        shapes = (manifest["rank"], manifest["alpha"], manifest["target_modules"])
        for adapter_id, entry in manifest["adapters"].items():
            if not is_whole(folder, adapter_id, entry):
                raise UserError(
                    f"adapter {adapter_id} of {folder} is torn or missing: run the command that made it again"
                )
        if manifest["measured"] is None:
            raise UserError(
                f"the bank {folder} is not finished: run the command that made it again"
            )
        spec = LoraSpec.from_model(base.model, *shapes)
        return cls(folder, bank_hash(folder), spec, _tasks(manifest))

    @classmethod
    def cached(cls, folder: Path, spec: LoraSpec) -> Bank:
        """Open the bank of a cache entry, whose files and base the cache answers for."""
        manifest = _read_cached(folder)
        shape = (spec.rank, spec.alpha, spec.target_modules)
        return cls(folder, _content(folder, shape, manifest["adapters"]), spec, _tasks(manifest))

    def adapter_folder(self, adapter_id: str) -> Path:
        return adapter_folder(self.folder, adapter_id, self.adapters[adapter_id])

    def load(self) -> LoraBatch:
        """Load all adapters. Raises UserError for one that is torn, not finite or of another rank or base."""
        states = [load_adapter(self.adapter_folder(i), self.spec) for i in self.adapters]
        return LoraBatch.from_state_dicts(states)

    def prompts(self, adapter_id: str) -> Prompts:
        """Return the unlabelled prompts of an adapter by purpose: `train` and `evaluation`."""
        return json.loads(
            (self.adapter_folder(adapter_id) / PROMPTS).read_text(encoding="utf-8-sig")
        )

    @property
    def facts(self) -> dict[str, float]:
        """Return what was measured when the bank was made, such as `teacher_accuracy`."""
        return _read_cached(self.folder)["measured"]["facts"]

    @property
    def cut_answers(self) -> int | None:
        """Count the teachers' answers that were cut at their limit; None in banks that were made without counting."""
        return _read_cached(self.folder)["measured"].get("cut_answers")

    def trajectories(self) -> ProbeSet:
        """Return each task's prompts, continued by its first teacher's own greedy answers."""
        stored = json.loads((self.folder / TRAJECTORIES).read_text(encoding="utf-8-sig"))
        probes = {}
        for task, pairs in stored.items():
            probes[task] = [Probe(prompt, answer) for prompt, answer in pairs]
        return ProbeSet.trajectories(probes)


def _tasks(manifest: Manifest) -> dict[str, str]:
    return {adapter_id: entry["task"] for adapter_id, entry in manifest["adapters"].items()}


@dataclass(frozen=True)
class BankSource:
    """Bank that a plan names: its folder, and a hash of its weights and prompts."""

    path: str = field(compare=False)
    hash: str

    @classmethod
    def find(cls, folder: str) -> BankSource:
        """Find a bank. Raises UserError where the folder holds none."""
        path = Path(folder).expanduser()
        return cls(str(path.resolve()), bank_hash(path))

    def open(self, base: Base, suite: Suite) -> Bank:
        """Open the bank, its adapters of the suite's tasks only.

        Raises UserError for a task without any, for a bank that changed, and as `Bank.open`.
        """
        bank = Bank.open(Path(self.path), base)
        if bank.hash != self.hash:
            raise UserError(
                f"the bank {self.path} changed since this run was planned: start it again"
            )
        wanted = set(suite.split.tasks)
        if missing := sorted(wanted - set(bank.adapters.values())):
            raise UserError(
                f"the bank {self.path} has no adapter of {', '.join(missing)}: add some or leave these out"
            )
        adapters = {i: task for i, task in bank.adapters.items() if task in wanted}
        left_out = len(bank.adapters) - len(adapters)
        if left_out:
            say(f"{left_out} adapters of the bank are of other tasks and are left out")
        key = content_hash("adapters of a bank", bank.hash, list(adapters))
        return replace(bank, adapters=adapters, hash=key)
