"""Banks as folders that grow: `checkpoints/{task}/{task}_{idx}/` and a `manifest.json` that says what each adapter is.

The manifest holds base, rank, alpha, targets and settings, and for every adapter its task, where it came from and the
SHA-256 of its weights. An adapter counts only if its weights are what the manifest says. `import_bank` makes such a
folder from PEFT adapters of other people.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llgbm.cache import describe_file, write_json
from llgbm.encoding import chat_prompt
from llgbm.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    LoraBatch,
    LoraSpec,
    StateDict,
    adapter_config,
    load_adapter,
    read_adapter_config,
    write_adapter_files,
)
from llgbm.models import Base
from llgbm.output import STAGE, Output, check_name, disk_errors, flush, flush_tree, make_folders
from llgbm.runtime import UserError, content_hash, progress, say
from llgbm.teachers import Bank, greedy_answers

VERSION = 1
MANIFEST, PROMPTS, LISTING, TRAJECTORIES = "manifest.json", "prompts.json", "bank.json", "trajectories.json"
ADAPTER_FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, PROMPTS)
# Where an adapter of a bank is made ready, and what else may lie in a folder that a bank is started in.
ASIDE, LOCK = f"{STAGE}bank", ".lock"
EMPTY = {LOCK, ASIDE, "lost+found"}
PURPOSES = ("train", "evaluation")
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
            "version": VERSION,
            "base": {"path": self.base.path, "hash": self.base.hash},
            "rank": self.spec.rank,
            "alpha": self.spec.alpha,
            "target_modules": list(self.spec.target_modules),
            "settings": dict(self.settings),
        }

    @contextmanager
    def opened(self, keep_half: bool = True) -> Iterator[None]:
        """Keep other programs from writing here meanwhile, and start or check the manifest.

        A bank that is started here and refused before anything is in it (an adapter, a state to go on from) is taken
        away again; with `keep_half` off, whatever stopped it. Raises UserError for a folder that holds a bank of other
        settings, or that another program writes to.
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
                    except BaseException as error:
                        is_empty = not set(os.listdir(self.folder)) - {MANIFEST, *EMPTY}
                        if is_new and (not keep_half or (is_empty and isinstance(error, UserError))):
                            self._take_away()
                        raise
            except Timeout as error:
                raise UserError(f"another program is writing to {self.folder}: wait for it, or name another") from error
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
        places = [self.folder / "checkpoints" / entry["task"] / i for i, entry in self.adapters.items()]
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
            if found.get(name) != value and not (name == "base" and found["base"]["hash"] == self.base.hash)
        ]
        if differ:
            raise UserError(
                f"{self.folder} holds a bank of another {' and '.join(differ)}: name another folder or the same options"
            )

    def missing(self, adapter_ids: Sequence[str]) -> list[str]:
        """Those that are not there, or no longer what the manifest says."""
        listed = read_manifest(self.folder)["adapters"]
        return [i for i in adapter_ids if i not in listed or not _is_whole(self.folder, i, listed[i])]

    def add(self, adapter_id: str, task: str, state: StateDict, prompts: Prompts, facts: Mapping[str, Any]) -> None:
        """Write an adapter and its line in the manifest; a torn one that the manifest lists is made whole.

        The line comes first: an adapter that a kill kept from its place is then missing, and what lies in a place
        without a line is of others. Raises UserError for such a place.
        """
        own = self.folder / "checkpoints" / check_name(task, "the task") / check_name(adapter_id, "the adapter")
        manifest = read_manifest(self.folder)
        if adapter_id not in manifest["adapters"] and os.path.lexists(own):
            raise UserError(f"{own} is none of the bank's adapters: move it away, or name another folder")
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
        raise UserError(f"{folder} is not empty and no bank (it has no {MANIFEST}): name another folder")
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
        known = {name: manifest[name] for name in ("version", "base", "rank", "alpha", "target_modules", "adapters")}
        if not isinstance(known["adapters"], dict) or known["version"] != VERSION:
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
        raise UserError(f"the bank {folder} is of the base {manifest['base']['path']}, not of {base.path}: name that")
    spec = LoraSpec.from_model(base.model, manifest["rank"], manifest["alpha"], manifest["target_modules"])
    for adapter_id, entry in manifest["adapters"].items():
        if not _is_whole(folder, adapter_id, entry):
            raise UserError(f"adapter {adapter_id} of {folder} is torn or missing: run the command that made it again")
    return Bank.open(folder, spec, bank_hash(folder))


def bank_hash(folder: Path) -> str:
    """What the deltas of a bank are named by: its weights and prompts."""
    adapters = read_manifest(folder)["adapters"]
    prompts = {i: describe_file(folder / "checkpoints" / e["task"] / i / PROMPTS)[1] for i, e in adapters.items()}
    return content_hash("bank folder", VERSION, {i: e["sha256"] for i, e in adapters.items()}, prompts)


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
class Foreign:
    """An adapter of someone else: its folder, its task, and where it was fetched from."""

    folder: Path
    task: str
    source: str


