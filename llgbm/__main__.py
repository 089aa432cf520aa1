"""What is done outside a sweep: make a bank of teachers or take one over, generate an adapter, evaluate one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llgbm.commands import bank, teachers
from llgbm.runtime import UserError, exit_status, quiet_libraries, say


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. A wrong option ends with one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m llgbm", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("generate", help="write a PEFT adapter from the unlabelled prompts of a task")
    make.add_argument(
        "--model", required=True, help="models:/NAME@ALIAS, models:/NAME/VERSION, or a generator's folder"
    )
    make.add_argument("--prompts", required=True, type=Path, help="a text file, one prompt a line")
    make.add_argument("--out", required=True, type=Path, help="the folder that the adapter is written to")
    make.add_argument("--tracking-uri", metavar="URI", help="an MLflow server (default: ./mlruns/mlflow.db)")
    make.set_defaults(do=generate)
    score = commands.add_parser("evaluate", help="score an adapter on a task of the synthetic suite")
    score.add_argument("--adapter", required=True, type=Path, help="the folder of a PEFT adapter")
    score.add_argument("--task", required=True, metavar="NAME", help="such as reverse-brackets")
    score.add_argument("--base", metavar="FOLDER", help="the base model (default: the one that the adapter names)")
    score.add_argument("--examples", type=int, default=256, metavar="N", help="evaluation examples (default: 256)")
    score.set_defaults(do=evaluate)
    for command in (teachers, bank):
        command.add_parser(commands)
    return parser.parse_args(arguments)


def generate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the adapter; return where it is and what made it."""
    prompts = read_prompts(arguments.prompts)
    from llgbm.bundle import GeneratorBundle
    from tuning.registry import fetch_bundle

    bundle = GeneratorBundle.load(fetch_bundle(arguments.model, arguments.tracking_uri))
    bundle.save_adapter(prompts, arguments.out)
    say(f"wrote {arguments.out} from {len(prompts)} prompts; its base is {bundle.facts['base_path']}")
    return {"adapter": str(arguments.out), "base": bundle.facts["base_path"], "prompts": len(prompts)}


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not blank. Raises UserError for a missing, unreadable or empty file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name a text file with one prompt a line") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: name a text file with one prompt a line") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt: write at least one unlabelled prompt of the task, one a line")
    return prompts


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Exact match of greedy decoding on fresh evaluation examples, with and without the adapter."""
    if arguments.examples < 1:
        raise UserError(f"--examples is {arguments.examples}; it must be at least 1")
    from llgbm.lora import LoraBatch, LoraSpec, load_adapter, read_adapter_config
    from llgbm.models import load_base
    from llgbm.suites import SyntheticSuite
    from llgbm.teachers import base_accuracy, exact_match

    suite = SyntheticSuite()
    examples = suite.examples(suite.task(arguments.task).name, "evaluation", arguments.examples, "evaluate")
    config = read_adapter_config(arguments.adapter)
    base = load_base(arguments.base or config["base_model_name_or_path"])
    spec = LoraSpec.from_model(base.model, config["r"], config["lora_alpha"], tuple(config["target_modules"]))
    batch = LoraBatch.from_state_dicts([load_adapter(arguments.adapter, spec)])
    accuracy = exact_match(base, spec, batch, [examples]).item()
    return {
        "task": arguments.task,
        "examples": arguments.examples,
        "accuracy": round(accuracy, 4),
        "base_accuracy": round(base_accuracy(base, examples), 4),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and print its result as one JSON object; 2 for a user's mistake, 130 for an interrupt."""
    parsed = parse_arguments(arguments)
    quiet_libraries()
    return exit_status(lambda: print_result(parsed.do(parsed)), parsed.debug)


def print_result(result: dict[str, Any]) -> int:
    """Print one JSON object; return status 0."""
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
