"""A registered generator behind MLflow's own server, and the client that turns its answers into PEFT folders."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch
from helpers import Quiet, answering, free_port, serving
from hub_stand_in import hub_stand_in, point_at
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM

from llgbm.__main__ import main
from llgbm.client import fetch_adapter
from llgbm.generator import GeneratorConfig, make_generator
from llgbm.generator.bundle import GeneratorBundle
from llgbm.generator.networks import Standardiser
from llgbm.lora import LoraBatch, LoraSpec
from llgbm.models.load import Base
from llgbm.runtime import UserError
from tuning.registry import Score, fetch_bundle, register_generator
from tuning.tracking.study import StudyTracker
from tuning.tracking.trial import TrialTracker

MODEL = "models:/tiny@champion"
PROMPTS = ["reverse plainly : apple lemon river =>", "reverse it : guitar piano =>"]


@pytest.fixture(scope="module")
def store(
    tiny_base: Base,
    tiny_spec: LoraSpec,
    tiny_adapters: LoraBatch,
    empty_store: Path,
    tmp_path_factory,
) -> str:
    """A store whose one model is an untrained generator of adapters for the tiny base, a champion."""
    folder = tmp_path_factory.mktemp("registry")
    shutil.copytree(empty_store, folder / "mlruns")
    standardiser = Standardiser.fit(tiny_adapters.flatten(tiny_spec))
    config = GeneratorConfig(hidden=16)
    facts = {
        "size": "tiny",
        "base_path": tiny_base.path,
        "base_hash": tiny_base.hash,
        "bank_hash": "b",
    }
    generator = make_generator(config, tiny_spec, 384, standardiser, seed=0)
    (folder / "bundle").mkdir()
    GeneratorBundle.save(folder / "bundle", generator, config, {**facts, "encoder": "minilm"})
    study = StudyTracker.open(None, folder, "ablation")
    target = study.begin("study", "id", {}, {})
    run_id = TrialTracker.open(target, "t", "multitask", {"seed": 0}, {}).run_id
    tags = {"llgbm.val_data": "val1", "llgbm.study_id": "id", "llgbm.trial_id": "t"}
    register_generator(
        study.tracking_uri,
        run_id,
        folder / "bundle",
        "tiny",
        tags,
        Score(0.5, "val/accuracy", {"a": 0.5}),
    )
    return study.tracking_uri


@pytest.fixture(scope="module")
def served(store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The champion, served by the command of this program: the store has one model."""
    command = [sys.executable, "-m", "llgbm", "serve", "--tracking-uri", store]
    with serving(command, tmp_path_factory.mktemp("served") / "log", "ping") as url:
        yield url


