"""`python -m llgbm evaluate`: adapters on a task of the synthetic suite, or side by side on datasets in files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llgbm.commands.adapters import adapter_system, load_base_of, parse_named
from llgbm.commands.generators import open_bundle
from llgbm.commands.rules import add_row_rules, row_rules
from llgbm.runtime import UserError, pick_device, say
from llgbm.system.output import named_path

if TYPE_CHECKING:
    from llgbm.evaluation.benchmark import System
    from llgbm.models.load import Base
    from llgbm.tasks.files import FileSuite


def add_parser(commands: Any) -> None:
    """Register the command."""
    score = commands.add_parser(
        "evaluate", help="score adapters on a synthetic task or on datasets in files"
    )
    score.add_argument(
        "--adapter",
        nargs="+",
        default=[],
        metavar="[NAME=]DIR",
        help="folders of PEFT adapters, named in the result",
    )
    score.add_argument(
        "--task", metavar="NAME", help="a task of the synthetic suite, such as reverse-brackets"
    )
    score.add_argument(
        "--base", metavar="DIR|HUB", help="the base model (default: the one that the adapter names)"
    )
    score.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help="evaluation examples (default: 256, or all there are)",
    )
    _add_data(score.add_argument_group("datasets in files"))
    score.set_defaults(do=evaluate)


def _add_data(data: Any) -> None:
    """Add the options of datasets in files."""
    data.add_argument("--data", type=named_path, metavar="DIR", help="where NAME_test.json, … lie")
    data.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="datasets to score on")
    data.add_argument(
        "--generator",
        metavar="MODEL",
        help="models:/NAME@ALIAS or a folder: adapts to each dataset",
    )
    data.add_argument(
        "--shots",
        type=int,
        default=4,
        metavar="N",
        help="solved examples in context (default 4, 0: none)",
    )
    data.add_argument(
        "--max-tokens", type=int, metavar="N", help="longest response (default: by kind of answer)"
    )
    add_row_rules(data)
    data.add_argument(
        "--tracking-uri", metavar="URI", help="an MLflow server (default: ./mlruns/mlflow.db)"
    )


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Score what the arguments name. Raises UserError for arguments that do not go together."""
    for name, least in (("examples", 1), ("max_tokens", 1), ("shots", 0)):
        if (value := getattr(arguments, name)) is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    if (arguments.task is None) == (arguments.data is None):
        raise UserError("name either --task, of the synthetic suite, or --data with --tasks")
    return _on_synthetic_task(arguments) if arguments.data is None else _on_datasets(arguments)


def _on_synthetic_task(arguments: argparse.Namespace) -> dict[str, Any]:
    """Exact match of greedy decoding on fresh evaluation examples, with and without the adapter."""
    from llgbm.models.scoring import base_accuracy, exact_match
    from llgbm.tasks.synthetic import SyntheticSuite

    suite, count = SyntheticSuite(), arguments.examples or 256
    examples = suite.examples(suite.task(arguments.task).name, "evaluation", count, "evaluate")
    if len(arguments.adapter) != 1 or arguments.tasks or arguments.generator:
        raise UserError("--task takes one --adapter, and neither --tasks nor --generator")
    base = _load_base(arguments)
    system = adapter_system(base, arguments.adapter[0])
    assert system.spec is not None and system.adapter is not None
    return {
        "task": arguments.task,
        "examples": count,
        "accuracy": round(exact_match(base, system.spec, system.adapter, [examples]).item(), 4),
        "base_accuracy": round(base_accuracy(base, examples), 4),
    }


def _on_datasets(arguments: argparse.Namespace) -> dict[str, Any]:
    """Base, solved examples in context, adapters and generated adapters side by side on each dataset."""
    from llgbm.evaluation.benchmark import System, measure
    from llgbm.tasks.files import FileSuite

    if not arguments.tasks:
        raise UserError("--data needs --tasks: name the datasets to score on")
    suite = FileSuite.open(arguments.data, test=arguments.tasks, rules=row_rules(arguments))
    base = _load_base(arguments)
    systems = [System("base")]
    if arguments.shots:
        systems.append(System(f"{arguments.shots} examples in context", shots=arguments.shots))
    systems += [adapter_system(base, named) for named in arguments.adapter]
    results = []
    for task in arguments.tasks:
        count = min(arguments.examples or 256, len(suite.datasets[task].rows["evaluation"]))
        generated = [_generated_system(arguments, base, suite, task)] if arguments.generator else []
        results.append(
            measure(
                base, suite, task, _named_once([*systems, *generated]), count, arguments.max_tokens
            )
        )
        say(table(results[-1]))
    return {"base": base.path, "results": results}


def _load_base(arguments: argparse.Namespace) -> Base:
    from llgbm.models.load import load_base

    if arguments.adapter:
        return load_base_of(parse_named(arguments.adapter[0])[1], arguments.base)
    if not arguments.base:
        raise UserError("there is no base: name it with --base")
    return load_base(arguments.base, pick_device())


def _generated_system(
    arguments: argparse.Namespace, base: Base, suite: FileSuite, task: str
) -> System:
    """Adapter that the generator writes from prompts of the dataset, none of which is scored on."""
    from llgbm.evaluation.benchmark import System
    from llgbm.generator.conditioning import describe
    from llgbm.lora import LoraBatch

    bundle = open_bundle(arguments.generator, arguments.tracking_uri)
    bundle.check_base(base)
    count = min(16, len(suite.datasets[task].rows["prompts"]))
    how, asked = bundle.conditioning, suite.examples(task, "prompts", count, "condition")
    prompts = [example.prompt for example in asked] if how.has_prompts else []
    told = describe(suite, task) if how.has_description else ""
    batch = LoraBatch.from_state_dicts([bundle.generate(prompts, description=told)])
    batch.check(bundle.generator.spec)
    return System("generated", batch.to(base.model.device), bundle.generator.spec)


def _named_once(systems: Sequence[System]) -> Sequence[System]:
    names = [system.name for system in systems]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"two systems are called {twice!r}: give adapters different names with --adapter NAME=DIR"
        )
    return systems


def table(result: dict[str, Any]) -> str:
    """One dataset's numbers, a line for each system and for what needs no model."""
    from tabulate import tabulate

    rows = [
        [
            name,
            s["accuracy"],
            "{:.3f} to {:.3f}".format(*s["interval"]),
            s["answered"],
            s["in_form"],
            s["likelihood_accuracy"],
        ]
        for name, s in result["systems"].items()
    ]
    rows += [[name, result[name], "", "", "", ""] for name in ("majority", "chance")]
    headers = ("", "accuracy", "95 % interval", "answered", "in form", "by likelihood")
    shown = tabulate(rows, headers, floatfmt=".3f", missingval="–")
    return f"{result['task']} ({result['kind']}, {result['examples']} examples)\n{shown}"
