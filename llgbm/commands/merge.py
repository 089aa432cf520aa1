"""`python -m llgbm merge` and `stack`: an adapter in the weights of its base, and several adapters in one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llgbm.commands.adapters import check_base, load_base_of, parse_named, read_own_lineage
from llgbm.runtime import UserError, say
from llgbm.system.hub import MODEL_PATTERNS
from llgbm.system.output import CARD, Output, carded_output, named_path

if TYPE_CHECKING:
    from llgbm.models.load import Base

LINEAGE_FILE = "llgbm_lineage.json"
# Fields of an adapter's lineage that are told again by what is made of it.
PARENT = ("generator", "prompts", "adapters", "weights")


def add_parser(commands: Any) -> None:
    """Register both commands."""
    merge_one = commands.add_parser("merge", help="add an adapter to the weights of its base")
    merge_one.add_argument("--adapter", required=True, type=named_path, metavar="DIR")
    merge_one.add_argument(
        "--dtype", default="float32", help="of the merged weights: float32, bfloat16 or float16"
    )
    merge_one.add_argument(
        "--prompts",
        type=named_path,
        metavar="FILE",
        help="texts that the error of merging is measured on (default: the generic probes)",
    )
    merge_one.set_defaults(do=merge)
    several = commands.add_parser("stack", help="put several adapters of one base into one")
    several.add_argument(
        "--adapter", required=True, nargs="+", metavar="[NAME=]DIR", help="two or more"
    )
    several.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="one an adapter (default: 1 each)"
    )
    several.add_argument(
        "--way",
        choices=("cat", "svd", "linear"),
        default="cat",
        help="cat: ranks side by side, exact (default); svd: the nearest of --rank; linear: A and B mixed apart, rough",
    )
    several.add_argument("--rank", type=int, metavar="R", help="of svd")
    several.set_defaults(do=stack)
    for command in (merge_one, several):
        command.add_argument(
            "--base", metavar="DIR|HUB", help="the base (default: the one that the adapter names)"
        )
        command.add_argument(
            "--out", required=True, type=named_path, metavar="DIR", help="what is written"
        )


def merge(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write a base with an adapter in its weights; return the errors of its logits."""
    from llgbm.models.load import DTYPES
    from llgbm.models.merge import merge_adapter, write_model
    from llgbm.models.quantised import refuse_quantised
    from llgbm.probes import create_generic_probes
    from llgbm.tasks.prompts import read_prompts

    if arguments.dtype not in DTYPES:
        raise UserError(f"unknown dtype {arguments.dtype!r}; there are: {', '.join(DTYPES)}")
    output = Output(arguments.out, MODEL_PATTERNS)
    texts = [probe.prompt for probe in create_generic_probes().probes["shared"]]
    if arguments.prompts:
        texts = read_prompts(arguments.prompts)
    folder = arguments.adapter.expanduser()
    base = load_base_of(folder, arguments.base)
    check_base(folder, base)
    refuse_quantised(
        base.model,
        "a merged adapter would be rounded to its few bits",
        "name the model that it was made from with --base, or use the adapter as it is",
    )
    merged = merge_adapter(base, folder, texts, DTYPES[arguments.dtype])
    lineage = _lineage("merged into its base", base) | {
        "adapters": [_parent(folder, folder.resolve().name)],
        "logits": merged.errors,
        "dtype": arguments.dtype,
    }
    assert base.folder is not None
    with output.writing() as stage:
        write_model(stage, merged.model, base.folder)
        (stage / LINEAGE_FILE).write_text(json.dumps(lineage, indent=1))
        (stage / CARD).write_text(_model_card(lineage), encoding="utf-8")
    return {"model": str(arguments.out), "dtype": arguments.dtype, "logits": merged.errors}


def stack(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write one adapter made of several; return its rank and its error to the exact mixture."""
    from llgbm.lora.adapters import adapter_config, write_adapter_files
    from llgbm.lora.external import AdapterReader
    from llgbm.lora.stacking import Mixture, stack_adapters

    output = carded_output(arguments.out)
    named = [parse_named(text) for text in arguments.adapter]
    weights = arguments.weights or [1.0] * len(named)
    base = load_base_of(named[0][1], arguments.base)
    for _, folder in named:
        check_base(folder, base)
    reader = AdapterReader(base.model)
    adapters = [reader.read(folder) for _, folder in named]
    mixture = Mixture(adapters, weights, arguments.way, arguments.rank)
    state, spec, error = stack_adapters(base.model, mixture)
    parents = [
        {**_parent(folder, name), "weight": weight}
        for (name, folder), weight in zip(named, weights, strict=True)
    ]
    lineage = _lineage(f"stacked from {len(named)} adapters", base) | {
        "adapters": parents,
        "way": arguments.way,
        "delta_w_error": error,
    }
    with output.writing() as stage:
        write_adapter_files(
            stage, state, adapter_config(spec, _place(base)), lineage, CARD in output.patterns
        )
    say(f"wrote {arguments.out}, of rank {spec.rank}; its relative error in ΔW is {error:.2g}")
    return {"adapter": str(arguments.out), "rank": spec.rank, "delta_w_error": error}


def _place(base: Base) -> str:
    """Return the name of a base for others: its hub id and commit, or its whole path."""
    from llgbm.runtime import is_folder
    from llgbm.system.lineage import portable_base

    return portable_base(str(Path(base.path).resolve())) if is_folder(base.path) else base.path


def _lineage(made_by: str, base: Base) -> dict[str, Any]:
    from llgbm.runtime import split_revision
    from llgbm.system.lineage import begin_lineage, license_of, portable_name

    name, commit = split_revision(_place(base))
    found = {
        "name": portable_name(name),
        "commit": commit,
        "hash": base.hash,
        "license": license_of(base.folder),
    }
    return begin_lineage(made_by) | {"base": found}


def _parent(folder: Path, name: str) -> dict[str, Any]:
    """Return what is told of an adapter that something is made of: its hash, and its own origin."""
    from llgbm.lora.adapters import ADAPTER_WEIGHTS
    from llgbm.system.lineage import weights_hash

    known = read_own_lineage(folder) or {}
    found = {"name": name, "weights": weights_hash((folder / ADAPTER_WEIGHTS).read_bytes())}
    return found | {key: known[key] for key in PARENT if key in known}


def _model_card(lineage: dict[str, Any]) -> str:
    """Return the README card of a merged model."""
    from llgbm.system.lineage import front_matter, lineage_table

    name, commit = lineage["base"]["name"], lineage["base"]["commit"]
    base = f"{name}@{commit}" if commit else name
    return (
        "\n\n".join(
            [
                front_matter(lineage["base"], base, "finetune", "transformers"),
                "# A base with a generated LoRA adapter in its weights",
                "Logits are those of base and adapter apart, up to the errors below: the largest difference over all "
                "tokens of the texts that were measured, and the share of tokens with the same next token.",
                "## Where it comes from\n\n" + lineage_table(lineage),
            ]
        )
        + "\n"
    )
