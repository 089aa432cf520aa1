"""Several adapters for one set of prompts: by `generate --samples`, in Python, and from a server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import Quiet, answering
from mlflow.exceptions import MlflowException
from test_serving import PROMPTS, answer, saying

from llgbm.__main__ import main
from llgbm.client import fetch_adapter, fetch_samples
from llgbm.commands.adapters import read_own_lineage
from llgbm.generator import LatentConfig, make_generator
from llgbm.generator.bundle import GeneratorBundle
from llgbm.generator.conditions import BaseModelEncoder
from llgbm.generator.networks import Standardiser
from llgbm.lora.adapters import LoraBatch, LoraSpec, load_adapter
from llgbm.models.load import Base
from llgbm.runtime import UserError
from tuning.registry.served import GeneratorModel


@pytest.fixture(scope="module")
def latent(
    tiny_base: Base,
    tiny_spec: LoraSpec,
    tiny_adapters: LoraBatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """An untrained generator with a latent variable, of adapters for the tiny base."""
    folder = tmp_path_factory.mktemp("latent")
    config = LatentConfig(hidden=16, latent=2)
    statistics = Standardiser.fit(tiny_adapters.flatten(tiny_spec))
    width = BaseModelEncoder(tiny_base).width
    facts = {
        "size": "tiny",
        "base_path": tiny_base.path,
        "base_hash": tiny_base.hash,
        "bank_hash": "b",
        "encoder": f"base:{tiny_base.hash}",
    }
    generator = make_generator(config, tiny_spec, width, statistics, seed=0)
    GeneratorBundle.save(folder, generator, config, facts)
    return folder


@pytest.fixture
def command(latent: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    prompts, out = str(tmp_path / "prompts.txt"), str(tmp_path / "out")
    return ["generate", "--model", str(latent), "--prompts", prompts, "--out", out]


def states(folders: list[Path]) -> list[torch.Tensor]:
    return [torch.cat([t.flatten() for t in load_adapter(own).values()]) for own in folders]


def test_samples_are_adapters_of_their_own_and_the_same_again(
    command: list[str], latent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--samples", "3", "--seed", "4"]) == 0
    said = json.loads(capsys.readouterr().out)
    folders = [Path(name) for name in said["adapters"]]
    assert folders == [tmp_path / "out" / f"sample_{n}" for n in range(3)] and said["seed"] == 4
    drawn = states(folders)
    assert all((drawn[i] - drawn[j]).abs().max() > 1e-4 for i in range(3) for j in range(i))
    lineage = read_own_lineage(folders[2])
    assert lineage and lineage["made_by"] == "generated from 2 prompts, sample 2 of seed 4"
    GeneratorBundle.load(latent).save_samples(PROMPTS, tmp_path / "two", 2, seed=4)
    again = states([tmp_path / "two" / f"sample_{n}" for n in range(2)])
    assert torch.equal(again[0], drawn[0]) and torch.equal(again[1], drawn[1])
    assert main([*command, "--samples", "3"]) == 0  # earlier ones are replaced
    assert not torch.equal(states(folders)[0], drawn[0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--samples", "0"], "0 samples asked for; it must be from 1 to"),
        (["--samples", "-2"], "-2 samples asked for"),
        (["--samples", "100000"], "from 1 to 1000"),
        (["--seed", "1"], "--seed is of --samples"),
        (["--samples", "2", "--seed", "-1"], "--seed is -1"),
        (["--samples", "2", "--subsets", "2"], "give one of them"),
        (["--samples", "2", "--description", "x"], "leave the description out"),
    ],
)
def test_numbers_that_cannot_be_drawn_are_one_sentence(
    options: list[str],
    said: str,
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*command, *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_samples_of_an_earlier_call_are_not_mixed_in(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--samples", "2"]) == 0
    before = states([tmp_path / "out" / "sample_0"])
    assert main([*command, "--samples", "1", "--seed", "7"]) == 2
    assert "holds 'sample_1' of an earlier call" in capsys.readouterr().err
    assert torch.equal(states([tmp_path / "out" / "sample_0"])[0], before[0])


def test_a_generator_that_draws_nothing_says_so(
    bundle: Path, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command[2] = str(bundle)
    assert main([*command, "--samples", "2"]) == 2
    assert "train the generator `latent`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_on_the_hub_is_not_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--samples", "--seed"):
        assert main(["fetch", "--hub", "a/b", "--out", "x", option, "1"]) == 2
        assert f"{option} goes with --url" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(latent: Path) -> GeneratorModel:
    """Load the model that MLflow serves, without its server."""
    found = GeneratorModel()
    found.bundle = GeneratorBundle.load(latent)
    return found


@pytest.fixture
def served(model: GeneratorModel) -> Iterator[str]:
    class Handler(Quiet):
        do_POST = answer_of(model)

    with answering(Handler) as port:
        yield f"http://127.0.0.1:{port}"


def answer_of(model: GeneratorModel) -> Callable[[BaseHTTPRequestHandler], None]:
    """Answer as MLflow's server does."""

    def post(own: BaseHTTPRequestHandler) -> None:
        body = json.loads(own.rfile.read(int(own.headers["Content-Length"])))["dataframe_split"]
        table = pd.DataFrame(body["data"], columns=body["columns"])
        found = model.predict(None, table).to_dict("records")
        own.send_response(200)
        own.end_headers()
        own.wfile.write(json.dumps({"predictions": found}).encode())

    return post


