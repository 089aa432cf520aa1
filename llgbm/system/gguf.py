"""GGUF files, which llama.cpp reads: its own converters are found and run; none of their code is kept here."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llgbm.runtime import UserError

ADAPTER_SCRIPT, MODEL_SCRIPT = "convert_lora_to_gguf.py", "convert_hf_to_gguf.py"
VARIABLES = ("LLAMA_CPP", "LLAMA_CPP_PATH")
TYPES = ("f32", "f16", "bf16", "q8_0")
_HEADER = struct.Struct("<4sIQ")  # magic, version, number of tensors
_LONGEST_REASON = 300


@dataclass(frozen=True)
class Converter:
    """One of llama.cpp's scripts, and the start of the command that runs it."""

    script: Path
    command: tuple[str, ...]

    @classmethod
    def find(cls, name: str, asked: Path | None) -> Converter:
        """Find a script in the folder that is asked for, in that of a variable, or on PATH.

        Raises UserError, which says what to install, where it is not there.
        """
        named = [("--converter", asked)] if asked else _from_environment()
        for source, folder in named:
            script = folder if folder.name == name else folder / name
            if not script.is_file():
                raise UserError(
                    f"{source} names {folder}, which holds no {name}: name a checkout of llama.cpp "
                    "(https://github.com/ggml-org/llama.cpp), which has it"
                )
            return cls(script, (sys.executable, str(script)))
        if found := shutil.which(name):
            return cls(Path(found), (found,))
        raise UserError(
            f"llama.cpp's {name} is not here: clone https://github.com/ggml-org/llama.cpp, install what it needs (`pip "
            f"install gguf sentencepiece`), and name the clone with --converter or the variable {VARIABLES[0]}"
        )

    def run(self, arguments: Sequence[str], file: Path) -> int:
        """Run the script, which writes `file`; return the number of tensors in that.

        Raises UserError with the last line of what a script said that failed or wrote no such file.
        """
        try:
            done = subprocess.run(
                [*self.command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise UserError(f"{self.script} cannot be run ({error.strerror})") from error
        if done.returncode:
            said = [line.strip() for line in done.stdout.splitlines() if line.strip()]
            last = said[-1][:_LONGEST_REASON] if said else f"status {done.returncode}"
            raise UserError(f"llama.cpp's {self.script.name} failed ({last})")
        return count_tensors(file)


def count_tensors(file: Path) -> int:
    """Read the number of tensors off the header of a GGUF file. Raises UserError for a file that is none."""
    begins = b""
    if file.is_file():
        with file.open("rb") as stream:
            begins = stream.read(_HEADER.size)
    if len(begins) < _HEADER.size or not begins.startswith(b"GGUF"):
        raise UserError(f"the converter ended well, but wrote no GGUF file to {file.name}")
    return int(_HEADER.unpack(begins)[2])


def _from_environment() -> list[tuple[str, Path]]:
    """Return the first variable that is set, with its folder."""
    for variable in VARIABLES:
        if os.environ.get(variable):
            return [(variable, Path(os.environ[variable]).expanduser())]
    return []
