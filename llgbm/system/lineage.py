"""Lineage of an adapter: kept in the metadata of its weights, told in its README card, checked by hash. No torch.

A weights file is safetensors: 8 bytes with the length of a header, the header in JSON, the values.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import llgbm
from llgbm.runtime import UserError, content_hash
from llgbm.system.documents import check_format
from llgbm.system.output import CARD

FORMAT_VERSION = 1
METADATA_KEY = "llgbm"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PARTS = ("generator", "base", "bank", "encoder", "prompts", "heldout")
_SNAPSHOT = re.compile(r".*/models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})/?")
# Fields of a config that say where it is used, and not what it is.
PLACE_FIELDS = ("base_model_name_or_path", "revision", "inference_mode")
USE = """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base!r}{revision})
model = PeftModel.from_pretrained(base, "DIR")  # the folder of this file
```"""


def split_weights(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Part a weights file into its header and its values. Raises ValueError for bytes that are no such file."""
    begin = 8 + int.from_bytes(content[:8], "little")
    if len(content) < max(8, begin):
        raise ValueError("it is cut, or no safetensors file")
    header = json.loads(content[8:begin])
    tensors = {key: value for key, value in header.items() if key != "__metadata__"}
    ends = [value["data_offsets"][1] for value in tensors.values()]
    if not ends or len(content) != begin + max(ends):
        raise ValueError("its length is not the one that its header says")
    return header, content[begin:]


def weights_hash(content: bytes) -> str:
    """Hash names, shapes, kinds and values of a weights file (SHA-256); its metadata are no part of that."""
    header, values = split_weights(content)
    header.pop("__metadata__", None)
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    digest.update(values)
    return digest.hexdigest()


def config_hash(config: Mapping[str, Any]) -> str:
    """Hash a config by what it makes of the weights; the name of the base may be written anew."""
    meaning = {key: value for key, value in config.items() if key not in PLACE_FIELDS}
    return content_hash(meaning, length=64)


def read_lineage(content: bytes) -> dict[str, Any] | None:
    """Return the lineage in a weights file, None where there is none.

    Raises ValueError for a file that is torn, UserError for a lineage of a newer format.
    """
    metadata = split_weights(content)[0].get("__metadata__") or {}
    if METADATA_KEY not in metadata:
        return None
    lineage = json.loads(metadata[METADATA_KEY])
    if not isinstance(lineage, dict):
        raise ValueError("its lineage is no table")
    check_format(lineage.get("version"), FORMAT_VERSION, "the lineage of the adapter")
    odd = [name for name in PARTS if not isinstance(lineage.get(name) or {}, dict)]
    if odd:
        raise ValueError(f"its lineage has no table of {odd[0]}")
    return lineage


def signed(lineage: Mapping[str, Any], content: bytes, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a lineage with the hashes of the weights and of the config that it is for."""
    return {**lineage, "weights": weights_hash(content), "config": config_hash(config)}


def with_lineage(content: bytes, lineage: Mapping[str, Any]) -> bytes:
    """Return a weights file with a lineage in its metadata; the same two give the same bytes."""
    header, values = split_weights(content)
    header.pop("__metadata__", None)
    metadata = {"format": "pt", METADATA_KEY: json.dumps(lineage, sort_keys=True)}
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + values


def check_lineage(folder: Path, content: bytes, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the lineage of an adapter that is what it says, None for one without.

    Raises UserError for weights or a config that were changed since, and for a torn file.
    """
    try:
        lineage = read_lineage(content)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the weights in {folder} are torn, or their lineage is ({error}): make or fetch the adapter again"
        ) from error
    if lineage is None:
        return None
    found = {"weights": weights_hash(content), "config": config_hash(config)}
    changed = [name for name, value in found.items() if lineage.get(name) != value]
    if changed:
        raise UserError(
            f"the {' and '.join(changed)} of the adapter in {folder} are not those that its lineage names: they were "
            "changed since it was made; make or fetch it again"
        )
    return lineage


def begin_lineage(made_by: str) -> dict[str, Any]:
    """Return what every lineage begins with: version, program, the way it was made, and the time (UTC).

    SOURCE_DATE_EPOCH, where it is set, gives the time.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    now = datetime.fromtimestamp(int(epoch), UTC) if epoch.isdigit() else datetime.now(UTC)
    return {
        "version": FORMAT_VERSION,
        "program": f"llgbm {llgbm.__version__}",
        "made_by": made_by,
        "made": now.isoformat(timespec="seconds"),
    }


def prompts_facts(prompts: Sequence[str]) -> dict[str, Any]:
    """Return number and SHA-256 of prompts; the texts themselves may be private."""
    return {"count": len(prompts), "sha256": content_hash(list(prompts), length=64)}


def portable_base(name: str) -> str:
    """Return `id@commit` for a folder of the hub's cache; any other name stays."""
    found = _SNAPSHOT.fullmatch(name)
    return f"{found[1]}/{found[2]}@{found[3]}" if found else name


def portable_name(name: str) -> str:
    """Return a name without the folders of this machine: `minilm:/models/x` is `minilm:x`."""
    kind, sign, place = name.rpartition(":")
    return f"{kind}{sign}{Path(place).name}" if Path(place).is_absolute() else name


def hub_id_of(base: str | None) -> str | None:
    """Return the hub id that a base is named by, None for a folder."""
    name = (base or "").partition("@")[0]
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def license_of(folder: str | Path | None) -> str | None:
    """Return the licence that the card of a model's folder names, None where there is none."""
    import yaml

    try:
        text = (Path(folder or "") / CARD).read_text(encoding="utf-8-sig")
        front = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else {}
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return found if isinstance(found, str) else None


def card(lineage: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return the README card of an adapter: YAML for the hub, then what it is, in Markdown."""
    base = str(config.get("base_model_name_or_path") or "")
    revision = f", revision={config['revision']!r}" if config.get("revision") else ""
    parts = [
        front_matter(lineage.get("base") or {}, base, "adapter", "peft"),
        f"# LoRA adapter, {_plain(lineage['made_by'])}",
        f"Rank {config['r']}, alpha {config['lora_alpha']:g}, on "
        f"{', '.join(map(code, config['target_modules']))}.",
        *_quality(lineage),
        "## Where it comes from\n\n" + lineage_table(lineage),
        "## Use\n\n" + USE.format(base=base, revision=revision),
        *_local_note(lineage, base),
        "`python -m llgbm show DIR` reads this back from the weights and checks them by their hash.",
    ]
    return "\n\n".join(parts) + "\n"


def plain_card(title: str, base: str, facts: Mapping[str, Any]) -> str:
    """Return the README card of a generator or a bank: YAML for the hub, then its facts as a table."""
    front = front_matter({"license": facts.get("base_license")}, base, "", "llgbm")
    return "\n\n".join([front, f"# {_plain(title)}", lineage_table(facts)]) + "\n"


def front_matter(of_base: Mapping[str, Any], base: str, relation: str, library: str) -> str:
    """Return the YAML that the hub reads; `base_model` only for a base that the hub knows."""
    import yaml

    found: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    if hub_id_of(base):
        found["base_model"] = hub_id_of(base)
        if relation:
            found["base_model_relation"] = relation
    if licence := of_base.get("license"):
        found["license"] = licence
    found["tags"] = ["llgbm", "lora"]
    return f"---\n{yaml.safe_dump(found, sort_keys=True)}---"


def _quality(lineage: Mapping[str, Any]) -> Iterator[str]:
    heldout = lineage.get("heldout")
    if not heldout:
        return
    text = f"Adapters of this generator reach a held-out accuracy of {heldout['accuracy']:.3f}"
    if heldout.get("interval"):
        low, high = heldout["interval"]
        text += f" (95 % interval {low:.3f} to {high:.3f})"
    yield (
        f"{text}, the mean over {heldout['tasks']} tasks that it never saw. This adapter itself was not measured."
    )


def _local_note(lineage: Mapping[str, Any], base: str) -> Iterator[str]:
    wanted = (lineage.get("base") or {}).get("hash")
    if wanted and not hub_id_of(base):
        yield f"The base is a folder, not a model of the hub: take the one with the hash {code(wanted)}."


def lineage_table(lineage: Mapping[str, Any]) -> str:
    """Return a lineage as a table in Markdown."""
    rows = [f"| {_plain(name)} | {code(value)} |" for name, value in flat_lineage(lineage)]
    return "\n".join(["| | |", "|---|---|", *rows])


def flat_lineage(lineage: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and value of each fact, such as ("generator study", "phase_4_5")."""
    for name, value in lineage.items():
        if isinstance(value, Mapping):
            for inner, own in flat_lineage(value):
                yield f"{name} {inner}", own
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            for number, item in enumerate(value, 1):
                for inner, own in flat_lineage(item):
                    yield f"{name} {number} {inner}", own
        elif value is not None:
            yield name.replace("_", " "), str(value)


def code(text: Any) -> str:
    """Return a text as code in Markdown, also within a table."""
    plain = _plain(str(text).replace("`", "'"))
    return f"`{plain}`"


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
