"""`python -m llgbm show`: what an adapter says of itself, checked against its files."""

from __future__ import annotations

import argparse
from typing import Any

from llgbm.system.output import named_path


def add_parser(commands: Any) -> None:
    """Register the command."""
    look = commands.add_parser("show", help="say where an adapter comes from, and check its files")
    look.add_argument(
        "adapter", metavar="DIR", type=named_path, help="the folder of a PEFT adapter"
    )
    look.add_argument(
        "--base",
        metavar="DIR|HUB",
        help="a base to check against (default: the one that the adapter names, where it is here)",
    )
    look.add_argument("--json", action="store_true", help="print JSON")
    look.set_defaults(do=show)


def show(arguments: argparse.Namespace) -> Any:
    """Return all that is known of an adapter: a text, or data for JSON.

    Raises UserError for an adapter that is torn or was changed since it was made, and a `--base` that is another.
    """
    from llgbm.commands.adapters import read_own_lineage
    from llgbm.lora.adapters import read_adapter_config, read_adapter_weights

    folder = arguments.adapter.expanduser()
    config = read_adapter_config(folder)
    tensors = read_adapter_weights(folder)
    lineage = read_own_lineage(folder)
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    targets = config["target_modules"]
    found = {
        "adapter": str(folder),
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "targets": targets if isinstance(targets, str) else sorted(targets),
        "values": sum(tensor.numel() for tensor in tensors.values()),
        "kind": ", ".join(sorted(kinds)),
        "base": config["base_model_name_or_path"] or None,
        "revision": config["revision"],
        "files": _verdict(lineage),
        "base_files": _base_verdict(arguments.base, config, lineage),
        "lineage": lineage,
    }
    return found if arguments.json else _as_text(found)


def _verdict(lineage: dict[str, Any] | None) -> str:
    if lineage is None:
        return "whole; they name no lineage to be checked by"
    return "weights and config are those that the lineage names"


def _base_verdict(asked: str | None, config: dict[str, Any], lineage: dict[str, Any] | None) -> str:
    """Compare the files of the base, where they are here, with the hash in the lineage."""
    from llgbm.models.load import find_model, folder_is_named
    from llgbm.runtime import UserError

    wanted = (lineage or {}).get("base", {}).get("hash")
    name, revision = config["base_model_name_or_path"], config["revision"]
    if wanted is None:
        return "not checked: no hash of the base is known"
    try:
        folder = find_model(asked or (f"{name}@{revision}" if revision else name), download=False)
    except UserError:
        if asked:
            raise
        return "not checked: the base is not here (name it with --base)"
    if folder_is_named(folder, wanted):
        return f"those of {folder} are the ones that the adapter was made for"
    if asked:
        raise UserError(
            f"{asked} is not the base of the adapter (its files have another hash than {wanted}): name that base"
        )
    return f"those of {folder} are OTHERS than the ones that the adapter was made for"


def _as_text(found: dict[str, Any]) -> str:
    from tabulate import tabulate

    from llgbm.system.lineage import flat_lineage

    lineage = found.pop("lineage") or {}
    rows = [(name.replace("_", " "), _text(value)) for name, value in found.items()]
    rows += list(flat_lineage(lineage))
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return "-" if value is None else str(value)
