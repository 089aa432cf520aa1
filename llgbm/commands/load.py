"""`python -m llgbm load`: put an adapter into a running server of vLLM or SGLang, over HTTP."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from llgbm.runtime import UserError
from llgbm.system.output import named_path

# Where each server takes an adapter that lies in a folder it can read, by its own documentation.
PATHS = {"vllm": "/v1/load_lora_adapter", "sglang": "/load_lora_adapter"}
TENSORS = "/load_lora_adapter_from_tensors"
SECONDS = 120.0
MOST_LETTERS = 100_000  # of an answer


def add_parser(commands: Any) -> None:
    """Register the command."""
    put = commands.add_parser("load", help="load an adapter into a running vLLM or SGLang")
    put.add_argument("--adapter", required=True, type=named_path, metavar="DIR")
    put.add_argument("--server", required=True, choices=sorted(PATHS))
    put.add_argument("--url", required=True, help="such as http://127.0.0.1:30000")
    put.add_argument("--name", help="of the adapter there (default: its folder's)")
    put.add_argument(
        "--tensors",
        action="store_true",
        help="sglang: send the weights instead of the folder's path; needs the package sglang",
    )
    put.set_defaults(do=load)


def load(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load an adapter into a server; return what it answers.

    Raises UserError for an adapter that was changed, and a server that refuses it or does not answer.
    """
    from llgbm.client import check_address, post_json
    from llgbm.commands.adapters import read_own_lineage

    check_address(arguments.url)
    if arguments.tensors and arguments.server != "sglang":
        raise UserError("--tensors go to sglang only: vllm loads from a folder that it can read")
    folder = arguments.adapter.expanduser().resolve()
    read_own_lineage(folder)
    body: dict[str, Any] = {"lora_name": arguments.name or folder.name}
    place = PATHS[arguments.server]
    if arguments.tensors:
        place = TENSORS
        body |= tensors_payload(folder)
    else:
        body["lora_path"] = str(folder)
    url = arguments.url.rstrip("/") + place
    answer = post_json(url, body, SECONDS, "the adapter", "no server answers at {}").decode(
        "utf-8", "replace"
    )
    return {
        "loaded": body["lora_name"],
        "server": arguments.url,
        "answer": _answer(answer[:MOST_LETTERS], url),
    }


def tensors_payload(folder: Path) -> dict[str, Any]:
    """Return config and weights of an adapter as SGLang takes them: by its own serialiser, so on its machine.

    Raises UserError where the package is not installed.
    """
    from llgbm.lora.adapters import read_adapter_config, read_adapter_weights

    try:
        from sglang.srt.utils import MultiprocessingSerializer
    except ImportError as error:
        raise UserError(
            "the package sglang is not installed here, whose serialiser --tensors need: load by path instead"
        ) from error
    config = {key: value for key, value in read_adapter_config(folder).items() if value is not None}
    weights = read_adapter_weights(folder)
    return {
        "config_dict": config,
        "serialized_tensors": MultiprocessingSerializer.serialize(weights, output_str=True),
    }


def _answer(text: str, url: str) -> Any:
    """Read what a server answers; vLLM answers with a sentence. Raises UserError where SGLang says that it failed."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    if isinstance(found, dict) and found.get("success") is False:
        raise UserError(f"the server at {url} refused the adapter ({found.get('error_message')})")
    return found
