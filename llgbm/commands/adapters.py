"""Adapters on the command line: their names, their folders, their lineage and the base that they are for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llgbm.runtime import UserError, is_folder, pick_device, say

if TYPE_CHECKING:
    from llgbm.evaluation.benchmark import System
    from llgbm.models.load import Base


def parse_named(named: str) -> tuple[str, Path]:
    """Return name and folder of `NAME=DIR`, or of `DIR`, which names itself and may hold an `=` too."""
    name, sign, folder = named.partition("=")
    if not sign or "/" in name or is_folder(named):
        path = Path(named).expanduser()
        return path.name or path.resolve().name, path
    path = Path(folder).expanduser()
    return name or path.name, path


def read_own_lineage(folder: Path) -> dict[str, Any] | None:
    """Read and check the lineage of an adapter, None for one without. Raises UserError as `check_lineage`."""
    from llgbm.lora.adapters import ADAPTER_WEIGHTS, read_adapter_config, read_adapter_weights
    from llgbm.system.documents import decode, parse_json
    from llgbm.system.lineage import check_lineage

    read_adapter_config(folder)
    read_adapter_weights(folder)
    config = parse_json(decode((folder / "adapter_config.json").read_bytes()))
    return check_lineage(folder, (folder / ADAPTER_WEIGHTS).read_bytes(), config)


def load_base_of(folder: Path, asked: str | None) -> Base:
    """Load the base that is asked for, or else the one that an adapter names; UserError where it names none."""
    from llgbm.lora.adapters import read_adapter_config
    from llgbm.models.load import load_base

    config = read_adapter_config(folder)
    named, revision = config["base_model_name_or_path"], config["revision"]
    if not asked and not named:
        raise UserError(f"{folder} does not name its base: name it with --base")
    return load_base(asked or (f"{named}@{revision}" if revision else named), pick_device())


def check_base(folder: Path, base: Base) -> None:
    """Raise UserError where an adapter's lineage names another base than this one."""
    from llgbm.models.load import folder_is_named

    wanted = ((read_own_lineage(folder) or {}).get("base") or {}).get("hash")
    if wanted is None or base.is_named(wanted):
        return
    if base.folder is None or not folder_is_named(base.folder, wanted):
        raise UserError(
            f"the adapter in {folder} was made for another base than {base.path} (other files; hash {wanted}): name "
            "that one with --base"
        )


def adapter_system(base: Base, named: str) -> System:
    """Read an adapter as a system under test, and say what was converted; UserError as `check_base`."""
    from llgbm.evaluation.benchmark import System
    from llgbm.lora import LoraBatch
    from llgbm.lora.external import read_external

    name, folder = parse_named(named)
    check_base(folder, base)
    plain = read_external(folder, base.model)
    for text in plain.converted:
        say(f"{name}, converted to plain LoRA: {text}")
    batch = LoraBatch.from_state_dicts([plain.state])
    return System(name, batch.to(base.model.device), plain.spec)
