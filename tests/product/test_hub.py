"""Push to the hub and fetch back, through `huggingface_hub` and a stand-in of the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hub_stand_in import TOKEN, Hub, hub_stand_in, point_at
from huggingface_hub import ModelCard
from huggingface_hub.utils import close_session
from output_checks import CONFIG, WEIGHTS, one_sentence, tree

from llgbm.__main__ import main
from llgbm.generator.bundle import GeneratorBundle
from llgbm.models.load import Base
from llgbm.runtime import UserError
from llgbm.system.hub import files_of, hub_errors, kind_of, stage_folder
from llgbm.teachers.bank import bank_hash


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_stand_in() as running:
        yield running


@pytest.fixture
def adapter(commands: Any, user: Path, capsys: Any) -> Path:
    assert main([*commands["generate"], "--out", "adapter"]) == 0
    capsys.readouterr()
    return user / "adapter"


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(
    hub: Hub, user: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Done]]:
    """Run commands with the stand-in as their hub."""
    point_at(hub, user / "hf", monkeypatch)

    def command(*arguments: str, token: str = TOKEN) -> Done:
        monkeypatch.setenv("HF_TOKEN", token)
        capsys.readouterr()
        done = Done(main(list(arguments)), *capsys.readouterr())
        assert token not in done.stdout + done.stderr and "Traceback" not in done.stderr
        return done

    yield command
    close_session()


def test_an_adapter_goes_to_a_branch_and_comes_back(
    run: Any, hub: Hub, adapter: Path, user: Path, tiny_base: Base, capsys: Any
) -> None:
    (adapter / "notes.txt").write_text("mine alone")
    push = ["push", "adapter", "--repo", "me/mine@tried", "--base-id", "someone/base@main"]
    dry = run(*push)
    told = json.loads(dry.stdout)["would_push"]
    assert set(told["files"]) == {WEIGHTS, CONFIG, "README.md"} and told["revision"] == "tried"
    assert "nothing was pushed" in dry.stderr and not hub.commits
    assert not [line for line in hub.requests if line.startswith("POST")]
    done = run(*push, "--yes")
    assert done.returncode == 0, done.stderr
    commit = json.loads(done.stdout)["pushed"]["commit"]
    files = hub.commits["me/mine"][commit]
    assert (
        set(files) == {WEIGHTS, CONFIG, "README.md"} and hub.branches["me/mine"]["main"] != commit
    )
    assert str(user) not in files[CONFIG].decode() and tiny_base.path not in str(files)
    assert ModelCard(files["README.md"].decode()).data.base_model == "someone/base"
    for name, revision in (("by_branch", "tried"), ("by_commit", commit)):
        back = run("fetch", "--hub", f"me/mine@{revision}", "--out", name)
        assert json.loads(back.stdout)["commit"] == commit, back.stderr
        assert (user / name / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    assert main(["show", "by_commit", "--base", tiny_base.path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["base"] == "someone/base" and found["revision"] == "main"
    assert "are the ones" in found["base_files"] and "lineage names" in found["files"]


def test_a_refusal_is_one_sentence_without_the_token(run: Any, adapter: Path, user: Path) -> None:
    wrong = run("push", "adapter", "--repo", "me/other", "--yes", token="hf_wrongwrong")
    assert wrong.returncode == 2 and "did not take or give me/other" in wrong.stderr
    missing = run("fetch", "--hub", "me/none@main", "--out", "back")
    assert missing.returncode == 2 and not (user / "back").exists()
    assert "me/none" in missing.stderr.splitlines()[-1]


def test_a_generator_keeps_its_adapters_and_loses_its_paths(
    bundle: Path, user: Path, tiny_base: Base
) -> None:
    (user / "stage").mkdir()
    (told,) = stage_folder(bundle, user / "stage", None)
    assert tiny_base.path in told and kind_of(user / "stage") == "generator"
    content = tree(user / "stage")
    assert set(content) == {"generator.json", "generator.safetensors", "README.md"}
    assert str(Path(tiny_base.path).parent) not in str(content)
    read = ModelCard.load(user / "stage" / "README.md")
    assert read.data.library_name == "llgbm" and tiny_base.hash in read.text
    sent, kept = GeneratorBundle.load(user / "stage"), GeneratorBundle.load(bundle)
    assert sent.facts["generator_hash"] == kept.facts["generator_hash"]


def test_a_bank_keeps_its_hash(commands: Any, user: Path, source: Path, capsys: Any) -> None:
    assert main([*commands["bank"], "--out", "bank"]) == 0
    (user / "bank" / "secret.env").write_text("x")
    (user / "stage").mkdir()
    stage_folder(user / "bank", user / "stage", None)
    content = tree(user / "stage")
    assert "secret.env" not in content and str(source) not in str(content)
    assert bank_hash(user / "stage") == bank_hash(user / "bank")
    assert len(files_of(user / "stage", "bank")) == 3 + 3 * 2
    weights = next((user / "bank").rglob(WEIGHTS))
    weights.write_bytes(weights.read_bytes()[:-4])
    capsys.readouterr()
    assert main(["push", "bank", "--repo", "me/bank"]) == 2
    assert "torn" in one_sentence(capsys)


def test_a_bank_and_a_generator_come_back_whole(
    run: Any, commands: Any, bundle: Path, user: Path
) -> None:
    assert main([*commands["bank"], "--out", "bank"]) == 0
    shutil.copytree(bundle, user / "generator")
    for kind in ("bank", "generator"):
        done = run("push", kind, "--repo", f"me/{kind}", "--yes")
        assert done.returncode == 0, done.stderr
        done = run("fetch", "--hub", f"me/{kind}", "--out", f"{kind}_back")
        assert done.returncode == 0 and json.loads(done.stdout)["kind"] == kind, done.stderr
    assert bank_hash(user / "bank_back") == bank_hash(user / "bank")
    GeneratorBundle.load(user / "generator_back")
    taken = run("fetch", "--hub", "me/bank", "--out", "bank_back")
    assert taken.returncode == 2 and "name a new folder" in taken.stderr


def test_what_is_not_whole_is_neither_pushed_nor_fetched(
    run: Any, hub: Hub, adapter: Path, bundle: Path, user: Path
) -> None:
    shutil.copytree(bundle, user / "torn")
    weights = user / "torn" / "generator.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    done = run("push", "torn", "--repo", "me/torn", "--yes")
    assert done.returncode == 2 and "is torn" in done.stderr and "me/torn" not in hub.commits
    done = run("push", "adapter", "--repo", "me/changed", "--yes")
    files = hub.commits["me/changed"][json.loads(done.stdout)["pushed"]["commit"]]
    config = {**json.loads(files[CONFIG]), "lora_alpha": 99}
    hub.commit("me/changed", "main", {CONFIG: json.dumps(config).encode()})
    back = run("fetch", "--hub", "me/changed", "--out", "back")
    assert back.returncode == 2 and "the config of the adapter" in back.stderr
    assert not (user / "back").exists()


def test_a_token_of_the_hubs_own_file_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_fromthehubsownfile")
    with pytest.raises(UserError) as error, hub_errors("me/mine"):
        raise OSError("401 for hf_fromthehubsownfile")
    assert "401 for" in str(error.value) and "hf_fromthehubsownfile" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["push", "adapter", "--repo", "mine"], "no address on the hub"),
        (["push", ".", "--repo", "me/mine"], "holds no adapter, generator, bank or model"),
        (["push", "adapter", "--repo", "me/x", "--base-id", "/a/b"], "no address on the hub"),
        (["fetch", "--hub", "me/x", "--prompts", "p", "--out", "o"], "--prompts goes with --url"),
        (["fetch", "--url", "http://x", "--out", "o"], "--url needs --prompts"),
    ],
)
def test_what_cannot_be_pushed_is_one_sentence(
    arguments: list[str], words: str, adapter: Path, capsys: Any
) -> None:
    assert main(arguments) == 2
    assert words in one_sentence(capsys)


def test_a_changed_adapter_and_a_secret_are_not_pushed(
    adapter: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (adapter / "README.md").write_text(f"my token is {TOKEN}")
    assert main(["push", "adapter", "--repo", "me/mine"]) == 2
    assert "README.md holds a secret" in one_sentence(capsys)
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, "lora_alpha": 1}))
    assert main(["push", "adapter", "--repo", "me/mine"]) == 2
    assert "the config of the adapter" in one_sentence(capsys)
