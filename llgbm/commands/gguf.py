"""`python -m llgbm gguf`: an adapter or a merged model as the file that llama.cpp reads, by llama.cpp's converter."""

from __future__ import annotations

import argparse
import glob
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llgbm.commands.adapters import check_base, load_base_of
from llgbm.runtime import UserError, say
from llgbm.system.gguf import ADAPTER_SCRIPT, MODEL_SCRIPT, TYPES, VARIABLES, Converter
from llgbm.system.output import CARD, Output, named_path

if TYPE_CHECKING:
    from llgbm.lora.external import PlainAdapter
    from llgbm.models.load import Base


def add_parser(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser(
        "gguf", help="convert an adapter or a merged model for llama.cpp, by its own converter"
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--adapter", type=named_path, metavar="DIR", help="gives a LoRA file")
    source.add_argument(
        "--model", type=named_path, metavar="DIR", help="a folder of `merge`, gives a whole model"
    )
    command.add_argument(
        "--base", metavar="DIR|HUB", help="the base (default: the one that the adapter names)"
    )
    command.add_argument(
        "--outtype",
        choices=TYPES,
        default="f32",
        help="numbers of the file (default: f32, which is exact)",
    )
    command.add_argument(
        "--converter",
        type=named_path,
        metavar="DIR",
        help=f"a checkout of llama.cpp (default: the variable {VARIABLES[0]}, then PATH)",
    )
    command.add_argument(
        "--out", required=True, type=named_path, metavar="DIR", help="NAME.gguf is written there"
    )
    command.set_defaults(do=convert)


def convert(arguments: argparse.Namespace) -> dict[str, Any]:
    """Convert an adapter or a model; return the file and its number of tensors.

    Raises UserError where the converter is not there or fails, and for what it would convert wrongly.
    """
    source = (arguments.adapter or arguments.model).expanduser()
    name = f"{source.resolve().name}.gguf"
    output = _output(arguments.out, name)
    script = ADAPTER_SCRIPT if arguments.adapter else MODEL_SCRIPT
    converter = Converter.find(script, arguments.converter)
    with tempfile.TemporaryDirectory() as place, output.writing() as stage:
        options = ["--outfile", str(stage / name), "--outtype", arguments.outtype]
        if arguments.adapter:
            tensors = _convert_adapter(arguments, converter, options, Path(place))
        else:
            _check_model(source)
            tensors = converter.run([*options, str(source.resolve())], stage / name)
    file = arguments.out / name
    say(f"wrote {file}, {tensors} tensors")
    return {"gguf": str(file), "tensors": tensors, "outtype": arguments.outtype}


def _output(folder: Path, name: str) -> Output:
    """Check the folder; own files of other commands in it would be taken out, so they are refused."""
    from dnd.own_files import own_files

    output = Output(folder, (glob.escape(name),))
    others = sorted(own_files(output.folder) - {name}) if output.folder.is_dir() else []
    if others:
        raise UserError(
            f"{folder} holds {others[0]!r}, which this program wrote and would take out: name another folder"
        )
    return output


def _convert_adapter(
    arguments: argparse.Namespace, converter: Converter, options: list[str], place: Path
) -> int:
    """Convert an adapter as plain LoRA, since the converter reads rank and alpha alone; return its tensors."""
    from llgbm.lora.external import read_external

    folder = arguments.adapter.expanduser()
    base = load_base_of(folder, arguments.base)
    check_base(folder, base)
    plain = read_external(folder, base.model)
    for text in plain.converted:
        say(f"converted to plain LoRA: {text}")
    if conv1d := [shape.name for shape in plain.spec.modules if shape.is_transposed]:
        raise UserError(
            f"{conv1d[0]} is a Conv1D, whose adapters llama.cpp's converter turns the wrong way round: merge it into "
            "the base and convert that with --model"
        )
    written = _write_plain(place / folder.resolve().name, plain, base, folder)
    file = Path(options[1])
    tensors = converter.run([*options, "--base", str(base.folder), str(written)], file)
    if tensors != len(plain.state):
        raise UserError(
            f"the converter wrote {tensors} tensors of the adapter's {len(plain.state)}: the installed llama.cpp "
            "does not know all layers of this base"
        )
    return tensors


def _write_plain(place: Path, plain: PlainAdapter, base: Base, folder: Path) -> Path:
    """Write an adapter as plain LoRA, with its own card, which the converter reads too; return the folder."""
    from llgbm.lora.adapters import adapter_config, write_adapter_files

    place.mkdir()
    write_adapter_files(place, plain.state, adapter_config(plain.spec, base.path))
    if (folder / CARD).is_file():
        shutil.copyfile(folder / CARD, place / CARD)
    return place


def _check_model(folder: Path) -> None:
    """Raise UserError for a folder that is no whole model."""
    from llgbm.models.folder import check_weights, read_config, read_tokenizer

    read_config(folder)
    check_weights(folder)
    read_tokenizer(folder)
