"""The command lines that the task scripts share: a script gives its defaults, the rest is here."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from dnd.bank import PROMPTS, AdapterBank, task_texts
from dnd.embedded import embedded_bank
from dnd.errors import DndError
from dnd.generation import AdapterWriter, adapter_output
from dnd.names import DATA, in_place
from dnd.output import check_name
from dnd.training import Trained, TrainSettings, check_training_folder, train

SMOKE = TrainSettings(
    n_prompts=4,
    max_length=24,
    features=((8, 12, 66),),
    kernel_size=3,
    steps=8,
    batch_size=4,
    learning_rate=1e-3,
    save_every=4,
)


def feature_shape(text: str) -> tuple[int, int, int]:
    """`256x50x200` as three sizes."""
    n, length, width = (int(size) for size in text.split("x"))
    return n, length, width


def common_options(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--smoke", action="store_true", help="toy settings on LLGBM's embedded bank"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path(".llgbm"), help="where the embedded bank is kept"
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="texts in DnD's format (default: prepare/data)"
    )
    parser.add_argument("--encoder", help="folder or hub id of the frozen encoder of prompts")
    parser.add_argument(
        "--layer", type=int, help="take the output of this block of the encoder (default: the last)"
    )
    parser.add_argument("--part", help="what to condition on: prompts, prompts+answers or answers")
    parser.add_argument("--n-prompts", type=int, help="prompts of a condition")
    parser.add_argument("--max-length", type=int, help="tokens read of a prompt")
    parser.add_argument(
        "--length", type=int, help="length that prompts are shortened to before the decoder"
    )
    parser.add_argument(
        "--features",
        type=feature_shape,
        nargs="*",
        metavar="NxLxC",
        help="shapes inside the decoder",
    )
    parser.add_argument("--kernel-size", type=int)
    parser.add_argument("--token-size", type=int, nargs=2, metavar=("H", "W"))
    return parser


def training_parser(bank: str, out: str) -> argparse.ArgumentParser:
    """Options of a training script."""
    parser = common_options("Train a generator of LoRA weights on a bank of adapters.")
    parser.add_argument(
        "--bank", type=Path, default=Path(bank), help=f"folder of TASK/TASK_i/ (default: {bank})"
    )
    parser.add_argument(
        "--tasks", nargs="*", metavar="TASK", help="train on these tasks of the bank alone"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(out), help=f"where checkpoints go (default: {out})"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --out"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check bank and settings, say what would be trained"
    )
    parser.add_argument(
        "--criterion-weight", metavar="FILE", help="importance weights (default: from the bank)"
    )
    for name in ("steps", "batch-size", "warmup-steps", "save-every", "workers", "seed"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("learning-rate", "weight-decay"):
        parser.add_argument(f"--{name}", type=float)
    return parser


def train_command(
    defaults: TrainSettings,
    bank: str,
    out: str,
    held_out: Sequence[str] = (),
    arguments: Sequence[str] | None = None,
) -> Trained | None:
    """Training script: returns what was trained, None after a dry run. Raises DndError for a user's mistake.

    Tasks held out are left out of any bank.
    """
    parsed = training_parser(str(in_place(bank)), out).parse_args(arguments)
    chosen = tuple(parsed.tasks or ())
    check_training_folder(parsed.out, parsed.resume)
    if parsed.smoke:
        say("asking LLGBM for its smallest bank: it is built once, in about a minute")
        parsed.bank, encoder, chosen = embedded_bank(parsed.cache)
        defaults = replace(SMOKE, encoder=str(encoder))
    settings = replace(defaults, **given_settings(parsed))
    data = parsed.data
    if data is None and not any(parsed.bank.rglob(PROMPTS)):
        data = public_data()
    found = AdapterBank.open(parsed.bank, chosen, data, settings.part, held_out)
    say_of(found, held_out)
    if parsed.dry_run:
        return None
    trained = train(
        settings,
        found,
        parsed.out,
        parsed.resume,
        lambda step, loss: say(f"step {step}: {loss:.6f}"),
    )
    losses = {"first": trained.losses[0], "last": trained.losses[-1]}
    if is_first_process():
        print(
            json.dumps(
                {
                    "checkpoint": str(trained.checkpoint),
                    "steps": len(trained.losses),
                    "loss": losses,
                }
            )
        )
    return trained


def public_data() -> Path | None:
    """Return the folder of texts of the public code, where there is one."""
    found = in_place(DATA)
    return found if found.is_dir() else None


def say_of(bank: AdapterBank, held_out: Sequence[str]) -> None:
    """Say what a training reads of a bank, and what it does not."""
    say(f"{len(bank.adapters)} adapters of {len(bank.texts)} tasks in {bank.folder}")
    if held_out:
        say(f"held out: {', '.join(held_out)}")
    if others := sum(factor != 1 for factor in bank.factors):
        say(
            f"{others} adapters have another scaling than the first; their B is multiplied to the same products"
        )


def generation_parser(checkpoint: str, out: str, task: str) -> argparse.ArgumentParser:
    """Options of a generation script."""
    parser = common_options(
        "Write PEFT adapters from prompts of a task that no adapter was trained on."
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=Path(checkpoint),
        help="a training's --out, or a .pth file",
    )
    parser.add_argument(
        "--like", type=Path, metavar="DIR", help="for a .pth file: an adapter like those it writes"
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="DIR", help="folder with a prompts.json of the task"
    )
    parser.add_argument(
        "--task",
        default=task,
        help=f"the task whose prompts are read from --data (default: {task})",
    )
    parser.add_argument(
        "--count", type=int, default=1, help="adapters, each from another draw of prompts"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(out), help=f"where adapters go (default: {out})"
    )
    return parser


def generate_command(
    defaults: TrainSettings,
    checkpoint: str,
    out: str,
    task: str,
    arguments: Sequence[str] | None = None,
) -> list[str]:
    """Generation script: returns the folders written. Raises DndError for a user's mistake."""
    parsed = generation_parser(checkpoint, out, task).parse_args(arguments)
    check_name(parsed.task, "the task")
    folders = [parsed.out / f"{parsed.task}_{index}" for index in range(parsed.count)]
    for target in folders:
        adapter_output(target)
    if parsed.smoke:
        parsed.prompts = next(embedded_bank(parsed.cache)[0].glob("*/*/prompts.json")).parent
    if parsed.data is None and parsed.prompts is None:
        parsed.data = public_data()
    if (parsed.data is None) == (parsed.prompts is None):
        raise DndError(
            "prompts come from one place: --data (DnD files), --prompts (a prompts.json) or --smoke"
        )
    writer = load_writer(defaults, parsed)
    texts = task_texts(
        parsed.prompts or Path(), parsed.task, parsed.data, writer.settings.part, "evaluation"
    )
    for index, target in enumerate(folders):
        writer.write(texts, target, seed=index)
    print(json.dumps({"adapters": [str(target) for target in folders]}))
    return [str(target) for target in folders]


