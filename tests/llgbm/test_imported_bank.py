"""Banks from elsewhere: what is taken over, what is refused, and the commands that make and show them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHARED
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from llgbm.__main__ import main
from llgbm.delta import DeltaCache
from llgbm.generator.conditions import BaseModelEncoder, build_conditions
from llgbm.lora import LoraBatch, LoraSpec
from llgbm.lora.adapters import adapter_config, save_adapter
from llgbm.models.load import Base, load_base
from llgbm.runtime import UserError
from llgbm.teachers.bank import Bank, read_manifest
from llgbm.teachers.imported import find_adapters

PROMPTS = {"train": ["count : a b =>", "count : c =>"], "evaluation": ["count : d e =>"]}


@pytest.fixture
def foreign(tiny_base: Base, tiny_spec: LoraSpec, tiny_adapters: LoraBatch, tmp_path: Path) -> Path:
    """Two adapters of task `one` as DnD lays them out, and one that stands alone; prompts beside each."""
    root = tmp_path / "foreign"
    config = adapter_config(tiny_spec, tiny_base.path)
    for place, state in zip(
        ("one/one_0", "one/one_1", "two"), tiny_adapters.to_state_dicts(), strict=True
    ):
        save_adapter(root / place, state, config)
        (root / place / "prompts.json").write_text(json.dumps(PROMPTS))
    return root


def take(foreign: Path, base: Base, out: Path, *more: str) -> int:
    return main(
        [
            "bank",
            "import",
            str(foreign),
            "--base",
            base.path,
            "--out",
            str(out),
            "--trajectories",
            "1",
            *more,
        ]
    )


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and captured.out == "" and "Traceback" not in captured.err
    return lines[0]


def test_answers_that_are_cut_are_counted(foreign: Path, tiny_base: Base, capsys: Any) -> None:
    for limit in ("1", "2"):
        assert take(foreign, tiny_base, foreign.parent / limit, f"--max-tokens={limit}") == 0
        captured = capsys.readouterr()
        cut = json.loads(captured.out)["cut_answers"]
        assert f"{cut} of 2 answers of teachers are cut at {limit} tokens (" in captured.err
        assert "--max-tokens, in a sweep --trajectory-tokens" in captured.err
        bank = Bank.open(foreign.parent / limit, tiny_base)
        told = bank.trajectories()
        assert bank.cut_answers == cut > 0 and len(told.of("one")) == len(told.of("two")) == 1


def test_what_is_taken_over_is_a_bank(
    foreign: Path,
    tiny_base: Base,
    tiny_spec: LoraSpec,
    tiny_adapters: LoraBatch,
    tmp_path: Path,
    capsys: Any,
) -> None:
    out = tmp_path / "bank"
    assert take(foreign, tiny_base, out) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["tasks"], said["rank"], said["alpha"]) == ({"one": 2, "two": 1}, 3, 6.0)
    assert said["torn"] == [] and said["finished"]
    assert said["sources"]["one_1"] == f"{foreign}/one/one_1"
    bank = Bank.open(out, tiny_base)
    assert dict(bank.adapters) == {"one_0": "one", "one_1": "one", "two_0": "two"}
    assert torch.equal(bank.load().flatten(tiny_spec), tiny_adapters.flatten(tiny_spec))
    assert bank.prompts("two_0") == PROMPTS
    # What a world makes of a bank can be made of this one.
    pools = build_conditions(tmp_path / "cache", BaseModelEncoder(tiny_base), bank, ["nonsense"])
    assert pools.train_ANC.shape[:2] == (3, 2)
    probes = bank.trajectories()
    deltas = DeltaCache.build(tmp_path / "cache", tiny_base, bank, probes)
    assert deltas.table(tiny_base, probes).delta_APQD.abs().max() > 0.01
    assert main(["bank", "show", str(out)]) == 0
    assert json.loads(capsys.readouterr().out) == said
    assert take(foreign, tiny_base, out) == 0


def test_what_peft_itself_saves_is_taken_over(tiny_base: Base, tmp_path: Path, capsys: Any) -> None:
    targets = ["v_proj", "down_proj"]
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_base.path).float(),
        LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "mine")
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"mine": ["a =>", "b =>", "c =>"]}))
    assert take(tmp_path / "mine", tiny_base, tmp_path / "bank", "--prompts", str(prompts)) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["target_modules"] == sorted(targets) and said["rank"] == 2
    bank = Bank.open(tmp_path / "bank", tiny_base)
    assert bank.prompts("mine_0") == {"train": ["a =>", "b =>"], "evaluation": ["c =>"]}


def of_another_rank(folder: Path) -> None:
    state = {
        k: (v[:2] if ".lora_A." in k else v[:, :2]).contiguous()
        for k, v in load_file(folder / WEIGHTS).items()
    }
    save_file(state, folder / WEIGHTS)
    change_config(folder, r=2)


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def without_values(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    state[next(iter(state))][0, 0] = float("nan")
    save_file(state, folder / WEIGHTS)


def without_a_module(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    save_file({k: v for k, v in state.items() if "up_proj" not in k}, folder / WEIGHTS)


WEIGHTS = "adapter_model.safetensors"
SPOILERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "rank": (of_another_rank, "another rank"),
    "alpha": (lambda folder: change_config(folder, lora_alpha=3), "alpha 3"),
    "nan": (without_values, "NaN"),
    "targets": (without_a_module, "lacks the weights of 2 modules"),
    "base": (
        lambda folder: change_config(folder, base_model_name_or_path="Qwen/Qwen2.5-0.5B"),
        "Qwen/Qwen2.5-0.5B",
    ),
    "kind": (lambda folder: change_config(folder, use_dora=True), "use_dora"),
    "torn": (lambda folder: (folder / WEIGHTS).write_bytes(b"short"), "truncated"),
    "prompts": (lambda folder: (folder / "prompts.json").unlink(), "--prompts"),
    "both": (
        lambda folder: (folder / "prompts.json").write_text(
            json.dumps({"train": ["a"], "evaluation": ["a"]})
        ),
        "keep them apart",
    ),
}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=list(SPOILERS))
def test_an_adapter_that_does_not_fit_is_named(
    foreign: Path,
    tiny_base: Base,
    tmp_path: Path,
    capsys: Any,
    spoil: tuple[Callable[[Path], Any], str],
) -> None:
    spoil[0](foreign / "one" / "one_1")
    assert take(foreign, tiny_base, tmp_path / "bank") == 2
    said = refusal(capsys)
    assert spoil[1] in said and "one_1" in said
    assert not (tmp_path / "bank").exists()


def test_another_name_of_the_base_can_be_accepted(
    foreign: Path, tiny_base: Base, tmp_path: Path, capsys: Any
) -> None:
    change_config(foreign / "two", base_model_name_or_path="org/the-same")
    assert take(foreign, tiny_base, tmp_path / "bank", "--accept-base", "org/the-same") == 0


def test_nothing_to_take_over_is_refused(tiny_base: Base, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    for source, words in (
        (tmp_path / "empty", "holds no adapter_config.json"),
        ("no/where", "no/where"),
    ):
        assert take(Path(source), tiny_base, tmp_path / "bank") == 2
        assert words in refusal(capsys)
    assert main(["bank", "show", str(tmp_path / "empty")]) == 2
    assert "manifest.json" in refusal(capsys)


def test_a_bank_of_other_adapters_is_not_written_over(
    foreign: Path, tiny_base: Base, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "bank"
    assert take(foreign, tiny_base, out) == 0
    capsys.readouterr()
    shutil.rmtree(foreign / "two")
    assert take(foreign, tiny_base, out) == 2
    assert "another settings" in refusal(capsys)
    assert len(read_manifest(out)["adapters"]) == 3


def test_a_bank_of_another_base_is_refused(
    foreign: Path, tiny_base: Base, tmp_path: Path, capsys: Any
) -> None:
    assert take(foreign, tiny_base, tmp_path / "bank") == 0
    other = Base(tiny_base.model, tiny_base.tokenizer, "elsewhere", "0" * 16)
    with pytest.raises(UserError, match="not of elsewhere"):
        Bank.open(tmp_path / "bank", other)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of the real vocabulary with the real tokenizer, two layers of width 16."""
    if not (SHARED / "qwen2.5").is_dir() or not (SHARED / "data").is_dir():
        pytest.skip("no ../shared with Qwen2.5's tokenizer and the datasets")
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "qwen2.5")
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.whole
def test_teachers_of_real_datasets_by_both_methods(qwen: Path, tmp_path: Path, capsys: Any) -> None:
    """One step each, in float32: the same weights from PEFT and from the batched primitive."""
    common = [
        "--base",
        str(qwen),
        "--data",
        str(SHARED / "data"),
        "--tasks",
        "ARC-e",
        "BoolQ",
        "--limit",
        "64",
    ]
    sizes = [
        "--rank",
        "2",
        "--alpha",
        "4",
        "--steps",
        "1",
        "--checkpoints",
        "1",
        "--examples",
        "4",
        "--every",
        "1",
    ]
    batches = []
    for method in ("peft", "batched"):
        out = tmp_path / method
        arguments = [*common, *sizes, "--trajectories", "1", "--method", method, "--out", str(out)]
        assert main(["teachers", *arguments, "--learning-rate", "1e-3", "--device", "cpu"]) == 0
        assert json.loads(capsys.readouterr().out)["adapters"] == 4
        bank = Bank.open(out, load_base(qwen))
        assert set(bank.adapters.values()) == {"ARC-e", "BoolQ"}
        batches.append(bank.load().flatten(bank.spec))
        prompts = [bank.prompts(f"ARC-e_{i}")["train"] for i in range(2)]
        assert not set(prompts[0]) & set(prompts[1])
    torch.testing.assert_close(batches[0], batches[1], atol=1e-5, rtol=0)
    assert (batches[0][0] - batches[0][2]).abs().max() > 5e-4


