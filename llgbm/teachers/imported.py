"""Import adapters that others trained into a bank."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llgbm.cache import describe_file
from llgbm.lora.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    LoraSpec,
    StateDict,
    load_adapter,
    read_adapter_config,
)
from llgbm.models.encoding import chat_prompt
from llgbm.models.load import Base
from llgbm.output import STAGE, check_name
from llgbm.runtime import UserError, content_hash, progress, say
from llgbm.teachers.bank import PROMPTS, Bank, Prompts
from llgbm.teachers.writer import BankWriter, NewAdapter, check_bank_address

PURPOSES = ("train", "evaluation")


@dataclass(frozen=True)
class ExternalAdapter:
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
            raise UserError(
                "trajectories and max_tokens must be at least 1: the teachers answer their own prompts"
            )
        if self.task is not None:
            check_name(self.task, "the task")

    @property
    def settings(self) -> dict[str, Any]:
        """The options that the trajectories depend on."""
        return {"chat": self.chat, "trajectories": self.trajectories, "max_tokens": self.max_tokens}


def import_bank(
    sources: Sequence[str],
    base: Base,
    out: Path,
    options: ImportOptions,
    prompts_file: Path | None = None,
) -> Bank:
    """Make a bank from PEFT folders, folders of such folders, and hub ids; find it again where it was made before.

    Raises UserError for an output that cannot be written or holds another bank and, naming the adapter, for another
    base, rank, alpha or target modules, values that are not finite, and an adapter without prompts.
    """
    out = check_bank_address(out).path
    found = [
        external
        for source in sources
        for external in find_adapters(source, options.task, besides=out)
    ]
    spec = _spec_of(found[0].folder, base)
    given = _read_json(prompts_file) if prompts_file else {}
    names = {base.path, *options.accept_bases}
    checked = [
        (f, _checked(f, spec, names), _prompts_of(f, given))
        for f in progress(found, "checking adapters")
    ]
    taken = _described(checked)
    contents = sorted([t.external.task, t.digest, content_hash(t.prompts)] for t in taken.values())
    settings = {"method": "import", "adapters": content_hash(contents), **options.settings}
    target = BankWriter(out, base, spec, settings)
    with target.opened(keep_half=False):
        if not target.is_finished or target.missing(list(taken)):
            target.reopen()
            target.add([one.adapter(i) for i, one in taken.items() if not one.is_in(target, i)])
            _finish(target, taken, options)
    return Bank.open(out, base)


@dataclass(frozen=True)
class Taken:
    """An adapter that was checked: where it is from, its values, its prompts, and the SHA-256 of its file."""

    external: ExternalAdapter
    state: StateDict
    prompts: Prompts
    digest: str

    def adapter(self, adapter_id: str) -> NewAdapter:
        facts = {"source": self.external.source, "source_sha256": self.digest}
        return NewAdapter(adapter_id, self.external.task, self.state, self.prompts, facts)

    def is_in(self, target: BankWriter, adapter_id: str) -> bool:
        """Say if a bank holds this adapter, whole."""
        known = target.entries.get(adapter_id, {}).get("source_sha256") == self.digest
        return known and not target.missing([adapter_id])


def _described(checked: Sequence[tuple[ExternalAdapter, StateDict, Prompts]]) -> dict[str, Taken]:
    """The adapters by their ids in the bank. Raises UserError for an id that no folder can bear."""
    taken: dict[str, Taken] = {}
    numbers: dict[str, int] = {}
    for external, state, prompts in checked:
        number = numbers[external.task] = numbers.get(external.task, -1) + 1
        digest = describe_file(external.folder / ADAPTER_WEIGHTS)[1]
        adapter_id = check_name(f"{external.task}_{number}", "the adapter")
        taken[adapter_id] = Taken(external, state, _cut(prompts, checked), str(digest))
    return taken


def find_adapters(
    source: str, task: str | None, besides: Path | None = None
) -> list[ExternalAdapter]:
    """The adapters in a folder (itself one, or any depth above some) or of a hub id; those in `besides` do not count.

    Raises UserError for none, and for a name that no task can have.
    """
    root = Path(source).expanduser()
    if not root.is_dir():
        root = _from_hub(source)
    left_out = besides.resolve() if besides else None
    found = sorted(
        path.parent
        for path in root.rglob(ADAPTER_CONFIG)
        if not _is_unfinished(path.relative_to(root))
    )
    folders = [f for f in found if left_out is None or not f.resolve().is_relative_to(left_out)]
    if not folders:
        where = f" outside {besides}" if found else ""
        raise UserError(
            f"{source} holds no {ADAPTER_CONFIG}{where}: name a PEFT adapter's folder, one above it, or a hub id"
        )
    return [
        ExternalAdapter(f, task or _task_of(f, root, source), _place(f, root, source))
        for f in folders
    ]


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
        raise UserError(
            f"{source!r} does not say what the task of its adapter is called: name it with --task"
        )
    return check_name(name, "the task")


def _place(folder: Path, root: Path, source: str) -> str:
    return (
        source if folder == root else f"{source.rstrip('/')}/{folder.relative_to(root).as_posix()}"
    )


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
        raise UserError(
            f"the adapter in {folder} does not fit the base {base.path}: {error}"
        ) from error


def _checked(external: ExternalAdapter, spec: LoraSpec, names: set[str]) -> StateDict:
    """The adapter's values. Raises UserError for one of another base, rank or kind, or not finite."""
    state = load_adapter(external.folder, spec)
    named = read_adapter_config(external.folder)["base_model_name_or_path"]
    if named and _short(named) not in {_short(name) for name in names}:
        raise UserError(
            f"the adapter in {external.folder} was made for {named}, the bank is of {', '.join(sorted(names))}: leave "
            f"it out, or say with --accept-base {named} that the two are one model"
        )
    return state