def load_writer(defaults: TrainSettings, parsed: argparse.Namespace) -> AdapterWriter:
    """Trained model that a generation script names. Raises DndError for options that its folder already settles."""
    given = given_settings(parsed)
    if parsed.checkpoint.is_file():
        return AdapterWriter.load(parsed.checkpoint, replace(defaults, **given), parsed.like)
    odd = sorted({*given, *(["like"] if parsed.like else [])})
    if odd:
        raise DndError(
            f"{', '.join(odd)} stand in the settings of {parsed.checkpoint}: leave these options out"
        )
    return AdapterWriter.load(parsed.checkpoint)


def given_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """Settings that options were given for."""
    given = {name: getattr(parsed, name, None) for name in TrainSettings.__dataclass_fields__}
    return {
        name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None
    }


def exit_status(command: Callable[[], object]) -> int:
    """0, or 2 and one sentence for what the user can mend."""
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        command()
    except DndError as error:
        say(f"error: {error}")
        return 2
    return 0


def say(text: str) -> None:
    """One line on standard error, by the first process of a launch alone."""
    if is_first_process():
        print(text, file=sys.stderr, flush=True)


def is_first_process() -> bool:
    """Return whether this is the first process of a launch, or the only one."""
    return os.environ.get("RANK", "0") == "0"
