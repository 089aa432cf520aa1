"""Push adapters, banks, generators and merged models to the hub, and fetch them from it. No torch.

Only files that are listed here travel. `huggingface_hub` does the talking; HF_ENDPOINT names another hub.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llgbm.runtime import UserError, keep_secret, redact, redact_forms, split_revision
from llgbm.system.documents import brief, decode, parse_json
from llgbm.system.lineage import (
    HUB_ID,
    card,
    hub_id_of,
    plain_card,
    portable_base,
    portable_name,
    read_lineage,
)
from llgbm.system.output import ADAPTER_PATTERNS, CARD

MODEL_PATTERNS = (
    *("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "vocab.*"),
    *(CARD, "config.json"),
)
GENERATOR_PATTERNS = (CARD, "origin.json", "generator.safetensors", "generator.json")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
_BANK_ADAPTER = "checkpoints/*/*/"
# Kind of a folder by the file that it has; a folder is of the first kind that fits.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "adapter": ("adapter_config.json", (CARD, *ADAPTER_FILES)),
    "generator": ("generator.json", GENERATOR_PATTERNS),
    "bank": (
        "manifest.json",
        (
            *(CARD, "manifest.json", "bank.json", "trajectories.json"),
            *(_BANK_ADAPTER + name for name in (*ADAPTER_FILES, "prompts.json")),
        ),
    ),
    "model": ("config.json", MODEL_PATTERNS),
}
WRITTEN = {"adapter": ADAPTER_PATTERNS, "generator": GENERATOR_PATTERNS, "model": MODEL_PATTERNS}


@dataclass(frozen=True)
class Repository:
    """Address on the hub: `owner/name`, and a branch, tag or commit."""

    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Repository:
        """Read `owner/name` or `owner/name@revision`. Raises UserError for anything else."""
        name, revision = split_revision(text)
        if not HUB_ID.fullmatch(name):
            raise UserError(
                f"{text!r} is no address on the hub: write owner/name or owner/name@revision"
            )
        return cls(name, revision)


def kind_of(folder: Path) -> str:
    """Say if a folder is an adapter, a generator, a bank or a model. Raises UserError for none of these."""
    for kind, (key, _) in KINDS.items():
        if (folder / key).is_file():
            return kind
    raise UserError(
        f"{folder} holds no adapter, generator, bank or model: name the folder with "
        + ", ".join(key for key, _ in KINDS.values())
    )


def files_of(folder: Path, kind: str) -> list[Path]:
    """Return the files that travel, relative to the folder."""
    found = {path for pattern in KINDS[kind][1] for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder) for path in found)


def stage_folder(folder: Path, stage: Path, base: str | None) -> list[str]:
    """Copy what travels into a folder, without the paths of this machine; return what was changed on the way.

    `base` is the hub id of the base, for a folder that names it by a path. Raises UserError where a secret of the
    environment is in a file.
    """
    kind = kind_of(folder)
    for path in files_of(folder, kind):
        (stage / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / path, stage / path)
    changed = list(_rename_bases(stage, kind, base))
    for path in files_of(stage, kind):
        _check_secrets(stage / path, path)
    return changed


def _rename_bases(stage: Path, kind: str, base: str | None) -> Iterator[str]:
    """Write what is named by a path of this machine anew, in configs, manifests and cards; yield what was told."""
    told = {"generator": ("generator.json",), "bank": ("manifest.json",)}.get(kind, ())
    for name in told:
        facts = _read(stage / name)
        old = _base_named(facts)
        new = _renamed(old, base) or old
        if new != old:
            yield _told(name, old, new)
        facts = _without_paths(_with_base(facts, new))
        _write(stage / name, facts)
        if not (stage / CARD).exists():
            (stage / CARD).write_text(_own_card(kind, new, facts), encoding="utf-8")
    for path in sorted(stage.rglob("adapter_config.json")):
        config = _read(path)
        old = str(config.get("base_model_name_or_path") or "")
        if there := _renamed(old, base):
            name, revision = split_revision(there)
            config |= {"base_model_name_or_path": name, "revision": revision}
            _write(path, config)
            _renew_card(path.parent, config)
            if kind == "adapter":
                yield _told(path.name, old, there)


def _base_named(facts: Mapping[str, Any]) -> str:
    """Return how a generator or a bank names its base."""
    base = facts.get("base")
    return str(facts.get("base_path") or (base.get("path") if isinstance(base, dict) else "") or "")


def _with_base(facts: Mapping[str, Any], name: str) -> dict[str, Any]:
    if "base_path" in facts:
        return {**facts, "base_path": name}
    if isinstance(facts.get("base"), dict):
        return {**facts, "base": {**facts["base"], "path": name}}
    return dict(facts)


def _without_paths(value: Any) -> Any:
    """Return facts with the last part of each whole path in place of the path."""
    if isinstance(value, dict):
        return {key: _without_paths(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_without_paths(own) for own in value]
    return portable_name(value) if isinstance(value, str) else value


def _own_card(kind: str, base: str, facts: Mapping[str, Any]) -> str:
    if kind == "generator":
        left_out = ("generator", "spec")
        own = {key: value for key, value in facts.items() if key not in left_out}
        return plain_card("Generator of LoRA adapters, by LLGBM", base, own)
    tasks = sorted({str(entry["task"]) for entry in facts["adapters"].values()})
    own = {key: facts.get(key) for key in ("version", "base", "rank", "alpha")}
    own |= {"adapters": len(facts["adapters"]), "tasks": ", ".join(tasks)}
    return plain_card("Bank of teacher adapters, by LLGBM", base, own)


def _renamed(old: str, base: str | None) -> str | None:
    """Return the name that others know a base by, None where it has that already."""
    portable = portable_base(old)
    if portable != old:
        return portable
    if not old or hub_id_of(old):
        return None
    return base or Path(old).name


def _told(name: str, old: str, new: str) -> str:
    return f"{name}: the base {old} is called {new} there"


def _renew_card(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the card of an adapter anew, if it is this program's own."""
    path = folder / CARD
    if not path.is_file():
        return
    lineage = read_lineage((folder / ADAPTER_FILES[0]).read_bytes())
    if lineage and path.read_text(encoding="utf-8").startswith("---\n"):
        path.write_text(card(lineage, config), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    found = parse_json(decode(path.read_bytes()))
    if not isinstance(found, dict):
        raise UserError(f"{path.name} is no JSON object: make or fetch the folder again")
    return found


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=path.name != "manifest.json"))


