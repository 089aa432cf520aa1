"""What a user types wrong: one sentence, exit status 2, nothing left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from llgbm.__main__ import main as package_main
from llgbm.generator.bundle import GeneratorBundle
from llgbm.generator.conditions import make_encoder
from llgbm.lora import LoraSpec
from llgbm.lora.adapters import adapter_config, load_adapter, save_adapter
from llgbm.models.load import load_base
from llgbm.runtime import UserError
from llgbm.teachers.bank import Bank
from llgbm.training import TrainingConfig, Trial
from llgbm.world import World
from tuning.run_ablation import main as ablation_main


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def one_sentence(err: str) -> str:
    lines = [line for line in err.splitlines() if line.strip()]
    assert "Traceback" not in err
    assert lines[-1].startswith("error: "), err
    return lines[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--study", "phase_9"], ["'phase_9'", "phase_4_5"]),
        (["--model-size", "giant"], ["'giant'", "nano, micro"]),
        (["--metric", "heldout/accuracy"], ["'heldout/accuracy'", "val/accuracy"]),
        (["--lambda-weight", "-1"], ["lambda_weight", "-1"]),
        (["--lambda-delta", "nan"], ["lambda_delta", "nan"]),
        (["--lambda-weight", "0", "--lambda-delta", "0"], ["both 0"]),
        (["--delta-probes", "magic"], ["'magic'", "trajectory"]),
        (["--encoder", "nowhere/at-all"], ["nowhere/at-all"]),
        (["--seeds", "1", "1"], ["twice"]),
        (["--steps", "0"], ["steps", "0"]),
        (["--gpus-per-trial", "64"], ["64 GPUs", "this machine has"]),
        (["--cpus-per-trial", "4096"], ["4096 CPUs"]),
        (["--cpus-per-trial", "0"], ["0 CPUs"]),
        (["--max-concurrent", "0"], ["max-concurrent"]),
        (["--tracking-uri", "http://127.0.0.1:9"], ["127.0.0.1:9"]),
        (["--tracking-uri", "gopher://x"], ["gopher"]),
    ],
)
def test_ablation_refuses(
    arguments: list[str],
    words: list[str],
    here: Path,
    cache: Path,
    world: World,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = ablation_main(["--smoke", "--cache", str(cache), *arguments])
    captured = capsys.readouterr()
    assert status == 2
    assert all(word in one_sentence(captured.err) for word in words)
    assert captured.out == ""
    assert "--encoder" in arguments or not list(here.rglob("mlflow.db"))


def test_an_option_that_does_not_exist_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        ablation_main(["--lamda-weight", "1"])
    assert ended.value.code == 2
    assert "lamda" in capsys.readouterr().err


def test_a_server_that_accepts_and_says_nothing_is_not_waited_for_long(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert ablation_main(["--smoke", "--tracking-uri", address]) == 2
    assert address in one_sentence(capsys.readouterr().err)


def test_an_unwritable_cache_is_one_sentence(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "file").write_text("")
    assert ablation_main(["--smoke", "--cache", str(here / "file")]) == 2
    assert "file stands" in one_sentence(capsys.readouterr().err)


def test_dry_run_names_every_trial_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablation_main(["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert [out.count(name) for name in ("multitask", "delta-only", "weight-only")] == [3, 3, 3]
    assert "would be built" in out
    assert not list(here.iterdir())


def test_an_estimate_hears_what_saves_memory_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for saver in ([], ["--probe-chunk", "1", "--activation-checkpointing"]):
        assert (
            ablation_main(
                ["--estimate", "--smoke", "--lambda-delta", "1", "--lambda-weight", "0", *saver]
            )
            == 0
        )
        printed.append(capsys.readouterr().out)
    assert "training of 1 trials" in printed[0] and "activations" in printed[0]
    assert printed[0] != printed[1]
    assert not list(here.iterdir())


def test_dry_run_knows_what_is_cached(
    here: Path, cache: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablation_main(["--dry-run", "--smoke", "--cache", str(cache)]) == 0
    assert "teachers: cached" in capsys.readouterr().out


def test_a_grid_of_lambdas_is_what_the_options_say(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--dry-run",
        "--lambda-weight",
        "0",
        "0.5",
        "--lambda-delta",
        "0",
        "1",
        "--seeds",
        "7",
    ]
    assert ablation_main(arguments) == 0
    out = capsys.readouterr().out
    assert out.count("nano") == 3 + 1  # three trials ((0, 0) is left out) and the world


@pytest.fixture
def bundle(world: World, tmp_path: Path, config: TrainingConfig) -> Path:
    """A generator as a sweep leaves it, fresh from initialisation."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    facts = {"size": "nano", "base_path": world.base.path, "base_hash": world.base.hash}
    facts |= {"bank_hash": world.bank.hash, "encoder": world.data.encoder}
    GeneratorBundle.save(
        folder, Trial(config, world.data, world.lora_model).generator, config.generator, facts
    )
    return folder


