"""Commands about generators: `generate`, `fetch` and `models`. The one door from llgbm to the registry."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llgbm.runtime import UserError, say, uncollected
from llgbm.system.output import carded_output, named_path, sample_outputs
from llgbm.tasks.prompts import read_prompts

PROMPTS_HELP = "prompts, one a line, with blank lines between them, or in JSON; the content tells"
REPOSITORY = "owner/name, or owner/name@revision"
ADAPTER_DTYPES = ("float32", "bfloat16", "float16")

if TYPE_CHECKING:
    from llgbm.generator.bundle import GeneratorBundle


def add_parser(commands: Any) -> None:
    """Register `generate`, `fetch` and `models`."""
    _add_generate(commands)
    _add_fetch(commands)
    _add_models(
        commands.add_parser(
            "models", help="list, show, promote and roll back registered generators"
        )
    )


def _add_generate(commands: Any) -> None:
    make = commands.add_parser(
        "generate", help="write a PEFT adapter from the unlabelled prompts of a task"
    )
    make.add_argument(
        "--model",
        required=True,
        help="models:/NAME@ALIAS, models:/NAME/VERSION, or a generator's folder",
    )
    make.add_argument("--prompts", type=named_path, help=PROMPTS_HELP)
    _add_asked(make)
    make.add_argument(
        "--out", required=True, type=named_path, help="the folder that the adapter is written to"
    )
    make.add_argument(
        "--dtype", default="float32", help="of the weights: float32 (default), bfloat16 or float16"
    )
    make.add_argument(
        "--tracking-uri", metavar="URI", help="an MLflow server (default: ./mlruns/mlflow.db)"
    )
    _add_samples(make)
    make.set_defaults(do=generate)


def _add_samples(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--samples",
        type=int,
        metavar="K",
        help="draw K adapters into OUT/sample_0, OUT/sample_1 ...; of generators that can, such as latent",
    )
    parser.add_argument("--seed", type=int, help="of --samples (default: 0)")


def _samples_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return number and seed of the adapters to draw, nothing for one that is not drawn; check where they go.

    Raises UserError for a seed without samples, for subsets with them, and as `sample_outputs`.
    """
    if arguments.samples is None:
        if arguments.seed is not None:
            raise UserError("--seed is of --samples: give both, or neither")
        carded_output(arguments.out)
        return {}
    if arguments.subsets is not None:
        raise UserError("--subsets averages adapters and --samples draws several: give one of them")
    if (arguments.seed or 0) < 0:
        raise UserError(f"--seed is {arguments.seed}; it must be at least 0")
    sample_outputs(arguments.out, arguments.samples)
    return {"samples": arguments.samples, "seed": arguments.seed or 0}


def _add_asked(parser: argparse.ArgumentParser) -> None:
    """Register what a generator is asked with beside a file of prompts."""
    parser.add_argument(
        "--subsets",
        type=int,
        metavar="S",
        help="average the adapters for S different halves of the prompts",
    )
    parser.add_argument(
        "--description",
        metavar="TEXT",
        help="what the task is, for generators that were trained on descriptions (--condition)",
    )


