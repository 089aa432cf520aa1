"""`python -m llgbm teachers`: train the bank of a base model from datasets in a folder."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from llgbm.commands.rules import add_row_rules, row_rules
from llgbm.runtime import pick_device
from llgbm.system.output import named_path

if TYPE_CHECKING:
    from llgbm.tasks.suite import Suite


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "teachers", help="train teacher adapters of a base model, one bank for several datasets"
    )
    parser.add_argument("--base", required=True, metavar="DIR|HUB", help="the base model")
    parser.add_argument(
        "--data",
        required=True,
        type=named_path,
        metavar="DIR",
        help="the folder of the dataset files",
    )
    parser.add_argument(
        "--tasks", required=True, nargs="+", metavar="NAME", help="datasets, such as ARC-e BoolQ"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=named_path,
        metavar="DIR",
        help="the bank; a killed run goes on there",
    )
    parser.add_argument(
        "--method", default="peft", help="peft (one run at a time) or batched (several at once)"
    )
    parser.add_argument(
        "--dtype", default="float32", help="of the base: float32, bfloat16 or float16"
    )
    parser.add_argument(
        "--device", default="auto", help="such as cuda or cpu (default: cuda where there is one)"
    )
    parser.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="layers that are adapted, such as qkv_proj or c_attn (default: q_proj to down_proj)",
    )
    _add_sizes(parser)
    _add_limits(parser)
    parser.set_defaults(do=do)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """Add the options that limit memory and rows."""
    parser.add_argument(
        "--gradient-checkpointing",
        default="auto",
        metavar="WHEN",
        help="auto (where memory is short), on or off",
    )
    parser.add_argument(
        "--at-once",
        type=int,
        default=0,
        metavar="N",
        help="batched: runs a group (default: all that fit)",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="use at most so many rows of each dataset"
    )
    add_row_rules(parser)


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    """Numbers, with the defaults that hold for Qwen2.5-0.5B."""
    sizes: tuple[tuple[str, float, str], ...] = (
        ("rank", 8, "of the adapters"),
        ("alpha", 16.0, "of the adapters"),
        ("subsets", 2, "runs a dataset, over rows that do not overlap"),
        ("checkpoints", 2, "adapters that each run leaves"),
        ("every", 10, "steps between two of them, and between states to go on from"),
        ("steps", 100, "of each run"),
        ("examples", 16, "read in each step"),
        ("accumulation", 1, "pieces that a step's examples are read in"),
        ("learning-rate", 1e-4, "at the start"),
        ("seed", 0, "of order and initialisation"),
        ("trajectories", 16, "prompts a dataset that its first teacher answers"),
        ("max-tokens", 24, "in the longest of these answers"),
    )
    for name, default, meaning in sizes:
        parser.add_argument(
            f"--{name}",
            type=type(default),
            default=default,
            help=f"{meaning} (default: {default:g})",
        )


def do(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing; return where the bank is and how good its teachers are."""
    from llgbm.models.load import BaseSource
    from llgbm.tasks.files import FileSuite
    from llgbm.teachers.build import make_bank
    from llgbm.teachers.writer import check_bank_address

    check_bank_address(arguments.out)
    suite = FileSuite.open(
        arguments.data,
        train=arguments.tasks,
        limit=arguments.limit,
        rules=row_rules(arguments),
    )
    config = _config(arguments, suite)
    base = BaseSource.find(arguments.base, arguments.dtype).load(pick_device(arguments.device))
    bank = make_bank(base, suite, config, arguments.out)
    facts = {name: round(value, 4) for name, value in bank.facts.items()}
    return {
        "bank": str(arguments.out),
        "hash": bank.hash,
        "adapters": len(bank.adapters),
        "cut_answers": bank.cut_answers,
        **facts,
    }


def _config(arguments: argparse.Namespace, suite: Suite) -> Any:
    from llgbm.teachers.train import SFTConfig, TeacherConfig, fitted, named_targets

    teachers = TeacherConfig(
        rank=arguments.rank,
        alpha=arguments.alpha,
        per_task=arguments.subsets * arguments.checkpoints,
        steps=arguments.steps,
        examples=arguments.examples,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
        trajectories=arguments.trajectories,
        max_tokens=arguments.max_tokens,
        target_modules=named_targets(arguments.target_modules),
    )
    names = ("method", "checkpoints", "every", "accumulation", "gradient_checkpointing", "at_once")
    return SFTConfig(fitted(teachers, suite), **{name: getattr(arguments, name) for name in names})
