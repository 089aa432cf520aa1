"""The bank: a folder of teacher adapters with a manifest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llgbm.cache import describe_file, write_json
from llgbm.lora.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    LoraBatch,
    LoraSpec,
    StateDict,
    adapter_config,
    load_adapter,
    write_adapter_files,
)
from llgbm.models.load import Base
from llgbm.output import STAGE, Output, check_name, disk_errors, flush, flush_tree, make_folders
from llgbm.probes import Probe, ProbeSet
from llgbm.runtime import UserError, content_hash, say
from llgbm.tasks.suite import Suite

FORMAT_VERSION = 1
MANIFEST, PROMPTS, LISTING, TRAJECTORIES = (
    "manifest.json",
    "prompts.json",
    "bank.json",
    "trajectories.json",
)
ADAPTER_FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, PROMPTS)
# Where an adapter of a bank is made ready, and what else may lie in a folder that a bank is started in.
ASIDE, LOCK = f"{STAGE}bank", ".lock"
EMPTY = {LOCK, ASIDE, "lost+found"}
Prompts = dict[str, list[str]]


@dataclass(frozen=True)
class BankFolder:
    """A bank that adapters are added to one by one."""

    folder: Path
    base: Base
    spec: LoraSpec
    settings: Mapping[str, Any]

    @property
    def head(self) -> dict[str, Any]:
        """What all adapters of the folder have in common."""
        return {
            "version": FORMAT_VERSION,
            "base": {"path": self.base.path, "hash": self.base.hash},
            "rank": self.spec.rank,
            "alpha": self.spec.alpha,
            "target_modules": list(self.spec.target_modules),
            "settings": dict(self.settings),
        }

    @contextmanager
    def opened(self, keep_half: bool = True) -> Iterator[None]:
        """Keep other programs from writing here meanwhile, and start or check the manifest.

        A bank that is started here and fails with no adapter in it is taken away again, and with `keep_half` off one
        with adapters too. Raises UserError for a folder that holds a bank of other settings, or that another program
        writes to.
        """
        address = check_bank_address(self.folder)
        with disk_errors(address.path):
            made = make_folders(address.folder)
            try:
                with FileLock(self.folder / LOCK, timeout=0):
                    is_new = not (self.folder / MANIFEST).exists()
                    try:
                        self._start_or_check()
                        yield
                    except BaseException:
                        if is_new and not (keep_half and self.adapters):
                            self._take_away()
                        raise
            except Timeout as error:
                raise UserError(
                    f"another program is writing to {self.folder}: wait for it, or name another"
                ) from error
            finally:
                for folder in made:  # those that stayed empty
                    with suppress(OSError):
                        folder.rmdir()

    @property
    def adapters(self) -> dict[str, Any]:
        """What the manifest lists; nothing where there is none."""
        return read_manifest(self.folder)["adapters"] if (self.folder / MANIFEST).exists() else {}

    def _take_away(self) -> None:
        """Remove what was written since the bank was started; files of others stay."""
        places = [
            self.folder / "checkpoints" / entry["task"] / i for i, entry in self.adapters.items()
        ]
        files = [place / name for place in places for name in ADAPTER_FILES]
        files += [self.folder / name for name in (LISTING, TRAJECTORIES, MANIFEST, LOCK)]
        shutil.rmtree(self.folder / ASIDE, ignore_errors=True)
        for file in files:
            file.unlink(missing_ok=True)
        tasks = {place.parent for place in places}
        for folder in (*places, *tasks, self.folder / "checkpoints"):
            with suppress(OSError):
                folder.rmdir()

    def _start_or_check(self) -> None:
        if not (self.folder / MANIFEST).exists():
            return write_json(self.folder / MANIFEST, {**self.head, "adapters": {}})
        found = read_manifest(self.folder)
        differ = [
            name
            for name, value in json.loads(json.dumps(self.head)).items()
            if found.get(name) != value
            and not (name == "base" and found["base"]["hash"] == self.base.hash)
        ]
        if differ:
            raise UserError(
                f"{self.folder} holds a bank of another {' and '.join(differ)}: name another folder or the same options"
            )

    def missing(self, adapter_ids: Sequence[str]) -> list[str]:
        """Those that are not there, or no longer what the manifest says."""
        listed = read_manifest(self.folder)["adapters"]
        return [
            i for i in adapter_ids if i not in listed or not _is_whole(self.folder, i, listed[i])
        ]

    def add(
        self,
        adapter_id: str,
        task: str,
        state: StateDict,
        prompts: Prompts,
        facts: Mapping[str, Any],
    ) -> None:
        """Write an adapter and its line in the manifest; a torn one that the manifest lists is made whole.

        The line comes first: an adapter that a kill kept from its place is then missing, and what lies in a place
        without a line is of others. Raises UserError for such a place.
        """
        own = (
            self.folder
            / "checkpoints"
            / check_name(task, "the task")
            / check_name(adapter_id, "the adapter")
        )
        manifest = read_manifest(self.folder)
        if adapter_id not in manifest["adapters"] and os.path.lexists(own):
            raise UserError(
                f"{own} is none of the bank's adapters: move it away, or name another folder"
            )
        stage = self.folder / ASIDE
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        write_adapter_files(stage, state, adapter_config(self.spec, self.base.path))
        (stage / PROMPTS).write_text(json.dumps(prompts))
        digest = describe_file(stage / ADAPTER_WEIGHTS)[1]
        manifest["adapters"][adapter_id] = {"task": task, "sha256": digest, **facts}
        flush_tree(stage)
        write_json(self.folder / MANIFEST, manifest)
        own.mkdir(parents=True, exist_ok=True)
        for name in (PROMPTS, ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            os.replace(stage / name, own / name)
        flush(own)
        stage.rmdir()


def check_bank_address(folder: Path) -> Output:
    """Check a folder that a bank will be written to, before anything else.

    Raises UserError where it cannot be written, or holds something that is no bank.
    """
    address = Output(folder, ())
    with disk_errors(address.path):
        found = set(os.listdir(address.folder)) - EMPTY if address.folder.exists() else set()
    if found and MANIFEST not in found:
        raise UserError(
            f"{folder} is not empty and no bank (it has no {MANIFEST}): name another folder"
        )
    if found:
        read_manifest(address.folder)
    return address


def _is_whole(folder: Path, adapter_id: str, entry: Mapping[str, Any]) -> bool:
    own = folder / "checkpoints" / entry["task"] / adapter_id
    weights = own / ADAPTER_WEIGHTS
    others = all((own / name).is_file() for name in (ADAPTER_CONFIG, PROMPTS))
    return others and weights.is_file() and describe_file(weights)[1] == entry["sha256"]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a bank. Raises UserError where there is none, or a foreign one."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        known = {
            name: manifest[name]
            for name in ("version", "base", "rank", "alpha", "target_modules", "adapters")
        }
        if not isinstance(known["adapters"], dict) or known["version"] != FORMAT_VERSION:
            raise ValueError(f"version {known['version']}")
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no {MANIFEST}: name the folder of a bank") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is torn or of another version: make the bank again") from error
    return manifest


def open_bank(folder: Path, base: Base) -> Bank:
    """A bank with a manifest, checked against a base.

    Raises UserError for a bank of another base, one that is not finished, and an adapter that is torn, naming it.
    """
    manifest = read_manifest(folder)
    if manifest["base"]["hash"] != base.hash:
        raise UserError(
            f"the bank {folder} is of the base {manifest['base']['path']}, not of {base.path}: name that"
        )
    spec = LoraSpec.from_model(
        base.model, manifest["rank"], manifest["alpha"], manifest["target_modules"]
    )
    for adapter_id, entry in manifest["adapters"].items():
        if not _is_whole(folder, adapter_id, entry):
            raise UserError(
                f"adapter {adapter_id} of {folder} is torn or missing: run the command that made it again"
            )
    return Bank.open(folder, spec, bank_hash(folder))


def bank_hash(folder: Path) -> str:
    """What the deltas of a bank are named by: its weights and prompts."""
    adapters = read_manifest(folder)["adapters"]
    prompts = {
        i: describe_file(folder / "checkpoints" / e["task"] / i / PROMPTS)[1]
        for i, e in adapters.items()
    }
    return content_hash(
        "bank folder", FORMAT_VERSION, {i: e["sha256"] for i, e in adapters.items()}, prompts
    )


def show_bank(folder: Path) -> dict[str, Any]:
    """What a bank holds, task by task, and which adapters are torn. Raises UserError as `read_manifest`."""
    manifest = read_manifest(folder)
    adapters = manifest["adapters"]
    tasks: dict[str, int] = {}
    for entry in adapters.values():
        tasks[entry["task"]] = tasks.get(entry["task"], 0) + 1
    return {
        "folder": str(folder),
        **{name: manifest[name] for name in ("base", "rank", "alpha", "target_modules")},
        "adapters": len(adapters),
        "tasks": tasks,
        "sources": {i: e["source"] for i, e in adapters.items() if "source" in e},
        "torn": [i for i, e in adapters.items() if not _is_whole(folder, i, e)],
        "finished": (folder / LISTING).is_file(),
    }


@dataclass(frozen=True)
class Bank:
    """A bank on disk: `checkpoints/{task}/{task}_{idx}/` with weights, config and the prompts that condition on it."""

    folder: Path
    hash: str
    spec: LoraSpec
    adapters: Mapping[str, str]

    @classmethod
    def open(cls, folder: Path, spec: LoraSpec, key: str) -> Bank:
        """Read the list of adapters. Raises UserError where the folder is no bank."""
        index = folder / "bank.json"
        if not index.is_file():
            raise UserError(f"{folder} is no bank of adapters (it has no bank.json)")
        return cls(folder, key, spec, json.loads(index.read_text())["adapters"])

    def adapter_folder(self, adapter_id: str) -> Path:
        return self.folder / "checkpoints" / self.adapters[adapter_id] / adapter_id

    def load(self) -> LoraBatch:
        """All adapters, checked. Raises UserError for one that is torn, not finite or of another rank or base."""
        return LoraBatch.from_state_dicts(
            [load_adapter(self.adapter_folder(i), self.spec) for i in self.adapters]
        )

    def prompts(self, adapter_id: str) -> dict[str, list[str]]:
        """The unlabelled prompts of an adapter, by purpose: `train` and `evaluation`."""
        return json.loads((self.adapter_folder(adapter_id) / "prompts.json").read_text())

    @property
    def facts(self) -> dict[str, float]:
        """What was measured when the bank was made, such as `teacher_accuracy`."""
        return json.loads((self.folder / "bank.json").read_text())["facts"]

    def trajectories(self) -> ProbeSet:
        """Each task's prompts, continued by its first teacher's own greedy answers."""
        stored = json.loads((self.folder / "trajectories.json").read_text())
        return ProbeSet.trajectories(
            {task: [Probe(p, a) for p, a in pairs] for task, pairs in stored.items()}
        )


@dataclass(frozen=True)
class BankSource:
    """A bank that is opened, not built: where it lies, and a hash of its weights and prompts."""

    path: str = field(compare=False)
    hash: str

    @classmethod
    def find(cls, folder: str) -> BankSource:
        """Find a bank with a manifest. Raises UserError where the folder holds none."""
        return cls(str(Path(folder).expanduser().resolve()), bank_hash(Path(folder).expanduser()))

    def open(self, base: Base, suite: Suite) -> Bank:
        """The bank's adapters of the suite's tasks. Raises UserError for a task without any, and as `open_bank`."""
        bank = open_bank(Path(self.path), base)
        if bank.hash != self.hash:
            raise UserError(
                f"the bank {self.path} changed since this run was planned: start it again"
            )
        wanted = set(suite.split.tasks)
        if missing := sorted(wanted - set(bank.adapters.values())):
            raise UserError(
                f"the bank {self.path} has no adapter of {', '.join(missing)}: add some or leave these out"
            )
        adapters = {
            adapter_id: task for adapter_id, task in bank.adapters.items() if task in wanted
        }
        if len(adapters) < len(bank.adapters):
            say(
                f"{len(bank.adapters) - len(adapters)} adapters of the bank are of other tasks and are left out"
            )
        return replace(
            bank,
            adapters=adapters,
            hash=content_hash("adapters of a bank", bank.hash, list(adapters)),
        )
