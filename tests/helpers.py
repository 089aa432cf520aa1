"""Helpers of tests: places, free ports, real servers, rows of data sets.

Servers start on a free port of 127.0.0.1, are waited for and stopped.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests

if TYPE_CHECKING:
    from llgbm.models.load import Base

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared"
SECONDS = 240
SYSTEM = "Answer by a single [ans]."


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Quiet(BaseHTTPRequestHandler):
    """Handler that writes no log; a subclass answers."""

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@contextmanager
def answering(
    handler: type[BaseHTTPRequestHandler],
    host: str = "127.0.0.1",
    kind: type[ThreadingHTTPServer] = ThreadingHTTPServer,
) -> Iterator[int]:
    """Answer requests in this process; yield the port."""
    with kind((host, 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def serving(
    command: Sequence[str],
    log: Path,
    health: str,
    env: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Iterator[str]:
    """Run a program that takes `--port`; yield its address once `/health` answers there, end it afterwards."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    # As in an activated environment: MLflow calls uvicorn by its name.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with log.open("w") as stream:
        command = [*command, "--port", str(port)]
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=stream,
            env={**(env or os.environ), "PATH": path},
            cwd=folder,
        )
        try:
            wait_for(process, f"{url}/{health}", log)
            yield url
        finally:
            process.terminate()
            process.wait(timeout=60)


def mlflow_server(python: str, backend: str, folder: Path) -> list[str]:
    """The command of an MLflow server with one worker, but for its port."""
    command = [python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    return [
        *command,
        "--backend-store-uri",
        backend,
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]


def wait_for(process: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if requests.get(url, timeout=5).ok:
                return
        except requests.exceptions.RequestException:
            time.sleep(0.5)
    raise RuntimeError(f"the server did not come up: {log.read_text()[-2000:]}")


def rows(topic: str, count: int, start: int = 0) -> list[dict[str, str]]:
    """Multiple-choice rows in the shape of the real ones."""
    rng = random.Random(f"{topic} {start}")
    return [
        {
            "prompt": f"What follows {topic} number {i}?\nA: {topic} {i + 1}\nB: {topic} {i + 2}\nC: nothing\nD: {i}",
            "response": f"[{rng.choice('ABCD')}]",
            "system": SYSTEM,
        }
        for i in range(start, start + count)
    ]


def write_rows(folder: Path, name: str, content: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def facts_of(base: Base) -> dict[str, Any]:
    """Facts of a bundle whose generator reads a base's own states."""
    return {
        "size": "tiny",
        "base_path": base.path,
        "base_hash": base.hash,
        "bank_hash": "bank",
        "encoder": f"base:{base.hash}",
    }


def write_minilm_bundle(folder: Path) -> None:
    """Write an untrained generator that is conditioned on MiniLM's embeddings."""
    from llgbm.generator import make_generator
    from llgbm.generator.bundle import GeneratorBundle, load_generator
    from llgbm.generator.networks import GeneratorConfig

    made, facts = load_generator(ROOT / "tests" / "data" / "formats" / "bundles" / "default")
    config = GeneratorConfig(**facts["generator"])
    folder.mkdir()
    generator = make_generator(config, made.spec, 384, made.standardiser, 0)
    GeneratorBundle.save(folder, generator, config, {**facts, "encoder": "minilm"})
