"""Check what Ray needs of a machine before anything is built, and how this program speaks to a cluster."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import sys
import tempfile
from pathlib import Path

from llgbm.runtime import UserError

CONNECT_SECONDS = 5.0
TOKEN = Path("~/.ray/auth_token")
# Ray makes sockets below its folder, and the system allows 107 bytes for the path of one.
SOCKET = "session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
SOCKET_BYTES = 107
FREE_BYTES = 200 * 2**20


def ray_folder() -> Path:
    """Return the folder that Ray keeps a session in."""
    base = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return Path(base) / "ray"


def check_ray_folder() -> None:
    """Raise UserError unless a local Ray can keep its sockets and logs in its folder."""
    folder = ray_folder()
    remedy = "set RAY_TMPDIR to another folder, such as /tmp"
    longest = len(os.fsencode(folder / SOCKET.format(pid=os.getpid())))
    if longest > SOCKET_BYTES:
        raise UserError(
            f"the path of the temporary folder {folder.parent} is {longest - SOCKET_BYTES} bytes too long for Ray's "
            f"sockets: {remedy}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"Ray cannot write to its folder {folder} ({error.strerror}): {remedy}"
        ) from error
    free = shutil.disk_usage(folder).free
    if free < FREE_BYTES:
        raise UserError(
            f"the disk of {folder} (Ray) has {free / 1e6:.0f} MB left; free {FREE_BYTES / 1e6:.0f} MB, or {remedy}"
        )


def require_token() -> None:
    """Make the Ray of a local sweep, which listens on all interfaces, ask for a token.

    The token is made for this sweep, unless the environment has one.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    if not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if "ray" in sys.modules:
        # It has read its settings already.
        sys.modules["ray"]._raylet.Config.initialize("")


def show_token() -> None:
    """Show the token of this user's clusters to the one that is joined. Call it before Ray is imported."""
    known = (
        os.environ.get("RAY_AUTH_TOKEN")
        or os.environ.get("RAY_AUTH_TOKEN_PATH")
        or TOKEN.expanduser().is_file()
    )
    if known:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def check_cluster(address: str) -> None:
    """Raise UserError unless something answers at the address of a cluster, within seconds."""
    if address == "auto":
        _check_auto()
        return
    host, port = split_address(address)
    _check_answers(host, port, address, "correct the address")


def _check_auto() -> None:
    """Check the cluster that `auto` means: Ray itself would wait for a dead one for a minute."""
    named = os.environ.get("RAY_ADDRESS", "")
    if named and named not in ("auto", "local"):
        host, port = split_address(named)
        _check_answers(host, port, f"{named} (RAY_ADDRESS)", "correct or unset RAY_ADDRESS")
        return
    last = ray_folder() / "ray_current_cluster"
    if not last.is_file():
        return
    known = last.read_text().strip()
    host, port = split_address(known)
    _check_answers(host, port, f"{known}, the last one of this machine", "leave --address out")


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of a cluster. Raises UserError if the address has another form."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"the cluster's address is {address!r}: write auto, host:port or ray://host:port, the port from 1 to 65535"
        )
    return host.strip("[]"), int(port)


def _check_answers(host: str, port: int, shown: str, remedy: str) -> None:
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at {shown} ({error}): start one with `ray start --head --port 6379`, or {remedy}"
        ) from error
