"""Import adapters that others trained into a bank."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llgbm.lora.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    LoraSpec,
    StateDict,
    check_scale,
    read_adapter_config,
)
from llgbm.lora.external import AdapterReader, PlainAdapter
from llgbm.lora.plain import is_empty
from llgbm.models.encoding import chat_prompt
from llgbm.models.load import COMMIT, Base
from llgbm.runtime import UserError, content_hash, is_folder, progress, say, split_revision
from llgbm.system.cache import describe_file
from llgbm.system.output import STAGE, check_name
from llgbm.teachers.bank import Bank, Prompts
from llgbm.teachers.given import PURPOSES, prompts_of, read_given
from llgbm.teachers.writer import BankWriter, NewAdapter, check_bank_address

# Fields of an adapter's config that decide how its weights are read.
DECIDING = ("use_rslora", "rank_pattern", "alpha_pattern")
# Folders that hold a state of a training, and say nothing of its task.
STATE = re.compile(
    r"(?i)(checkpoint|ckpt|step|epoch|iter|iteration|seed|run|version|global_step)[-_]?\d+|v?\d+"
    r"|(checkpoint|ckpt)[-_](final|best|last|latest)|final|best|last|latest|adapter|adapters|adapter_model|lora|peft"
    r"|(final|best|last)[-_](model|adapter|checkpoint|lora)|checkpoints?|outputs?|model|results?|default"
)
Checked = tuple["ExternalAdapter", PlainAdapter, Prompts]


@dataclass(frozen=True)
class ExternalAdapter:
    """Adapter of someone else: its folder, its task, and where it was fetched from."""

    folder: Path
    task: str
    source: str


@dataclass(frozen=True)
class ImportOptions:
    """Settings for importing adapters: names of the base accepted beside its own, and the task of all of them."""

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
        """Options that the trajectories depend on."""
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
    found: list[ExternalAdapter] = []
    for source in sources:
        found += find_adapters(source, options.task, besides=out)
    given = read_given(prompts_file) if prompts_file else {}
    if "" in given and len(tasks := {external.task for external in found}) > 1:
        raise UserError(
            f"{prompts_file} holds the prompts of one task, and there are {', '.join(sorted(tasks))}: name them by task"
        )
    names = {base.path, *options.accept_bases}
    reader = AdapterReader(base.model)
    checked = []
    for external in progress(found, "checking adapters"):
        _check_base(external, names)
        plain = reader.read(external.folder)
        checked.append((external, plain, prompts_of(external.folder, external.task, given)))
    spec = _common_spec(checked)
    taken = _described(checked)
    _say_what_was_done(checked)
    contents = sorted([t.external.task, t.digest, content_hash(t.prompts)] for t in taken.values())
    settings = {"method": "import", "adapters": content_hash(contents), **options.settings}
    target = BankWriter(out, base, spec, settings)
    with target.opened(keep_half=False):
        if not target.is_finished or target.missing(list(taken)):
            target.reopen()
            target.add([one.adapter(i) for i, one in taken.items() if not one.is_in(target, i)])
            _finish(target, taken, options)
    return Bank.open(out, base)


def _common_spec(checked: Sequence[Checked]) -> LoraSpec:
    """Return the shapes of the first adapter. Raises UserError naming one that has others."""
    spec = checked[0][1].spec
    for external, plain, _ in checked:
        if plain.spec.modules != spec.modules:
            odd = sorted(set(plain.spec.target_modules) ^ set(spec.target_modules))
            raise UserError(
                f"the adapter in {external.folder} and that in {checked[0][0].folder} differ in the modules that they "
                f"adapt ({', '.join(odd)}): a bank's adapters adapt the same ones"
            )
        if plain.spec.rank != spec.rank:
            raise UserError(
                f"the adapter in {external.folder} is of another rank, {plain.spec.rank}, than that in "
                f"{checked[0][0].folder}, {spec.rank}: a bank's adapters have one"
            )
        check_scale(external.folder, plain.spec, spec)
    return spec


def _say_what_was_done(checked: Sequence[Checked]) -> None:
    """Say which adapters were converted, and which folders make up one task."""
    converted: dict[str, list[str]] = {}
    places: dict[str, list[str]] = {}
    for external, plain, _ in checked:
        places.setdefault(external.task, []).append(external.source)
        for text in plain.converted:
            converted.setdefault(text, []).append(external.source)
    for text, sources in converted.items():
        say(f"converted to plain LoRA: {text} ({len(sources)} adapters, such as {sources[0]})")
    for task, sources in places.items():
        if any(Path(source).name != Path(sources[0]).name for source in sources):
            say(f"task {task}: {', '.join(sources)}")


@dataclass(frozen=True)
class Taken:
    """Adapter that was checked: where it is from, its values, its prompts, and the SHA-256 of its file."""

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


def _described(checked: Sequence[Checked]) -> dict[str, Taken]:
    """Return the adapters by their ids in the bank; of the same weights for one task, the first only."""
    taken: dict[str, Taken] = {}
    numbers: Counter[str] = Counter()
    known: set[tuple[str, str]] = set()
    for external, plain, prompts in checked:
        digest = digest_of(external.folder)
        if (external.task, digest) in known:
            say(
                f"{external.source} is left out: it is the same as an earlier one of {external.task}"
            )
            continue
        known.add((external.task, digest))
        adapter_id = check_name(f"{external.task}_{numbers[external.task]}", "the adapter")
        numbers[external.task] += 1
        taken[adapter_id] = Taken(external, plain.state, _cut(prompts, checked), digest)
    return taken


def digest_of(folder: Path) -> str:
    """Return the SHA-256 of an adapter's weights, and of its config where that decides how they are read."""
    weights = str(describe_file(folder / ADAPTER_WEIGHTS)[1])
    config = read_adapter_config(folder)
    deciding = {name: config[name] for name in DECIDING if not is_empty(config.get(name))}
    return content_hash(weights, deciding, length=64) if deciding else weights