def read_asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the texts that a generator is asked with. Raises UserError where there are none, or subsets of none."""
    description = arguments.description or ""
    if arguments.description is not None and not description.strip():
        raise UserError("--description is empty: say what the task is, or leave it out")
    if not arguments.prompts and not description:
        raise UserError("there is nothing to generate from: give --prompts (or --description)")
    if arguments.subsets is not None and (arguments.subsets < 2 or not arguments.prompts):
        raise UserError(
            "--subsets averages over at least 2 subsets of --prompts: give both, or neither"
        )
    prompts = read_prompts(arguments.prompts) if arguments.prompts else []
    return {"prompts": prompts, "subsets": arguments.subsets or 0, "description": description}


def _add_fetch(commands: Any) -> None:
    ask = commands.add_parser(
        "fetch", help="ask a served generator for an adapter, or the hub for what was pushed"
    )
    source = ask.add_mutually_exclusive_group(required=True)
    source.add_argument("--url", help="a server (`llgbm serve`), such as http://127.0.0.1:5001")
    source.add_argument("--hub", metavar="REPO", help=REPOSITORY)
    ask.add_argument("--prompts", type=named_path, help=f"with --url: {PROMPTS_HELP}")
    _add_asked(ask)
    ask.add_argument("--out", required=True, type=named_path, help="the folder that is written")
    _add_samples(ask)
    ask.set_defaults(do=fetch)


def _add_models(parser: argparse.ArgumentParser) -> None:
    """Four commands about registered generators."""
    actions = parser.add_subparsers(dest="action", required=True)
    for name, target, text in (
        ("list", "NAME", "every version, the newest first (of the model NAME, if given)"),
        ("show", "NAME[/VERSION]", "all that is known of a version (default: the champion)"),
        ("promote", "NAME/VERSION", "make a version the champion, whatever the comparison said"),
        ("rollback", "NAME", "go back to the champion before"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("target", metavar=target, nargs="?" if name == "list" else None)
        action.add_argument("--json", action="store_true", help="print JSON")
        action.add_argument(
            "--tracking-uri", metavar="URI", help="an MLflow server (default: ./mlruns/mlflow.db)"
        )
        action.set_defaults(do=models)


def models(arguments: argparse.Namespace) -> Any:
    """Answer a command about registered generators: a text, or data for JSON with `--json`."""
    from tuning.registry import commands as model_commands

    answer = model_commands.COMMANDS[arguments.action](arguments.tracking_uri, arguments.target)
    return answer if arguments.json else model_commands.as_text(answer)


def fetch(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ask a served generator, or the hub; return where the answer is."""
    if arguments.hub:
        from llgbm.commands.hub import fetch_from_hub

        of_url = ("prompts", "subsets", "description", "samples", "seed")
        if name := next((own for own in of_url if getattr(arguments, own) is not None), None):
            raise UserError(f"--{name} goes with --url: what is on the hub is made already")
        return fetch_from_hub(arguments.hub, arguments.out)
    from llgbm.client import fetch_adapter, fetch_samples

    if not arguments.prompts and not arguments.description:
        raise UserError("--url needs --prompts: the server generates an adapter from them")
    drawn, asked = _samples_of(arguments), read_asked(arguments)
    told = {"server": arguments.url, "prompts": len(asked["prompts"])}
    if not drawn:
        fetch_adapter(arguments.url, folder=arguments.out, **asked)
        return {"adapter": str(arguments.out), **told}
    del asked["subsets"]
    folders = fetch_samples(arguments.url, folder=arguments.out, **drawn, **asked)
    return {"adapters": [str(folder) for folder in folders], "seed": drawn["seed"], **told}


def generate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write an adapter, or several samples; return their folders, their base and the number of prompts."""
    drawn = _samples_of(arguments)
    if arguments.dtype not in ADAPTER_DTYPES:
        raise UserError(
            f"unknown dtype {arguments.dtype!r}; there are: {', '.join(ADAPTER_DTYPES)}"
        )
    asked = read_asked(arguments)
    with uncollected():
        bundle = open_bundle(arguments.model, arguments.tracking_uri)
        written = write_asked(bundle, arguments.out, arguments.dtype, asked, drawn)
    base, count = bundle.facts["base_path"], len(asked["prompts"])
    read = f"{count} prompts" if count else "a description"
    say(f"wrote {arguments.out} from {read}; its base is {base}")
    return {**written, "base": base, "prompts": count}


def write_asked(
    bundle: GeneratorBundle, out: Path, dtype: str, asked: dict[str, Any], drawn: dict[str, Any]
) -> dict[str, Any]:
    """Write the adapter that is asked for, or those to draw; return where they are."""
    if not drawn:
        bundle.save_adapter(folder=out, dtype=dtype, **asked)
        return {"adapter": str(out)}
    texts = {name: asked[name] for name in ("prompts", "description")}
    folders = bundle.save_samples(folder=out, dtype=dtype, **texts, **drawn)
    return {"adapters": [str(folder) for folder in folders], "seed": drawn["seed"]}


def open_bundle(address: str, tracking_uri: str | None) -> GeneratorBundle:
    """Load a generator from a folder or from the registry. Raises UserError if there is none at the address."""
    from tuning.registry import load_bundle

    return load_bundle(address, tracking_uri)


def registered_model(address: str | None, tracking_uri: str | None) -> tuple[str, str]:
    """Return `models:/NAME/VERSION` of a registered generator, by default the only champion, and its store.

    Raises UserError where there is none, or several models and no address.
    """
    from tuning.registry.versions import CHAMPION, all_models, registry_client, resolve

    with registry_client(tracking_uri) as client:
        if address is None:
            names = [model.name for model in all_models(client)]
            if len(names) != 1:
                told = ", ".join(names) or "none at all"
                raise UserError(f"name a model with --model: there are {told}")
            address = f"{names[0]}@{CHAMPION}"
        version = resolve(client, address)
        return f"models:/{version.name}/{version.version}", str(client.tracking_uri)
