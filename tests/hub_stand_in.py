"""A stand-in of the hub's HTTP interface, as far as `huggingface_hub` uses it to push and to fetch folders."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from helpers import Quiet, answering
from huggingface_hub import constants
from huggingface_hub.utils import close_session

TOKEN = "hf_aVerySecretTokenOfTheTests"
Files = dict[str, bytes]


class Hub:
    """Repositories: commits in order, and branches."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Files]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.requests: list[str] = []
        self.url = ""

    def create(self, name: str) -> bool:
        if name in self.commits:
            return False
        first = self._id(name, {})
        self.commits[name], self.branches[name] = {first: {}}, {"main": first}
        return True

    def commit(self, name: str, branch: str, added: Files) -> str:
        files = {**self.commits[name][self.branches[name][branch]], **added}
        own = self._id(name, files)
        self.commits[name][own] = files
        self.branches[name][branch] = own
        return own

    def find(self, name: str, revision: str) -> tuple[str, Files] | None:
        own = self.branches.get(name, {}).get(revision, revision)
        files = self.commits.get(name, {}).get(own)
        return None if files is None else (own, files)

    def _id(self, name: str, files: Files) -> str:
        described = json.dumps([name, len(self.commits.get(name, {})), sorted(files)])
        return hashlib.sha1(described.encode() + b"".join(files.values())).hexdigest()


class Handler(Quiet):
    """Answers by the path of a request."""

    hub: Hub

    def do_GET(self) -> None:
        self.answer("GET")

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_POST(self) -> None:
        self.answer("POST")

    def answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{method} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if method == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.say(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            made = self.hub.create(name)
            return self.say(200 if made else 409, {"url": f"{self.hub.url}/{name}"})
        if path == "/api/validate-yaml":
            return self.say(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/(.+)", path):
            return self.about(found[1], found[2], found[3], body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(*found.groups())
        return self.say(404, {"error": "Not found"})

    def about(self, name: str, what: str, revision: str, body: bytes) -> None:
        if what == "branch":
            self.hub.branches[name].setdefault(revision, self.hub.branches[name]["main"])
            return self.say(200, {})
        if what == "preupload":
            asked = json.loads(body)["files"]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            return self.say(200, {"files": [{"path": one["path"], **mode} for one in asked]})
        if what == "commit":
            lines = [json.loads(line) for line in body.splitlines() if line]
            files = [line["value"] for line in lines if line["key"] == "file"]
            added = {one["path"]: base64.b64decode(one["content"]) for one in files}
            own = self.hub.commit(name, revision, added)
            return self.say(
                200,
                {
                    "success": True,
                    "commitOid": own,
                    "commitUrl": f"{self.hub.url}/{name}/commit/{own}",
                },
            )
        found = self.hub.find(name, revision)
        if found is None:
            return self.say(404, {"error": "Not found"}, {"X-Error-Code": "RevisionNotFound"})
        own, files = found
        if what == "tree":
            listed = [
                {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for p, c in files.items()
            ]
            return self.say(200, listed)
        siblings = [{"rfilename": path} for path in files]
        return self.say(200, {"id": name, "sha": own, "siblings": siblings, "private": False})

    def file(self, name: str, revision: str, path: str) -> None:
        found = self.hub.find(name, revision)
        if found is None or path not in found[1]:
            return self.say(404, {"error": "Not found"}, {"X-Error-Code": "EntryNotFound"})
        content = found[1][path]
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", found[0])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def say(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)


def point_at(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library, which has read its environment already, take this hub for its own."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    close_session()


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """Run a hub on a free port of this machine."""
    hub = Hub()
    own = type("Own", (Handler,), {"hub": hub})
    with answering(own) as port:
        hub.url = f"http://127.0.0.1:{port}"
        yield hub
