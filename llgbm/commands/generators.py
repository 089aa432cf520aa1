"""Commands about generators: `generate`, `fetch` and `models`. The one door from llgbm to the registry."""

from __future__ import annotations

import argparse
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
    make.add_argument("--prompts", required=True, type=named_path, help=PROMPTS_HELP)
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


def _samples_of(arguments: argparse.Namespace) -> tuple[int, int] | None:
    """Return number and seed of the adapters to draw, None for one that is not drawn; check where they go.

    Raises UserError for a seed without samples, and as `sample_outputs`.
    """
    if arguments.samples is None:
        if arguments.seed is not None:
            raise UserError("--seed is of --samples: give both, or neither")
        carded_output(arguments.out)
        return None
    if (arguments.seed or 0) < 0:
        raise UserError(f"--seed is {arguments.seed}; it must be at least 0")
    sample_outputs(arguments.out, arguments.samples)
    return arguments.samples, arguments.seed or 0


def _add_fetch(commands: Any) -> None:
    ask = commands.add_parser(
        "fetch", help="ask a served generator for an adapter, or the hub for what was pushed"
    )
    source = ask.add_mutually_exclusive_group(required=True)
    source.add_argument("--url", help="a server (`llgbm serve`), such as http://127.0.0.1:5001")
    source.add_argument("--hub", metavar="REPO", help=REPOSITORY)
    ask.add_argument("--prompts", type=named_path, help=f"with --url: {PROMPTS_HELP}")
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

        for name in ("prompts", "samples", "seed"):
            if getattr(arguments, name) is not None:
                raise UserError(f"--{name} goes with --url: what is on the hub is made already")
        return fetch_from_hub(arguments.hub, arguments.out)
    from llgbm.client import fetch_adapter, fetch_samples

    if not arguments.prompts:
        raise UserError("--url needs --prompts: the server generates an adapter from them")
    drawn = _samples_of(arguments)
    prompts = read_prompts(arguments.prompts)
    told = {"server": arguments.url, "prompts": len(prompts)}
    if drawn is None:
        fetch_adapter(arguments.url, prompts, arguments.out)
        return {"adapter": str(arguments.out), **told}
    folders = fetch_samples(arguments.url, prompts, arguments.out, *drawn)
    return {"adapters": [str(folder) for folder in folders], "seed": drawn[1], **told}


def generate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write an adapter, or several samples; return their folders, their base and the number of prompts."""
    drawn = _samples_of(arguments)
    if arguments.dtype not in ADAPTER_DTYPES:
        raise UserError(
            f"unknown dtype {arguments.dtype!r}; there are: {', '.join(ADAPTER_DTYPES)}"
        )
    prompts = read_prompts(arguments.prompts)
    with uncollected():
        bundle = open_bundle(arguments.model, arguments.tracking_uri)
        if drawn is None:
            bundle.save_adapter(prompts, arguments.out, arguments.dtype)
        else:
            folders = bundle.save_samples(prompts, arguments.out, *drawn, arguments.dtype)
    base = bundle.facts["base_path"]
    say(f"wrote {arguments.out} from {len(prompts)} prompts; its base is {base}")
    told = {"base": base, "prompts": len(prompts)}
    if drawn is None:
        return {"adapter": str(arguments.out), **told}
    return {"adapters": [str(folder) for folder in folders], "seed": drawn[1], **told}


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
