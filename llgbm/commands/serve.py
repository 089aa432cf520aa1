"""`python -m llgbm serve`: MLflow's own server on a registered generator, by default on this machine only."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from llgbm.runtime import UserError, say

HOST, PORT = "127.0.0.1", 5001


def add_parser(commands: Any) -> None:
    """Register the command."""
    start = commands.add_parser("serve", help="serve a registered generator with MLflow")
    start.add_argument(
        "--model",
        metavar="MODEL",
        help="models:/NAME@ALIAS or models:/NAME/VERSION (default: the champion, where there is one model)",
    )
    start.add_argument("--host", default=HOST, help=f"(default: {HOST}, this machine only)")
    start.add_argument("--port", type=int, default=PORT, help=f"(default: {PORT})")
    start.add_argument(
        "--tracking-uri", metavar="URI", help="an MLflow server (default: ./mlruns/mlflow.db)"
    )
    start.set_defaults(do=serve)


def serve(arguments: argparse.Namespace) -> NoReturn:
    """Become MLflow's server; whoever ends it ends this process. Raises UserError where there is no such model."""
    from llgbm.commands.generators import registered_model

    if not 0 < arguments.port < 65536:
        raise UserError(f"--port is {arguments.port}; it must be between 1 and 65535")
    address, tracking_uri = registered_model(arguments.model, arguments.tracking_uri)
    say(f"serving {address} at http://{arguments.host}:{arguments.port} (POST /invocations)")
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", address]
    command += ["--env-manager", "local", "-h", arguments.host, "-p", str(arguments.port)]
    # MLflow calls uvicorn by its name, also where this environment is not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking_uri, "PATH": path}
    os.execve(sys.executable, command, environment)