def test_mistakes_in_the_teachers_command_are_one_sentence(
    qwen: Path, tmp_path: Path, capsys: Any
) -> None:
    given = {
        "--base": str(qwen),
        "--data": str(SHARED / "data"),
        "--tasks": "ARC-e",
        "--out": str(tmp_path / "b"),
    }
    for change, words in (
        ({"--tasks": "ARC"}, "'ARC'"),
        ({"--data": str(tmp_path / "none")}, "no folder"),
        ({"--base": str(tmp_path / "none")}, "no base model"),
        ({"--method": "magic"}, "peft, batched"),
        ({"--dtype": "float8"}, "float32, bfloat16"),
        ({"--rank": "0"}, "rank is 0"),
        ({"--checkpoints": "0"}, "at least"),
    ):
        arguments = [word for pair in {**given, **change}.items() for word in pair]
        assert main(["teachers", *arguments, "--limit", "64"]) == 2, change
        assert words in refusal(capsys)


def lay_out(foreign: Path, root: Path, places: dict[str, float]) -> None:
    """Copy an adapter to places, its first value changed to tell them apart; prompts lie beside each."""
    for place, value in places.items():
        shutil.copytree(foreign / "two", root / place, dirs_exist_ok=True)
        state = load_file(root / place / WEIGHTS)
        state[next(iter(state))][0, 0] = value
        save_file(state, root / place / WEIGHTS)


