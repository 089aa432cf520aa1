"""Adapters loaded into servers of vLLM and SGLang: what is sent, held against what they document."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import Quiet, answering
from output_checks import one_sentence
from safetensors.torch import load, load_file, save

from llgbm.__main__ import main

ANSWERS: dict[str, tuple[int, bytes]] = {
    "/v1/load_lora_adapter": (200, b"Success: LoRA adapter 'mine' added successfully."),
    "/load_lora_adapter": (200, b'{"success": true, "loaded_adapters": {"one": "x"}}'),
    "/load_lora_adapter_from_tensors": (200, b'{"success": true}'),
    "/full/load_lora_adapter": (400, b'{"success": false, "error_message": "too many"}'),
    "/odd/load_lora_adapter": (200, b'{"success": false, "error_message": "rank 99 > 16"}'),
}


@pytest.fixture
def server() -> Iterator[tuple[str, list[Any]]]:
    """Address of a server, and the requests that it was sent."""
    asked: list[Any] = []

    class Handler(Quiet):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, json.loads(body)))
            status, answer = ANSWERS.get(self.path, (404, b"no"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer)

    with answering(Handler) as port:
        yield f"http://127.0.0.1:{port}", asked


def test_a_folder_is_named_as_each_server_documents(
    server: tuple[str, list[Any]], source: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked = server
    adapter = ["--adapter", str(source / "one"), "--url", url + "/"]
    assert main(["load", "--server", "vllm", "--name", "mine", *adapter]) == 0
    assert main(["load", "--server", "sglang", *adapter]) == 0
    folder = str((source / "one").resolve())
    assert asked == [
        ("/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": folder}),
        ("/load_lora_adapter", {"lora_name": "one", "lora_path": folder}),
    ]
    assert "added successfully" in capsys.readouterr().out
    monkeypatch.chdir(source)
    assert main(["load", "--server", "vllm", "--url", server[0], "--adapter", "one"]) == 0
    assert asked[-1][1] == {"lora_name": "one", "lora_path": folder}  # the server stands elsewhere


def test_weights_are_sent_by_sglangs_own_serialiser(
    server: tuple[str, list[Any]], source: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked = server
    command = ["load", "--server", "sglang", "--tensors", "--adapter", str(source / "one")]
    command += ["--url", url]
    if "sglang" not in sys.modules:
        assert main(command) == 2 and "sglang is not installed" in one_sentence(capsys)

    class Serialiser:
        @staticmethod
        def serialize(content: dict[str, torch.Tensor], output_str: bool) -> str:
            assert output_str
            return base64.b64encode(save(content)).decode()

    for name in ("sglang", "sglang.srt", "sglang.srt.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(
        sys.modules["sglang.srt.utils"], "MultiprocessingSerializer", Serialiser, raising=False
    )
    assert main(command) == 0
    ((path, body),) = asked
    assert path == "/load_lora_adapter_from_tensors"
    assert set(body) == {"lora_name", "config_dict", "serialized_tensors"}
    assert body["config_dict"]["r"] == 3 and body["config_dict"]["peft_type"] == "LORA"
    sent = load(base64.b64decode(body["serialized_tensors"]))
    wanted = load_file(source / "one" / "adapter_model.safetensors")
    assert sent.keys() == wanted.keys()
    assert all(torch.equal(sent[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--server", "sglang", "--url", "{url}/full"], "HTTP 400"),
        (["--server", "sglang", "--url", "{url}/odd"], "rank 99 > 16"),
        (["--server", "vllm", "--url", "http://127.0.0.1:9"], "no server answers"),
        (["--server", "vllm", "--url", "nowhere"], "no address of a server"),
        (["--server", "vllm", "--url", "{url}", "--tensors"], "to sglang only"),
        (["--server", "vllm", "--url", "{url}", "--adapter", "none"], "no adapter_config.json"),
    ],
)
def test_a_refusal_is_one_sentence(
    options: list[str], words: str, server: tuple[str, list[Any]], source: Path, capsys: Any
) -> None:
    given = [word.format(url=server[0]) for word in options]
    assert main(["load", "--adapter", str(source / "one"), *given]) == 2
    assert words in one_sentence(capsys)