@pytest.mark.whole
def test_a_served_champion_answers_prompts_with_the_adapter_that_it_would_write_itself(
    served: str, store: str, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    command = [
        sys.executable,
        "-m",
        "llgbm",
        "fetch",
        "--url",
        served,
        "--prompts",
        str(tmp_path / "prompts.txt"),
    ]
    done = subprocess.run([*command, "--out", str(tmp_path / "a")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bundle = GeneratorBundle.load(fetch_bundle(MODEL, store))
    bundle.save_adapter(PROMPTS, tmp_path / "b")
    got, wanted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(got[key], tensor)
    config, own = (
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in "ab"
    )
    assert config == own
    cards = [(tmp_path / name / "README.md").read_text() for name in "ab"]
    assert "`tiny/1`" not in cards[0] and "| generator registered | `tiny/1` |" in cards[1]
    assert all("| generator study id | `id` |" in text for text in cards)
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    loaded = PeftModel.from_pretrained(base, tmp_path / "a")
    assert loaded.peft_config["default"].r == config["r"]


@pytest.mark.whole
def test_the_server_listens_on_this_machine_only(served: str) -> None:
    port = int(served.rsplit(":", 1)[1])
    (own,) = {
        connection.laddr.ip
        for connection in psutil.net_connections("tcp")
        if connection.laddr.port == port and connection.status == psutil.CONN_LISTEN
    }
    assert own == "127.0.0.1"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "models:/tiny@best"], "no alias 'best'"),
        (["--model", "folder"], "no model 'folder'|no model address"),
        (["--port", "70000"], "between 1 and 65535"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(
    options: list[str], words: str, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--tracking-uri", store, *options]) == 2
    assert re.search(words, capsys.readouterr().err.splitlines()[-1])


def test_a_server_of_several_models_needs_a_name(
    study: StudyTracker, capsys: pytest.CaptureFixture[str]
) -> None:
    for names in ("none at all", "one, two"):
        assert main(["serve", "--tracking-uri", study.tracking_uri]) == 2
        assert f"there are {names}" in capsys.readouterr().err
        for name in ("one", "two"):
            if names == "none at all":
                study.client.create_registered_model(name)


def test_prompts_that_the_server_refuses_are_told(served: str, tmp_path: Path) -> None:
    body = {"dataframe_split": {"columns": ["prompts"], "data": [["no list"]]}}
    answer = requests.post(f"{served}/invocations", json=body, timeout=60)
    assert answer.status_code == 400 and "must be a JSON list" in answer.text
    with pytest.raises(UserError, match="there is no prompt"):
        fetch_adapter(served, ["  "], tmp_path / "adapter")
    with pytest.raises(UserError, match="refused the prompts .HTTP 404"):
        fetch_adapter(f"{served}/elsewhere", PROMPTS, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@contextmanager
def saying(body: bytes, status: int = 200) -> Iterator[str]:
    """A server that says the same to everyone."""

    class Handler(Quiet):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

    with answering(Handler) as port:
        yield f"http://127.0.0.1:{port}/"


WEIGHTS = save({"layer.lora_A.weight": torch.ones(2, 3)})


def answer(weights: bytes = WEIGHTS, config: object = None) -> bytes:
    own = {"peft_type": "LORA", "r": 2} if config is None else config
    row = {
        "adapter_safetensors_base64": base64.b64encode(weights).decode(),
        "adapter_config": json.dumps(own),
    }
    return json.dumps({"predictions": [row]}).encode()


def test_an_answer_becomes_a_folder_and_replaces_an_earlier_adapter(tmp_path: Path) -> None:
    with saying(answer()) as url:
        for _ in range(2):
            assert fetch_adapter(url, PROMPTS, str(tmp_path / "adapter")) == tmp_path / "adapter"
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "adapter_config.json").write_text("keep me")
        with pytest.raises(UserError, match="did not write"):
            fetch_adapter(url, PROMPTS, tmp_path / "mine")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == WEIGHTS
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>hello</html>", "answers no JSON"),
        (b'{"predictions": []}', "answers no adapter"),
        (b'{"predictions": [{"score": 0.5}]}', "answers no adapter"),
        (b"[1, 2]", "answers no adapter"),
        (answer(config={"r": 2}), "answers no adapter"),
        (answer(config=[]), "answers no adapter"),
        (answer(WEIGHTS[:-1]), "damaged"),
        (answer(WEIGHTS + b"0"), "damaged"),
        (answer(b"\xff" * 40), "damaged"),
        (answer(b""), "damaged"),
    ],
)
def test_what_is_no_adapter_is_refused_in_one_sentence(
    body: bytes, message: str, tmp_path: Path
) -> None:
    with saying(body) as url, pytest.raises(UserError, match=message) as error:
        fetch_adapter(url, PROMPTS, tmp_path / "adapter")
    assert "\n" not in str(error.value) and not (tmp_path / "adapter").exists()


def test_a_refusal_carries_the_servers_reason(tmp_path: Path) -> None:
    refusal = json.dumps(
        {"error_code": "BAD_REQUEST", "message": "row 0:\n`prompts` must be\na JSON list"}
    ).encode()
    with (
        saying(refusal, 400) as url,
        pytest.raises(UserError, match="HTTP 400: row 0: `prompts` must be a JSON"),
    ):
        fetch_adapter(url, PROMPTS, tmp_path / "adapter")


@pytest.mark.parametrize("address", ["nowhere", "ftp://127.0.0.1/", "http://127.0.0.1:{free}"])
def test_an_address_that_serves_nothing_is_refused(address: str, tmp_path: Path) -> None:
    url = address.format(free=free_port())
    with pytest.raises(UserError, match="no address of a server|no generator is served at"):
        fetch_adapter(url, PROMPTS, tmp_path / "adapter")


def test_the_client_needs_neither_torch_nor_mlflow() -> None:
    unwanted = ("torch", "mlflow", "peft", "safetensors")
    code = f"import sys, llgbm.client; print([m for m in {unwanted} if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


def test_the_whole_life_of_an_adapter(
    served: str,
    store: str,
    tiny_base: Base,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From prompts to a generated adapter, through every command, to the hub and back, the same to the last bit."""

    def command(line: str) -> Any:
        assert main(line.split()) == 0, capsys.readouterr().err
        printed = capsys.readouterr().out
        return json.loads(printed.splitlines()[-1]) if printed.startswith("{") else printed

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=torch.arange(12)[None], use_cache=False).logits

    def with_adapter(folder: str) -> Any:
        return PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_base.path, dtype=torch.float32), folder
        )

    monkeypatch.chdir(tmp_path)
    Path("one.txt").write_text(PROMPTS[0])
    Path("two.txt").write_text("something else : violin")
    # Born twice over, by a command and by a server.
    command(f"generate --model {MODEL} --tracking-uri {store} --prompts one.txt --out one")
    command(f"fetch --url {served} --prompts two.txt --out two")
    shown = command("show one --json")
    assert shown["lineage"]["generator"]["registered"] == "tiny/1"
    assert shown["base_files"].endswith("the ones that the adapter was made for")
    # Tried, merged, stacked and swapped.
    assert "prompt" in command("try --adapter one two --prompts one.txt --max-tokens 4 --out page")
    assert Path("page/answers.html").is_file()
    command("merge --adapter one --out merged")
    command("stack --adapter one two --out both")
    wanted = {name: logits(with_adapter(name)) for name in ("one", "two", "both")}
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), wanted["one"], atol=1e-4, rtol=0)
    model = with_adapter("one")
    hotswap_adapter(model, "two", adapter_name="default")
    torch.testing.assert_close(logits(model), wanted["two"], atol=1e-5, rtol=0)
    assert len(command("show both --json")["lineage"]["adapters"]) == 2
    # Published, fetched back and verified.
    with hub_stand_in() as hub:
        point_at(hub, tmp_path / "cache", monkeypatch)
        assert "would_push" in command("push both --repo me/both") and not hub.commits
        commit = command("push both --repo me/both --yes")["pushed"]["commit"]
        command(f"fetch --hub me/both@{commit} --out back")
    found = command(f"show back --base {tiny_base.path} --json")
    assert found["lineage"] == command("show both --json")["lineage"]
    torch.testing.assert_close(logits(with_adapter("back")), wanted["both"], atol=0, rtol=0)
    assert (wanted["one"] - wanted["two"]).abs().max() > 1e-3
