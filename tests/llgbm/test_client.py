"""The client reaches this machine past proxies, and tells the reason of a refusal."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import Quiet, answering

from llgbm.client import fetch_adapter, is_loopback
from llgbm.runtime import UserError

REASON = "row 0: `prompts` must be a JSON list of one or more texts, got 'x'"


class Handler(Quiet):
    """Refuses as MLflow's server does: the prompts, and then the reason."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        told = {"message": "Failed to predict data '" + "prompts\n" * 400 + f"'. \nError: {REASON}"}
        self.send_response(400)
        self.end_headers()
        self.wfile.write(json.dumps({**told, "stack_trace": "Traceback\n" * 99}).encode())


class OverIPv6(ThreadingHTTPServer):
    address_family = socket.AF_INET6


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with answering(Handler) as own:
        yield own


@pytest.fixture(scope="module")
def port_of_ipv6() -> Iterator[int]:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        with answering(Handler, "::1", OverIPv6) as own:
            yield own
    except OSError:
        pytest.skip("no IPv6 here")


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> None:
    """All proxies lead to a port that nobody listens at."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        for own in (name, name.upper()):
            monkeypatch.setenv(own, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LocalHost", "127.1"])
def test_this_machine_is_reached_past_the_proxies(
    proxied: None, port: int, host: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="must be a JSON list"):
        fetch_adapter(f"http://{host}:{port}", ["a"], tmp_path / "out")


def test_this_machine_is_reached_past_the_proxies_by_ipv6(
    proxied: None, port_of_ipv6: int, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="must be a JSON list"):
        fetch_adapter(f"http://[::1]:{port_of_ipv6}", ["a"], tmp_path / "out")


def test_other_machines_are_reached_through_the_proxy(proxied: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no generator is served.*refused"):
        fetch_adapter("http://192.0.2.1:5001", ["a"], tmp_path / "out", timeout=5)


@pytest.mark.parametrize(
    ("host", "is_here"),
    [
        ("127.0.0.1", True),
        ("127.255.0.9", True),
        ("localhost.", True),
        ("a.localhost", True),
        ("::1", True),
        ("::1%lo", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", True),
        ("2130706433", True),
        ("10.0.0.1", False),
        ("128.0.0.1", False),
        ("::2", False),
        ("localhost.example.org", False),
        ("mylocalhost", False),
        ("", False),
    ],
)
def test_loopback_is_known_in_every_spelling(host: str, is_here: bool) -> None:
    assert is_loopback(host) == is_here


def test_the_reason_of_a_refusal_comes_without_the_prompts(port: int, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        fetch_adapter(f"http://127.0.0.1:{port}", ["a"], tmp_path / "out")
    assert str(refused.value).endswith(f"refused the prompts (HTTP 400: {REASON})")