@dataclass(frozen=True)
class ImportOptions:
    """How adapters are taken over: names of the base that are accepted beside its own, and the task of all of them."""

    accept_bases: tuple[str, ...] = ()
    task: str | None = None
    chat: bool = False
    trajectories: int = 16
    max_tokens: int = 64

    def __post_init__(self) -> None:
        if min(self.trajectories, self.max_tokens) < 1:
            raise UserError("trajectories and max_tokens must be at least 1: the teachers answer their own prompts")
        if self.task is not None:
            check_name(self.task, "the task")

    @property
    def settings(self) -> dict[str, Any]:
        """The options that the trajectories depend on."""
        return {"chat": self.chat, "trajectories": self.trajectories, "max_tokens": self.max_tokens}


def import_bank(
    sources: Sequence[str], base: Base, out: Path, options: ImportOptions, prompts_file: Path | None = None
) -> Bank:
    """Make a bank from PEFT folders, folders of such folders, and hub ids; find it again where it was made before.

    Raises UserError for an output that cannot be written or holds another bank and, naming the adapter, for another
    base, rank, alpha or target modules, values that are not finite, and an adapter without prompts.
    """
    out = check_bank_address(out).path
    found = [foreign for source in sources for foreign in find_adapters(source, options.task, besides=out)]
    spec = _spec_of(found[0].folder, base)
    given = _read_json(prompts_file) if prompts_file else {}
    names = {base.path, *options.accept_bases}
    checked = [(f, _checked(f, spec, names), _prompts_of(f, given)) for f in progress(found, "checking adapters")]
    taken = _described(checked)
    contents = sorted([t.foreign.task, t.digest, content_hash(t.prompts)] for t in taken.values())
    settings = {"method": "import", "adapters": content_hash(contents), **options.settings}
    target = BankFolder(out, base, spec, settings)
    with target.opened(keep_half=False):
        if not (out / LISTING).is_file() or target.missing(list(taken)):
            (out / LISTING).unlink(missing_ok=True)
            for adapter_id, one in taken.items():
                one.add_to(target, adapter_id)
            _finish(target, options)
    return open_bank(out, base)


@dataclass(frozen=True)
class Taken:
    """An adapter that was checked: where it is from, its values, its prompts, and the SHA-256 of its file."""

    foreign: Foreign
    state: StateDict
    prompts: Prompts
    digest: str

    def add_to(self, target: BankFolder, adapter_id: str) -> None:
        """Write it into a bank, unless it is there."""
        known = target.adapters.get(adapter_id, {}).get("source_sha256") == self.digest
        if not known or target.missing([adapter_id]):
            facts = {"source": self.foreign.source, "source_sha256": self.digest}
            target.add(adapter_id, self.foreign.task, self.state, self.prompts, facts)


def _described(checked: Sequence[tuple[Foreign, StateDict, Prompts]]) -> dict[str, Taken]:
    """The adapters by their ids in the bank. Raises UserError for an id that no folder can bear."""
    taken: dict[str, Taken] = {}
    numbers: dict[str, int] = {}
    for foreign, state, prompts in checked:
        number = numbers[foreign.task] = numbers.get(foreign.task, -1) + 1
        digest = describe_file(foreign.folder / ADAPTER_WEIGHTS)[1]
        adapter_id = check_name(f"{foreign.task}_{number}", "the adapter")
        taken[adapter_id] = Taken(foreign, state, _cut(prompts, checked), str(digest))
    return taken


def find_adapters(source: str, task: str | None, besides: Path | None = None) -> list[Foreign]:
    """The adapters in a folder (itself one, or any depth above some) or of a hub id; those in `besides` do not count.

    Raises UserError for none, and for a name that no task can have.
    """
    root = Path(source).expanduser()
    if not root.is_dir():
        root = _from_hub(source)
    left_out = besides.resolve() if besides else None
    found = sorted(path.parent for path in root.rglob(ADAPTER_CONFIG) if not _is_unfinished(path.relative_to(root)))
    folders = [f for f in found if left_out is None or not f.resolve().is_relative_to(left_out)]
    if not folders:
        where = f" outside {besides}" if found else ""
        raise UserError(
            f"{source} holds no {ADAPTER_CONFIG}{where}: name a PEFT adapter's folder, one above it, or a hub id"
        )
    return [Foreign(f, task or _task_of(f, root, source), _place(f, root, source)) for f in folders]


def _is_unfinished(path: Path) -> bool:
    """Say if a file is among those that a command is writing, or was when it was killed."""
    return any(part.startswith(STAGE) for part in path.parts)


