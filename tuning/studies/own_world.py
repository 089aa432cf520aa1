"""Describe worlds of a user's own base model and data."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from llgbm.lora.adapters import LoraSpec
from llgbm.models.load import OWN_PREFIX, SIZES, BaseSource, PublishedSize, check_size, find_model
from llgbm.runtime import UserError, say
from llgbm.tasks import make_suite
from llgbm.tasks.files import FileSuite, plan_split
from llgbm.tasks.forms import RowRules
from llgbm.tasks.suite import Suite
from llgbm.teachers.bank import BankSource
from llgbm.teachers.train import TeacherConfig, fitted, named_targets
from llgbm.world import WorldConfig
from tuning.studies.options import StudyArguments

ABOUT_TEACHERS = (
    "rank",
    "alpha",
    "target_modules",
    "teacher_steps",
    "teacher_rate",
)
NEEDS_DATA = ("tasks", "held_out", "validation", "rows", "skip_bad_rows", "longest_row")


def custom_worlds(arguments: StudyArguments, download: bool = True) -> tuple[WorldConfig, ...]:
    """World for each base that the arguments name; none where everything is the embedded one.

    Raises UserError for options that do not go together and for what cannot be found.
    """
    named = arguments.model_size or ()
    sizes = [name for name in named if isinstance(SIZES.get(name), PublishedSize)]
    if arguments.data is None and (unused := [n for n in NEEDS_DATA if getattr(arguments, n)]):
        raise UserError(
            f"--{unused[0].replace('_', '-')} is about datasets in files: name their folder with --data"
        )
    if arguments.suite is not None and arguments.data is not None:
        raise UserError("--suite and --data both name the tasks: leave one out")
    if arguments.base is None and not sizes:
        _refuse_without_base(arguments)
        return _embedded_worlds(arguments)
    if len(sizes) < len(named):
        raise UserError(
            "embedded sizes and published ones cannot be mixed in one run: name sizes of one kind"
        )
    if arguments.base is not None and len(sizes) > 1:
        raise UserError(
            "--base is one model, several sizes were named: leave --model-size out or name one"
        )
    if arguments.bank is not None and (
        unused := [
            n for n in (*ABOUT_TEACHERS, "adapters_per_task") if getattr(arguments, n) is not None
        ]
    ):
        raise UserError(
            f"--{unused[0].replace('_', '-')} is about teachers that are trained; --bank names trained ones"
        )
    suite = _suite(arguments)
    names: list[str | None] = [*sizes] or [None]
    return tuple(_world(arguments, suite, name, download) for name in names)


def _refuse_without_base(arguments: StudyArguments) -> None:
    if arguments.data is not None:
        raise UserError(
            "--data needs a base model that reads its language: name one with --base, or a size such as "
            f"{', '.join(n for n, size in SIZES.items() if isinstance(size, PublishedSize))} with --model-size"
        )
    for name in (*ABOUT_TEACHERS, "bank"):
        if getattr(arguments, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} belongs to a base of your own: name it with --base"
            )
    if arguments.dtype != "float32":
        raise UserError("--dtype belongs to a base of your own: name it with --base")


def _embedded_worlds(arguments: StudyArguments) -> tuple[WorldConfig, ...]:
    """World of each embedded size for a named suite; none where everything is the default."""
    if arguments.suite is None:
        return ()
    suite = make_suite(arguments.suite)
    worlds = [WorldConfig(size, suite) for size in arguments.model_size or ("nano",)]
    return tuple(map(clamp_examples, worlds))


def _suite(arguments: StudyArguments) -> Suite:
    if arguments.data is None:
        return make_suite(arguments.suite or "synthetic")
    if arguments.rows is not None and arguments.rows < 1:
        raise UserError(f"--rows is {arguments.rows}; it must be at least 1")
    tasks, held_out = arguments.tasks or (), arguments.held_out or ()
    folder = Path(arguments.data).expanduser()
    rules = RowRules(arguments.skip_bad_rows)
    if arguments.longest_row is not None:
        rules = replace(rules, longest=arguments.longest_row)
    split = plan_split(folder, tasks, held_out, arguments.validation, rules)
    return FileSuite.open(folder, split.train, split.val, split.test, arguments.rows, rules)


def _world(
    arguments: StudyArguments, suite: Suite, size: str | None, download: bool
) -> WorldConfig:
    """World of one base: `size` is its published size, None for a model that is of none."""
    published = SIZES.get(size or "")
    name = arguments.base or (published.hub if isinstance(published, PublishedSize) else "")
    folder = find_model(name, download=download)
    if size is not None:
        check_size(size, folder)
    source = BaseSource.find(name, arguments.dtype, download=download)
    label = size or OWN_PREFIX + re.sub(r"[^\w.-]+", "-", Path(name).name)
    bank = None if arguments.bank is None else BankSource.find(arguments.bank)
    return clamp_examples(
        WorldConfig(label, suite, teachers=_teachers(arguments, published), base=source, bank=bank)
    )


def _teachers(arguments: StudyArguments, published: Any) -> TeacherConfig:
    rank = getattr(published, "rank", 8) if arguments.rank is None else arguments.rank
    alpha = 2.0 * rank if arguments.alpha is None else arguments.alpha
    LoraSpec(
        (), rank, alpha
    )  # Refuses a rank or an alpha that no adapter can have, before anything is loaded.
    steps, rate, count = (
        arguments.teacher_steps,
        arguments.teacher_rate,
        arguments.adapters_per_task,
    )
    return TeacherConfig(
        rank=rank,
        alpha=alpha,
        per_task=(4 if arguments.data else 1) if count is None else count,
        steps=TeacherConfig.steps if steps is None else steps,
        learning_rate=5e-4 if rate is None else rate,
        target_modules=named_targets(arguments.target_modules),
    )


def clamp_examples(world: WorldConfig) -> WorldConfig:
    """World with no more prompts and evaluation examples a task than every dataset has; says what was lowered."""
    examples = world.suite.available("evaluation")
    if examples < world.eval_examples:
        say(f"the smallest dataset has {examples} examples to score on, not {world.eval_examples}")
    return replace(
        world,
        teachers=fitted(world.teachers, world.suite),
        eval_examples=min(examples, world.eval_examples),
    )