def test_a_served_generator_draws_what_it_would_draw_itself(
    served: str, latent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    command = ["fetch", "--url", served, "--prompts", str(prompts), "--out", str(tmp_path / "a")]
    assert main([*command, "--samples", "2", "--seed", "3"]) == 0
    folders = [Path(name) for name in json.loads(capsys.readouterr().out)["adapters"]]
    own = GeneratorBundle.load(latent).save_samples(PROMPTS, tmp_path / "b", 2, seed=3)
    for one, other in zip(states(folders), states(own), strict=True):
        torch.testing.assert_close(one, other)
    lineage = read_own_lineage(folders[1])
    assert lineage and lineage["made_by"].endswith("sample 1 of seed 3")
    fetch_adapter(served, PROMPTS, tmp_path / "c")
    assert not torch.equal(states([tmp_path / "c"])[0], states(folders)[0])


@pytest.mark.parametrize(
    "row",
    [
        {"prompts": PROMPTS},
        {"prompts": PROMPTS, "seed": 0},
        {"prompts": PROMPTS, "seed": 0, "sample": "1"},
        {"prompts": PROMPTS, "seed": 0.5, "sample": 1},
        {"prompts": PROMPTS, "seed": True, "sample": 1},
        {"prompts": PROMPTS, "seed": 0, "sample": 1, "more": 2},
        {"prompts": "text", "seed": 0, "sample": 1},
        {"prompts": [], "seed": 0, "sample": 1},
        {"prompts": PROMPTS, "seed": 0, "sample": -1},
        {"prompts": PROMPTS, "seed": 0, "sample": 1, "subsets": 2},
        {"prompts": PROMPTS, "seed": 0, "sample": 1, "description": "what it is"},
    ],
    ids=str,
)
def test_a_sample_that_is_asked_for_wrongly_is_refused(
    model: GeneratorModel, row: dict[str, object]
) -> None:
    with pytest.raises(
        MlflowException, match="row 0|at least 0|leave the description out|no prompt"
    ):
        model.predict(None, pd.DataFrame({"prompts": [json.dumps(row)]}))


def test_an_answer_of_another_number_of_adapters_is_refused(tmp_path: Path) -> None:
    with saying(answer()) as url, pytest.raises(UserError, match="answers no adapter"):
        fetch_samples(url, PROMPTS, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()