def _task_of(folder: Path, root: Path, source: str) -> str:
    """In the layout `{task}/{task}_{idx}` the task; else the folder's (or the hub repository's) own name."""
    above = folder.resolve().parent.name
    if folder != root and above and folder.name.rpartition("_")[0] == above:
        return check_name(above, "the task")
    name = (source if folder == root else folder.name).rstrip("/").rsplit("/", 1)[-1]
    if name in ("", ".", ".."):
        raise UserError(f"{source!r} does not say what the task of its adapter is called: name it with --task")
    return check_name(name, "the task")


def _place(folder: Path, root: Path, source: str) -> str:
    return source if folder == root else f"{source.rstrip('/')}/{folder.relative_to(root).as_posix()}"


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} is no folder here, and the hub cannot be asked or has no adapter of that name: "
            "fetch it where there is a network and name its folder"
        ) from error


def _spec_of(folder: Path, base: Base) -> LoraSpec:
    """Rank, alpha and targets of the first adapter; the others must have the same."""
    config = read_adapter_config(folder)
    keys = load_adapter(folder)
    kinds = {key.split(".lora_")[0].rsplit(".", 1)[-1] for key in keys}
    try:
        return LoraSpec.from_model(base.model, config["r"], config["lora_alpha"], sorted(kinds))
    except UserError as error:
        raise UserError(f"the adapter in {folder} does not fit the base {base.path}: {error}") from error


def _checked(foreign: Foreign, spec: LoraSpec, names: set[str]) -> StateDict:
    """The adapter's values. Raises UserError for one of another base, rank or kind, or not finite."""
    state = load_adapter(foreign.folder, spec)
    named = read_adapter_config(foreign.folder)["base_model_name_or_path"]
    if named and _short(named) not in {_short(name) for name in names}:
        raise UserError(
            f"the adapter in {foreign.folder} was made for {named}, the bank is of {', '.join(sorted(names))}: leave "
            f"it out, or say with --accept-base {named} that the two are one model"
        )
    return state


def _short(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): name a file of prompts") from error


def _prompts_of(foreign: Foreign, given: Any) -> Prompts:
    """An adapter's prompts: those given for its task, or in the file beside it; a plain list is parted in two."""
    beside = foreign.folder / PROMPTS
    found = given.get(foreign.task) if isinstance(given, dict) else None
    if found is None and beside.is_file():
        found = _read_json(beside)
    if isinstance(found, list):
        known = len(found) - len(found) // 3
        found = {"train": found[:known], "evaluation": found[known:]}
    if not isinstance(found, dict) or not all(_are_prompts(found.get(p)) for p in PURPOSES):
        raise UserError(
            f"the adapter in {foreign.folder} has no prompts: put a {PROMPTS} beside it, or name task {foreign.task!r} "
            'in --prompts, as {"train": [...], "evaluation": [...]} or one list of at least three'
        )
    if both := set(found["train"]) & set(found["evaluation"]):
        raise UserError(
            f"a prompt of the adapter in {foreign.folder} is for training and evaluation both ({min(both)[:60]!r}): "
            "keep them apart"
        )
    return {purpose: list(found[purpose]) for purpose in PURPOSES}


def _are_prompts(found: Any) -> bool:
    return isinstance(found, list) and bool(found) and all(isinstance(p, str) and p.strip() for p in found)


def _cut(prompts: Prompts, everyone: Sequence[tuple[Foreign, StateDict, Prompts]]) -> Prompts:
    """As many prompts as the adapter with fewest has: pools of all adapters are of one size."""
    return {purpose: prompts[purpose][: min(len(p[purpose]) for _, _, p in everyone)] for purpose in PURPOSES}


def _finish(target: BankFolder, options: ImportOptions) -> None:
    """Let each task's first adapter answer its prompts (the trajectories), then write the list that ends a bank."""
    adapters = {i: entry["task"] for i, entry in read_manifest(target.folder)["adapters"].items()}
    firsts = {task: i for i, task in reversed(adapters.items())}
    folders = [target.folder / "checkpoints" / task / i for task, i in firsts.items()]
    batch = LoraBatch.from_state_dicts([load_adapter(folder, target.spec) for folder in folders])
    pools = [_read_json(folder / PROMPTS)["train"][: options.trajectories] for folder in folders]
    system = "" if options.chat else None
    asked = [[chat_prompt(target.base.tokenizer, prompt, system) for prompt in pool] for pool in pools]
    say(f"answers of {len(firsts)} adapters to {len(asked[0])} prompts each")
    answers = greedy_answers(target.base, target.spec, batch, asked, options.max_tokens)
    pairs = {t: list(zip(p, a, strict=True)) for t, p, a in zip(firsts, asked, answers, strict=True)}
    write_json(target.folder / TRAJECTORIES, pairs)
    write_json(target.folder / LISTING, {"adapters": adapters, "facts": {}})