def _short(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({error}): name a file of prompts"
        ) from error


def _prompts_of(external: ExternalAdapter, given: Any) -> Prompts:
    """An adapter's prompts: those given for its task, or in the file beside it; a plain list is parted in two."""
    beside = external.folder / PROMPTS
    found = given.get(external.task) if isinstance(given, dict) else None
    if found is None and beside.is_file():
        found = _read_json(beside)
    if isinstance(found, list):
        known = len(found) - len(found) // 3
        found = {"train": found[:known], "evaluation": found[known:]}
    if not isinstance(found, dict) or not all(_are_prompts(found.get(p)) for p in PURPOSES):
        raise UserError(
            f"the adapter in {external.folder} has no prompts: put a {PROMPTS} beside it, or name "
            f"task {external.task!r} "
            'in --prompts, as {"train": [...], "evaluation": [...]} or one list of at least three'
        )
    if both := set(found["train"]) & set(found["evaluation"]):
        raise UserError(
            f"a prompt of the adapter in {external.folder} is for training and evaluation both ({min(both)[:60]!r}): "
            "keep them apart"
        )
    return {purpose: list(found[purpose]) for purpose in PURPOSES}


def _are_prompts(found: Any) -> bool:
    return (
        isinstance(found, list)
        and bool(found)
        and all(isinstance(p, str) and p.strip() for p in found)
    )


def _cut(
    prompts: Prompts, everyone: Sequence[tuple[ExternalAdapter, StateDict, Prompts]]
) -> Prompts:
    """As many prompts as the adapter with fewest has: pools of all adapters are of one size."""
    return {
        purpose: prompts[purpose][: min(len(p[purpose]) for _, _, p in everyone)]
        for purpose in PURPOSES
    }


def _finish(target: BankWriter, taken: Mapping[str, Taken], options: ImportOptions) -> None:
    """Finish the bank with the answers of each task's first adapter to its own prompts."""
    system = "" if options.chat else None
    asked: dict[str, list[str]] = {}
    for one in taken.values():
        pool = one.prompts["train"][: options.trajectories]
        prompts = [chat_prompt(target.base.tokenizer, prompt, system) for prompt in pool]
        asked.setdefault(one.external.task, prompts)
    say(f"answers of {len(asked)} adapters to {len(next(iter(asked.values())))} prompts each")
    target.finish(list(taken), asked, {"facts": {}}, options.max_tokens)