def find_adapters(
    source: str, task: str | None, besides: Path | None = None
) -> list[ExternalAdapter]:
    """Return the adapters in a folder (itself one, or any depth above some) or of a hub id; none in `besides`.

    Of several states of one training the last comes first, so that it stands for its task. Raises UserError for no
    adapter, and for a name that no task can have.
    """
    root = Path(source).expanduser() if is_folder(source) else _from_hub(source)
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
    adapters = []
    for folder in sorted(folders, key=_last_state_first):
        own = task or _task_of(folder, root, source)
        adapters.append(ExternalAdapter(folder, own, _place(folder, root, source)))
    return adapters


def _is_unfinished(path: Path) -> bool:
    """Say if a file is among those that a command is writing, or was when it was killed."""
    return any(part.startswith(STAGE) for part in path.parts)


def _last_state_first(folder: Path) -> tuple[str, str, int]:
    """Sort folders by name, but states of a training by their number, from the last."""
    numbered = STATE.fullmatch(folder.name)
    if numbered is None:
        return str(folder), "", 0
    steps = re.search(r"\d+$", folder.name)
    return str(folder.parent), "state", -int(steps.group()) if steps else -sys.maxsize


def _task_of(folder: Path, root: Path, source: str) -> str:
    """Return the task that a folder's place names.

    That is the folder's own name (for a hub repository, the repository's), but that of the folder above for one of a
    layout `{task}/{task}_{idx}` and for a state of a training, such as `checkpoint-50` or `final`.
    """
    top = folder
    while top != root and STATE.fullmatch(top.name):
        top = top.parent
    name = top.name
    if top == root:
        name = _name_of_source(source)
    elif _is_numbered(top.name, top.parent.name):
        name = top.parent.name
    if name in ("", ".", "..") or STATE.fullmatch(name):
        raise UserError(
            f"{_place(folder, root, source)!r} does not say what the task of its adapter is called: name it with --task"
        )
    return check_name(name, "the task")


def _is_numbered(name: str, task: str) -> bool:
    """Say if a folder inside a task's is one of a layout `{task}/{task}_{idx}`."""
    return bool(task) and name.rpartition("_")[0] == task


def _name_of_source(source: str) -> str:
    """Return the last name of a source that is none of a training's states; "" where it has none."""
    if not is_folder(source):
        return source.rsplit("/", 1)[-1]
    names = [part for part in Path(source).expanduser().parts if part not in ("/", ".", "..")]
    while names and STATE.fullmatch(names[-1]):
        names.pop()
    if len(names) > 1 and _is_numbered(names[-1], names[-2]):
        names.pop()
    return names[-1] if names else ""


def _place(folder: Path, root: Path, source: str) -> str:
    return (
        source if folder == root else f"{source.rstrip('/')}/{folder.relative_to(root).as_posix()}"
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    hub_id, revision = split_revision(name)
    files = ["*.safetensors", "*.json", "adapter_model.bin"]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=files))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} is no folder here, and the hub cannot be asked or has no adapter of that name: "
            "fetch it where there is a network and name its folder"
        ) from error


def _check_base(external: ExternalAdapter, names: set[str]) -> None:
    """Raise UserError for an adapter that names another base."""
    config = read_adapter_config(external.folder)
    named, revision = config["base_model_name_or_path"], config["revision"]
    if revision and re.fullmatch(COMMIT, str(revision)):
        named = f"{named}@{revision}"
    if named and not any(_are_one(named, name) for name in names):
        raise UserError(
            f"the adapter in {external.folder} was made for {named}, the bank is of {', '.join(sorted(names))}: leave "
            f"it out, or say with --accept-base {named} that the two are one model"
        )


def _are_one(named: str, name: str) -> bool:
    """Say if two names are of one base: the last part is the same, and no two commits are named."""
    commits = {split_revision(one)[1] for one in (named, name) if "@" in one}
    pinned = {commit for commit in commits if commit and re.fullmatch(COMMIT, commit)}
    return _short(named) == _short(name) and len(pinned) < 2


def _short(name: str) -> str:
    return split_revision(name)[0].rstrip("/").rsplit("/", 1)[-1].lower()


def _cut(prompts: Prompts, everyone: Sequence[Checked]) -> Prompts:
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