def _check_secrets(path: Path, name: Path) -> None:
    text = path.read_bytes().decode("utf-8", "ignore")
    if redact(text) != redact_forms(text):
        raise UserError(
            f"{name} holds a secret of this environment: take it out before it is pushed"
        )


@contextmanager
def hub_errors(address: str) -> Iterator[None]:
    """Turn whatever the hub's library raises into a UserError without secrets."""
    from huggingface_hub import constants, get_token

    keep_secret(get_token() or "")
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the hub at {redact(constants.ENDPOINT)} did not take or give {address} ({redact(brief(error))})"
        ) from error


def upload(stage: Path, repository: Repository, message: str, private: bool) -> str:
    """Upload a staged folder as one commit; return its id. Raises UserError where the hub refuses."""
    from huggingface_hub import HfApi

    with hub_errors(repository.name):
        api = HfApi()
        api.create_repo(repository.name, private=private, exist_ok=True)
        if repository.revision:
            api.create_branch(repository.name, branch=repository.revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository.name,
            folder_path=str(stage),
            revision=repository.revision,
            commit_message=message,
        )
    return str(commit.oid)


def snapshot(name: str, revision: str | None, patterns: Sequence[str], fetch: bool = True) -> Path:
    """Return the folder of a repository in the hub's cache, fetched where it is not there and the hub may be asked.

    Raises OSError or ValueError where there is none.
    """
    from huggingface_hub import constants, snapshot_download

    # Some versions (1.33) ask for a commit that they have, and fail where the hub is switched off.
    kept_only = constants.HF_HUB_OFFLINE or not fetch
    found = snapshot_download(
        name, revision=revision, allow_patterns=list(patterns), local_files_only=kept_only
    )
    return Path(found)


def download(repository: Repository) -> tuple[Path, str]:
    """Fetch a folder into the hub's cache; return it with its commit. Raises UserError where there is none."""
    patterns = sorted({pattern for _, patterns in KINDS.values() for pattern in patterns})
    with hub_errors(repository.name):
        found = snapshot(repository.name, repository.revision, patterns)
    return found, found.name


def copy_files(source: Path, kind: str, target: Path) -> None:
    """Copy what travels of a folder to another one, links followed."""
    for path in files_of(source, kind):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(os.path.realpath(source / path), target / path)
