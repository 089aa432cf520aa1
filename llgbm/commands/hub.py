"""`python -m llgbm push`, and `fetch --hub`: adapters, banks, generators and merged models on the hub."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from llgbm.commands.generators import REPOSITORY
from llgbm.runtime import UserError, redact, say
from llgbm.system.hub import (
    WRITTEN,
    Repository,
    copy_files,
    download,
    files_of,
    kind_of,
    stage_folder,
    upload,
)
from llgbm.system.output import (
    CARD,
    Output,
    carded_output,
    disk_errors,
    make_folders,
    named_path,
)


def add_parser(commands: Any) -> None:
    """Register `push`."""
    send = commands.add_parser(
        "push", help="put an adapter, bank, generator or model on the hub (without --yes: say what)"
    )
    send.add_argument("folder", type=named_path, metavar="DIR", help="what is pushed")
    send.add_argument("--repo", required=True, metavar="REPO", help=REPOSITORY)
    send.add_argument(
        "--base-id", metavar="HUB", help="the hub's name of a base that is a folder here"
    )
    send.add_argument("--private", action="store_true", help="if the repository is made now")
    send.add_argument("--message", metavar="TEXT", help="of the commit")
    send.add_argument("--yes", action="store_true", help="push; without it nothing leaves")
    send.set_defaults(do=push)


def push(arguments: argparse.Namespace) -> dict[str, Any]:
    """Say what would be pushed, or push it with `--yes`; return files with their sizes, and the commit.

    Raises UserError for a folder that is torn or was changed since it was made.
    """
    from huggingface_hub import constants

    repository = Repository.parse(arguments.repo)
    if arguments.base_id:
        Repository.parse(arguments.base_id)
    folder = arguments.folder.expanduser()
    kind = kind_of(folder)
    _check(folder, kind)
    with tempfile.TemporaryDirectory() as temporary:
        stage = Path(temporary)
        for text in stage_folder(folder, stage, arguments.base_id):
            say(text)
        sizes = {str(path): (stage / path).stat().st_size for path in files_of(stage, kind)}
        told = {
            "kind": kind,
            "repo": repository.name,
            "revision": repository.revision or "main",
            "hub": redact(constants.ENDPOINT),
            "files": sizes,
        }
        if not arguments.yes:
            say(
                f"{len(sizes)} files, {sum(sizes.values())} bytes: nothing was pushed; --yes does it"
            )
            return {"would_push": told}
        message = arguments.message or f"Add {kind} by llgbm"
        commit = upload(stage, repository, message, arguments.private)
    return {"pushed": {**told, "commit": commit}}


def _check(folder: Path, kind: str) -> None:
    """Raise UserError for a folder that is not what it was when it was written."""
    if kind == "adapter":
        from llgbm.commands.adapters import read_own_lineage

        read_own_lineage(folder)
    elif kind == "generator":
        from llgbm.generator.bundle import GeneratorBundle

        GeneratorBundle.load(folder)
    elif kind == "bank":
        from llgbm.teachers.bank import show_bank

        torn = show_bank(folder)["torn"]
        if torn:
            raise UserError(
                f"the bank {folder} has torn adapters ({', '.join(torn)[:200]}): mend it"
            )


def fetch_from_hub(address: str, out: Path) -> dict[str, Any]:
    """Bring a repository's adapter, bank, generator or model into a folder; return what it is and its commit.

    Raises UserError where there is none, it is not what its lineage says, or the folder holds files of others.
    """
    repository = Repository.parse(address)
    Output(out, ())
    source, commit = download(repository)
    kind = kind_of(source)
    _check(source, kind)
    if kind == "bank":
        _write_new(source, kind, out)
    else:
        _write(source, kind, out)
    return {"folder": str(out), "kind": kind, "repo": repository.name, "commit": commit}


def _write(source: Path, kind: str, out: Path) -> None:
    output = carded_output(out) if kind == "adapter" else Output(out, WRITTEN[kind])
    with output.writing() as stage:
        copy_files(source, kind, stage)
        if CARD not in output.patterns:
            (stage / CARD).unlink(missing_ok=True)


def _write_new(source: Path, kind: str, out: Path) -> None:
    """Write a folder with folders in it, which must be new."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already: name a new folder")
    with disk_errors(out):
        make_folders(out.resolve().parent)
        with tempfile.TemporaryDirectory(dir=out.resolve().parent, prefix=".llgbm-") as stage:
            copy_files(source, kind, Path(stage) / "new")
            (Path(stage) / "new").rename(out.resolve())
