"""Write a bank of teacher adapters: adapter by adapter, each whole or not at all, and the results last."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

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
from llgbm.models.scoring import greedy_continuations
from llgbm.runtime import UserError, say
from llgbm.system.cache import describe_file, write_json
from llgbm.system.output import (
    STAGE,
    Output,
    check_name,
    disk_errors,
    flush,
    flush_tree,
    make_folders,
)
from llgbm.teachers.bank import (
    CHECKPOINTS,
    FORMAT_VERSION,
    MANIFEST,
    OLD_LISTING,
    PROMPTS,
    TRAJECTORIES,
    Manifest,
    Prompts,
    adapter_folder,
    is_whole,
    read_manifest,
)

# Weights come last: an adapter counts once they are there.
ADAPTER_FILES = (PROMPTS, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
# Where an adapter of a bank is made ready, and what else may lie in a folder that a bank is started in.
ASIDE, LOCK = f"{STAGE}bank", ".lock"
EMPTY = {LOCK, ASIDE, "lost+found"}


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


@dataclass(frozen=True)
class NewAdapter:
    """Adapter that goes into a bank, with what the manifest says of it beside its task and hash."""

    id: str
    task: str
    state: StateDict
    prompts: Prompts
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BankWriter:
    """Bank in the making. `settings` are what its adapters depend on; a bank of other settings is not written to."""

    folder: Path
    base: Base
    spec: LoraSpec
    settings: Mapping[str, Any]

    @contextmanager
    def opened(self, keep_half: bool = True) -> Iterator[None]:
        """Keep other programs from writing here, and start the bank or check that it has the same settings.

        A bank that is started here and refused before anything is in it is removed; with `keep_half` off, whatever
        stopped it. Raises UserError for a bank of other settings, and one that another program writes to.
        """
        address = check_bank_address(self.folder)
        with disk_errors(address.path):
            made = make_folders(address.folder)
            try:
                with FileLock(self.folder / LOCK, timeout=0):
                    is_new = not (self.folder / MANIFEST).exists()
                    try:
                        self.start()
                        yield
                    except BaseException as error:
                        refused = isinstance(error, UserError) and not self._has_content()
                        if is_new and (refused or not keep_half):
                            self._remove()
                        raise
            except Timeout as error:
                raise UserError(
                    f"another program is writing to {self.folder}: wait for it, or name another"
                ) from error
            finally:
                for folder in made:  # those that stayed empty
                    with suppress(OSError):
                        folder.rmdir()

    def _has_content(self) -> bool:
        """Say if the folder holds more than a manifest: adapters, or the state of a training."""
        return bool(set(os.listdir(self.folder)) - EMPTY - {MANIFEST})

    @property
    def entries(self) -> dict[str, Any]:
        """Return the adapters that the manifest lists; none before there is one."""
        if not (self.folder / MANIFEST).exists():
            return {}
        return read_manifest(self.folder)["adapters"]

    @property
    def is_finished(self) -> bool:
        return read_manifest(self.folder)["measured"] is not None

    def start(self) -> None:
        """Write an empty manifest. Raises UserError where there is one of other settings."""
        head = {
            "version": FORMAT_VERSION,
            "base": {"path": self.base.path, "hash": self.base.hash},
            "rank": self.spec.rank,
            "alpha": self.spec.alpha,
            "target_modules": list(self.spec.target_modules),
            "settings": dict(self.settings),
        }
        if not (self.folder / MANIFEST).exists():
            return self._write({**head, "adapters": {}, "measured": None})
        found = read_manifest(self.folder)
        if self.base.is_named(found["base"]["hash"]):
            head["base"] = found["base"]
        told = json.loads(json.dumps(head))
        differ = [name for name, value in told.items() if found.get(name) != value]
        if differ:
            raise UserError(
                f"{self.folder} holds a bank of another {' and '.join(differ)}: name another folder or the same options"
            )

    def _write(self, manifest: Manifest) -> None:
        write_json(self.folder / MANIFEST, manifest)
        # The listing of version 1 is part of the manifest now.
        (self.folder / OLD_LISTING).unlink(missing_ok=True)

    def missing(self, adapter_ids: Sequence[str]) -> list[str]:
        """Return those of the adapters that are not there, or no longer those that the manifest lists."""
        listed = self.entries
        return [
            i for i in adapter_ids if i not in listed or not is_whole(self.folder, i, listed[i])
        ]

    def reopen(self) -> None:
        """Mark the bank as unfinished before its adapters change."""
        manifest = read_manifest(self.folder)
        if manifest["measured"] is not None:
            self._write({**manifest, "measured": None})

    def add(self, adapters: Sequence[NewAdapter]) -> None:
        """Write adapters and their lines in the manifest; torn ones that the manifest lists are replaced.

        The lines come first: an adapter that a kill kept from its folder is then missing, and a folder without a line
        belongs to others. Raises UserError for such a folder.
        """
        manifest = read_manifest(self.folder)
        places = {adapter.id: self._place(adapter, manifest) for adapter in adapters}
        stage = self.folder / ASIDE
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        for adapter in adapters:
            digest = self._write_aside(stage / adapter.id, adapter)
            entry = {"task": adapter.task, "sha256": digest, **adapter.facts}
            manifest["adapters"][adapter.id] = entry
        flush_tree(stage)
        self._write(manifest)
        for adapter_id, own in places.items():
            own.mkdir(parents=True, exist_ok=True)
            for name in ADAPTER_FILES:
                os.replace(stage / adapter_id / name, own / name)
            flush(own)
        shutil.rmtree(stage)

    def _place(self, adapter: NewAdapter, manifest: Manifest) -> Path:
        check_name(adapter.task, "the task")
        check_name(adapter.id, "the adapter")
        own = adapter_folder(self.folder, adapter.id, adapter.task)
        if adapter.id not in manifest["adapters"] and os.path.lexists(own):
            raise UserError(
                f"{own} is none of the bank's adapters: move it away, or name another folder"
            )
        return own

    def _write_aside(self, stage: Path, adapter: NewAdapter) -> str:
        """Write the files of one adapter; return the SHA-256 of its weights."""
        stage.mkdir()
        write_adapter_files(stage, adapter.state, adapter_config(self.spec, self.base.path))
        (stage / PROMPTS).write_text(json.dumps(adapter.prompts))
        return str(describe_file(stage / ADAPTER_WEIGHTS)[1])

    def load(self, adapter_ids: Sequence[str]) -> LoraBatch:
        """Load some adapters onto the device of the base. Raises UserError as `load_adapter`."""
        listed = self.entries
        folders = [adapter_folder(self.folder, i, listed[i]["task"]) for i in adapter_ids]
        states = [load_adapter(folder, self.spec) for folder in folders]
        return LoraBatch.from_state_dicts(states).to(self.base.model.device)

    def finish(
        self,
        adapter_ids: Sequence[str],
        asked: Mapping[str, Sequence[str]],
        measured: Mapping[str, Any],
        max_tokens: int,
    ) -> None:
        """Finish the bank: write each task's first adapter's greedy answers to `asked`, then the results.

        The manifest lists the adapters in the order of `adapter_ids` from then on, and how many answers were cut at
        `max_tokens`.
        """
        manifest = read_manifest(self.folder)
        entries = {i: manifest["adapters"][i] for i in adapter_ids}
        firsts = {entries[i]["task"]: i for i in reversed(adapter_ids)}
        batch = self.load([firsts[task] for task in asked])
        lists = list(asked.values())
        answers = greedy_continuations(self.base, self.spec, batch, lists, max_tokens)
        told, cut = {}, {}
        for (task, prompts), own in zip(asked.items(), answers, strict=True):
            told[task] = list(zip(prompts, (answer.text for answer in own), strict=True))
            cut[task] = sum(answer.is_cut for answer in own)
        n_cut = _say_what_was_cut(cut, sum(map(len, lists)), max_tokens)
        write_json(self.folder / TRAJECTORIES, told)
        self._write(
            {**manifest, "adapters": entries, "measured": {**measured, "cut_answers": n_cut}}
        )

    def _remove(self) -> None:
        """Remove what was written since the bank was started; files of others stay."""
        places = [
            adapter_folder(self.folder, i, entry["task"]) for i, entry in self.entries.items()
        ]
        files = [place / name for place, name in product(places, ADAPTER_FILES)]
        files += [self.folder / name for name in (TRAJECTORIES, MANIFEST, LOCK)]
        shutil.rmtree(self.folder / ASIDE, ignore_errors=True)
        for file in files:
            file.unlink(missing_ok=True)
        tasks = {place.parent for place in places}
        for folder in (*places, *tasks, self.folder / CHECKPOINTS):
            with suppress(OSError):
                folder.rmdir()


def _say_what_was_cut(cut: Mapping[str, int], n_answers: int, max_tokens: int) -> int:
    """Say how many answers of which tasks had not ended at `max_tokens`; return their number."""
    n_cut = sum(cut.values())
    if n_cut:
        tasks = [task for task, count in cut.items() if count]
        named = ", ".join(tasks[:5]) + (f" and {len(tasks) - 5} more" if len(tasks) > 5 else "")
        say(
            f"{n_cut} of {n_answers} answers of teachers are cut at {max_tokens} tokens ({named}): their behaviour is "
            "matched up to there; a larger limit keeps them whole (--max-tokens, in a sweep --trajectory-tokens)"
        )
    return n_cut
