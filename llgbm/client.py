"""Ask a served generator for an adapter. Needs nothing but Python: no torch, no MLflow, not even the base model.

The server is MLflow's own: `mlflow models serve -m models:/NAME@champion --env-manager local`.
"""

from __future__ import annotations

import base64
import binascii
import json
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import OpenerDirector, ProxyHandler, Request, build_opener

from llgbm.runtime import UserError
from llgbm.system.lineage import card, read_lineage, split_weights
from llgbm.system.output import CARD, Output, carded_output, sample_outputs
from llgbm.tasks.prompts import check_prompts

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
SECONDS = 120.0
# Of a refusal.
MOST_BYTES = 1_000_000


def fetch_adapter(
    url: str,
    prompts: Sequence[str],
    folder: str | Path,
    timeout: float = SECONDS,
    subsets: int = 0,
    description: str = "",
) -> Path:
    """Send the unlabelled prompts of one task to the server at `url` and write its answer as a PEFT folder.

    With `subsets` the adapter is the mean of those for so many halves of the prompts; a generator that was trained on
    descriptions reads a `description` of the task, beside prompts or without any. The folder is checked first and
    written whole or not at all; an earlier adapter of this program there is replaced. Raises UserError if there is
    nothing to send, the folder cannot be written or holds another adapter, or the server does not answer within
    `timeout` seconds or answers something else.
    """
    texts = check_prompts(prompts) if prompts or not description else []
    others = {"subsets": subsets, "description": description}
    given = {name: value for name, value in others.items() if value}
    output = carded_output(folder)
    # A list is what every server knows; one of an older version refuses an object.
    asked = {"prompts": texts, **given} if given else texts
    (found,) = _adapters_of(url, _ask(url, [asked], timeout), 1)
    return _write(output, *found)


def fetch_samples(
    url: str,
    prompts: Sequence[str],
    folder: str | Path,
    samples: int,
    seed: int = 0,
    description: str = "",
) -> list[Path]:
    """Let the server at `url` draw several adapters for the texts of one task; return the folders `sample_<number>`.

    The same seed gives the same adapters. Raises UserError as `fetch_adapter`, and where the served generator draws
    nothing.
    """
    texts = check_prompts(prompts) if prompts or not description else []
    outputs = sample_outputs(folder, samples)
    asked = {"prompts": texts, "seed": seed}
    if description:
        asked["description"] = description
    rows = [{**asked, "sample": number} for number in range(samples)]
    found = _adapters_of(url, _ask(url, rows, SECONDS), samples)
    return [_write(output, *own) for output, own in zip(outputs, found, strict=True)]


def _write(output: Output, weights: bytes, config: Mapping[str, Any]) -> Path:
    lineage = read_lineage(weights)
    with output.writing() as stage:
        (stage / WEIGHTS_FILE).write_bytes(weights)
        (stage / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True))
        if lineage and CARD in output.patterns:
            (stage / CARD).write_text(card(lineage, config), encoding="utf-8")
    return output.path


def _ask(url: str, rows: Sequence[Any], timeout: float) -> Any:
    check_address(url)
    cells = [[json.dumps(row)] for row in rows]
    body = {"dataframe_split": {"columns": ["prompts"], "data": cells}}
    silent = "no generator is served at {}: start `mlflow models serve`, or correct the address"
    answer = post_json(f"{url.rstrip('/')}/invocations", body, timeout, "the prompts", silent)
    try:
        return json.loads(answer)
    except ValueError as error:
        raise UserError(f"the server at {url} answers no JSON: it serves no generator") from error


def check_address(url: str) -> None:
    """Raise UserError unless this is the address of a server."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"{url!r} is no address of a server: write http://host:port")


def post_json(url: str, body: Any, timeout: float, sent: str, silent: str) -> bytes:
    """Send JSON to an address; return the answer.

    Raises UserError where the server refuses what is `sent`, with its reason, or where none answers: `silent` says so
    of the address and the cause.
    """
    headers = {"Content-Type": "application/json"}
    request = Request(url, json.dumps(body).encode(), headers)
    where = url.removesuffix("/invocations")
    try:
        with opener(url).open(request, timeout=timeout) as answer:
            found: bytes = answer.read()
    except HTTPError as error:
        raise UserError(
            f"the server at {where} refused {sent} (HTTP {error.code}: {_complaint(error)})"
        ) from error
    except (URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(silent.format(f"{where} ({reason})")) from error
    return found


def opener(url: str) -> OpenerDirector:
    """Return what opens an address: through the proxies of the environment, but past them to this machine."""
    if is_loopback(urlsplit(url).hostname or ""):
        return build_opener(ProxyHandler({}))
    return build_opener()


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine, by name or by number."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ip_address(name.partition("%")[0])
    except ValueError:
        try:
            address = IPv4Address(socket.inet_aton(name))  # 127.1, as the system reads it
        except (OSError, ValueError):
            return False
    inner = getattr(address, "ipv4_mapped", None) or address
    return bool(inner.is_loopback or inner.is_unspecified)


def _complaint(error: HTTPError) -> str:
    text = error.read(MOST_BYTES).decode("utf-8", "replace")
    with suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["message"])
    # MLflow repeats the prompts before the reason.
    reason = text.rpartition("Error: ")[2]
    return " ".join(reason.split())[:300] or "no reason given"


def _adapters_of(url: str, answer: Any, count: int) -> list[tuple[bytes, Mapping[str, Any]]]:
    try:
        rows = list(answer["predictions"])
    except (KeyError, TypeError):
        rows = []
    if len(rows) != count:
        raise UserError(
            f"the server at {url} answers no adapter: it serves something else than a generator"
        )
    return [_adapter_of(url, row) for row in rows]


def _adapter_of(url: str, row: Any) -> tuple[bytes, Mapping[str, Any]]:
    try:
        weights = base64.b64decode(row["adapter_safetensors_base64"], validate=True)
        config = json.loads(row["adapter_config"])
        whole = _is_safetensors(weights) and config["peft_type"] == "LORA"
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise UserError(
            f"the server at {url} answers no adapter: it serves something else than a generator"
        ) from error
    if not whole:
        raise UserError(f"the adapter that the server at {url} sent is damaged: ask again")
    return weights, config


def _is_safetensors(data: bytes) -> bool:
    """Say if the bytes are as long as their header says, and a lineage in it can be read.

    Raises UserError for a lineage of a newer format.
    """
    try:
        split_weights(data)
        read_lineage(data)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError):
        return False
    return True