@pytest.fixture
def prompts(world: World, tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    task = world.data.tasks[world.data.rows["test"][0]]
    examples = world.config.suite.examples(task, "evaluation", 8, "cli")
    file.write_text("\n\n".join(e.prompt for e in examples) + "\n")
    return file


def test_generate_then_plain_peft_then_evaluate(
    world: World, bundle: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from llgbm.lora import LoraBatch

    out = tmp_path / "adapter"
    assert (
        package_main(
            ["generate", "--model", str(bundle), "--prompts", str(prompts), "--out", str(out)]
        )
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert said["prompts"] == 8
    base = AutoModelForCausalLM.from_pretrained(said["base"])
    ids = world.base.tokenizer(["reverse plainly : apple lemon river =>"], return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        own = world.lora_model.forward_with_lora(
            LoraBatch.from_state_dicts([load_adapter(out)]), ids
        )[0]
        theirs = PeftModel.from_pretrained(base, str(out))(ids).logits
    torch.testing.assert_close(own, theirs, atol=1e-5, rtol=0)

    task = world.data.tasks[0]
    assert package_main(["evaluate", "--adapter", str(out), "--task", task, "--examples", "4"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["task"] == task
    assert 0 <= scored["accuracy"] <= 1


@pytest.mark.parametrize("content", ["", "\n  \n\n"])
def test_generate_refuses_prompts_that_are_none(
    content: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "empty.txt", tmp_path / "out"
    file.write_text(content)
    assert (
        package_main(
            ["generate", "--model", str(bundle), "--prompts", str(file), "--out", str(out)]
        )
        == 2
    )
    assert "no prompt" in one_sentence(capsys.readouterr().err)
    assert not out.exists()


def test_generate_refuses_what_is_not_there(
    bundle: Path, prompts: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = here / "out"
    for model, file in (
        ("models:/llgbm-generator-nano@champion", prompts),
        ("models:/llgbm-generator-nano", prompts),
        (str(here / "nothing"), prompts),
        (str(bundle), here / "nothing.txt"),
    ):
        assert (
            package_main(["generate", "--model", model, "--prompts", str(file), "--out", str(out)])
            == 2
        )
        one_sentence(capsys.readouterr().err)
        assert not out.exists()


def test_generate_never_overwrites_a_foreign_adapter(
    bundle: Path, prompts: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "notes").mkdir()
    (here / "notes" / "adapter_config.json").write_text("mine")
    arguments = [
        "generate",
        "--model",
        str(bundle),
        "--prompts",
        str(prompts),
        "--out",
        str(here / "notes"),
    ]
    assert package_main(arguments) == 2
    one_sentence(capsys.readouterr().err)
    assert [p.read_text() for p in (here / "notes").iterdir()] == ["mine"]


def test_evaluate_names_near_tasks(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert package_main(["evaluate", "--adapter", str(here), "--task", "revers-star"]) == 2
    assert "reverse-stars" in one_sentence(capsys.readouterr().err)


def test_a_bank_with_an_adapter_of_another_rank_is_refused(world: World, tmp_path: Path) -> None:
    import shutil

    import torch

    folder = tmp_path / "bank"
    shutil.copytree(world.bank.folder, folder)
    bank = Bank.cached(folder, world.bank.spec)
    other = LoraSpec(world.bank.spec.modules, rank=2, alpha=4.0)
    state = {
        f"base_model.model.{name}.lora_{side}.weight": torch.ones(shape)
        for name, side, shape in other.pieces
    }
    victim = bank.adapter_folder(next(iter(bank.adapters)))
    shutil.rmtree(victim)
    save_adapter(victim, state, adapter_config(other, world.base.path))
    with pytest.raises(UserError, match="another rank") as refused:
        bank.load()
    assert victim.name in str(refused.value)


def test_a_base_that_is_nowhere_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no base model can be loaded"):
        load_base(tmp_path / "nothing")


def test_encoders_are_picked_by_name(world: World) -> None:
    assert make_encoder("base", world.base).name == f"base:{world.base.hash}"
    with pytest.raises(UserError, match="no sentence encoder"):
        make_encoder("nowhere/at-all", world.base)


@pytest.mark.whole
def test_the_real_command_line_has_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tuning" / "run_ablation.py"), "--study", "nope"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert one_sentence(done.stderr).startswith("error: unknown study 'nope'")
    assert not list(tmp_path.iterdir())


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    """As `llgbm show … | head -1` does."""
    long = "import sys; from llgbm.runtime import exit_status; "
    long += "sys.exit(exit_status(lambda: print('x' * 10**6) or 0, False))"
    process = subprocess.Popen(
        [sys.executable, "-c", long], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(1) == "x"
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == ""
    process.stderr.close()
