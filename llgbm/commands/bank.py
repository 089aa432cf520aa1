"""`python -m llgbm bank`: take over adapters of other people, and look at a bank."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llgbm.runtime import pick_device
from llgbm.system.output import named_path


def add_parser(commands: Any) -> None:
    """Register `bank import`, `bank embedded` and `bank show`."""
    actions = commands.add_parser("bank", help="banks of adapters from elsewhere").add_subparsers(
        dest="action", required=True
    )
    _add_import(actions)
    _add_embedded(actions)
    look = actions.add_parser("show", help="what a bank holds, and whether it is whole")
    look.add_argument("folder", type=named_path, help="the bank")
    look.set_defaults(do=show)


def _add_import(actions: Any) -> None:
    take = actions.add_parser(
        "import", help="make a bank from PEFT adapters, checked against their base"
    )
    take.add_argument(
        "sources",
        nargs="+",
        metavar="PATH_OR_HUB",
        help="adapter folders, folders above some, or hub ids",
    )
    take.add_argument(
        "--base", required=True, metavar="DIR|HUB", help="the base model that they are for"
    )
    take.add_argument(
        "--out", required=True, type=named_path, metavar="DIR", help="the bank that is written"
    )
    take.add_argument(
        "--prompts",
        type=named_path,
        metavar="FILE",
        help="JSON: prompts by task, for adapters without their own",
    )
    take.add_argument(
        "--task", metavar="NAME", help="the task of all adapters (default: by their folders)"
    )
    take.add_argument(
        "--chat",
        action="store_true",
        help="the prompts are turns of a chat: use the base's template",
    )
    take.add_argument(
        "--accept-base", nargs="+", default=[], metavar="NAME", help="other names of the same base"
    )
    take.add_argument(
        "--trajectories", type=int, default=16, metavar="N", help="prompts a task that are answered"
    )
    take.add_argument(
        "--max-tokens", type=int, default=64, metavar="N", help="longest answer (default: 64)"
    )
    _add_precision(take)
    take.set_defaults(do=take_over)


def _add_precision(take: Any) -> None:
    take.add_argument(
        "--dtype", default="float32", help="of the base: float32, bfloat16 or float16"
    )
    take.add_argument(
        "--device", default="auto", help="such as cuda or cpu (default: cuda where there is one)"
    )


def _add_embedded(actions: Any) -> None:
    make = actions.add_parser(
        "embedded", help="build the bank of the embedded world, or find it in a cache"
    )
    make.add_argument("--smoke", action="store_true", help="the smallest one, in seconds")
    make.add_argument(
        "--cache",
        type=named_path,
        default=Path(".llgbm"),
        help="where it is kept (default: .llgbm)",
    )
    make.set_defaults(do=embedded)


def embedded(arguments: argparse.Namespace) -> dict[str, Any]:
    """Build the embedded bank on the CPU; return its folder, its base and its training tasks."""
    from llgbm.teachers.build import build_bank
    from llgbm.world import WorldConfig, build_base, smoke_world

    config = smoke_world(WorldConfig()) if arguments.smoke else WorldConfig()
    base = build_base(arguments.cache, config, "cpu")
    bank = build_bank(arguments.cache, base, config.suite, config.teachers)
    return {
        "bank": str(bank.folder),
        "base": base.path,
        "tasks": list(config.suite.split.train),
    }


def take_over(arguments: argparse.Namespace) -> dict[str, Any]:
    """Import adapters; return what the bank holds."""
    from llgbm.models.load import BaseSource
    from llgbm.teachers.bank import show_bank
    from llgbm.teachers.imported import ImportOptions, import_bank
    from llgbm.teachers.writer import check_bank_address

    options = ImportOptions(
        tuple(arguments.accept_base),
        arguments.task,
        arguments.chat,
        arguments.trajectories,
        arguments.max_tokens,
    )
    check_bank_address(arguments.out)
    base = BaseSource.find(arguments.base, arguments.dtype).load(pick_device(arguments.device))
    import_bank(arguments.sources, base, arguments.out, options, arguments.prompts)
    return show_bank(arguments.out)


def show(arguments: argparse.Namespace) -> dict[str, Any]:
    """Describe the content of a bank."""
    from llgbm.teachers.bank import show_bank

    return show_bank(arguments.folder)