@pytest.mark.parametrize(
    ("places", "wanted"),
    [
        (
            ["ARC-e/checkpoint-50", "ARC-e/checkpoint-600", "ARC-e/checkpoint-1000"],
            ["ARC-e/checkpoint-1000", "ARC-e/checkpoint-600", "ARC-e/checkpoint-50"],
        ),
        (["ARC-e", "ARC-e/checkpoint-50"], ["ARC-e", "ARC-e/checkpoint-50"]),
        (["ARC-e/final", "BoolQ/final"], ["ARC-e/final", "BoolQ/final"]),
        (["BoolQ/seed-0/lora", "BoolQ/seed-1/lora"], ["BoolQ/seed-0/lora", "BoolQ/seed-1/lora"]),
        (["BoolQ/BoolQ_0", "BoolQ/BoolQ_1"], ["BoolQ/BoolQ_0", "BoolQ/BoolQ_1"]),
    ],
    ids=["checkpoints", "one within the other", "final", "seeds", "numbered"],
)
def test_tasks_are_read_off_the_layout(
    foreign: Path, tmp_path: Path, places: list[str], wanted: list[str]
) -> None:
    root = tmp_path / "runs"
    lay_out(foreign, root, dict.fromkeys(places, 1.0))
    found = find_adapters(str(root), None)
    assert [f.task for f in found] == [place.split("/")[0] for place in wanted]
    assert [str(f.folder.relative_to(root)) for f in found] == wanted
    assert {f.task for f in find_adapters(str(root / places[0]), None)} == {places[0].split("/")[0]}


def test_a_layout_that_names_no_task_is_asked_about(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(foreign, tmp_path, {"final": 1.0})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--task"):
        find_adapters("final", None)
    assert find_adapters("final", "mine")[0].task == "mine"


def test_states_of_one_training_are_adapters_of_one_task(
    foreign: Path, tiny_base: Base, tmp_path: Path, capsys: Any
) -> None:
    root = tmp_path / "runs"
    places = {"ARC-e": 3.0, "ARC-e/checkpoint-100": 3.0, "ARC-e/checkpoint-50": 2.0}
    lay_out(foreign, root, places)
    for place in list(places)[1:]:
        (root / place / "prompts.json").unlink()  # those of the task are in the folder above
    assert take(root, tiny_base, tmp_path / "bank") == 0
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert said["tasks"] == {"ARC-e": 2} and "is left out: it is the same" in captured.err
    assert said["sources"]["ARC-e_1"] == f"{root}/ARC-e/checkpoint-50"


def test_byte_order_marks_are_read_past(
    foreign: Path, tiny_base: Base, tmp_path: Path, capsys: Any
) -> None:
    for path in (foreign / "two" / "prompts.json", foreign / "two" / "adapter_config.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert take(foreign, tiny_base, tmp_path / "bank") == 0


def test_an_adapter_without_a_base_and_a_folder_with_an_equals_sign(
    foreign: Path, tiny_base: Base, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "runs" / "lr=1e-4,seed=0" / "adapter"
    shutil.copytree(foreign / "two", folder)
    change_config(folder, base_model_name_or_path=None)
    command = ["evaluate", "--adapter", str(folder), "--task", "copy-plain", "--examples", "2"]
    assert main(command) == 2
    assert "does not name its base: name it with --base" in refusal(capsys)
    assert main([*command, "--base", tiny_base.path]) == 0
