"""Evaluation on datasets held against PEFT, `generate` one prompt at a time, and counts made by hand."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from answer_cases import METALS, PAIR
from peft import PeftModel
from transformers import AutoModelForCausalLM

from llgbm.__main__ import main
from llgbm.evaluation.benchmark import (
    System,
    chance_accuracy,
    likeliest_rivals,
    majority_accuracy,
    measure,
    respond,
    score_responses,
    solved_examples,
    wilson,
)
from llgbm.lora import LoraBatch, LoraSpec
from llgbm.lora.adapters import adapter_config, save_adapter
from llgbm.models.encoding import chat_prompt
from llgbm.models.load import Base
from llgbm.tasks.files import FileSuite
from llgbm.tasks.suite import Example


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words of the tiny base's tokenizer, in the shapes of the data files."""
    folder, rng = tmp_path_factory.mktemp("datasets"), random.Random(0)
    words = "apple river stone cloud tiger piano lemon chair garden window".split()
    pick = [
        {
            "prompt": f"Which is number {i}?\n"
            + "\n".join(f"{x}: {w}" for x, w in zip("ABCD", rng.sample(words, 4), strict=True)),
            "response": f"[{rng.choice('ABCD')}]",
            "system": "pick one",
        }
        for i in range(40)
    ]
    even = [
        {"prompt": f"is {i} even {'really ' * (i % 5)}?", "response": f"[{i % 2 == 0}]"}
        for i in range(40)
    ]
    sums = [
        {"prompt": f"What is {i} + {i}?", "response": f"The answer is {2 * i}."} for i in range(40)
    ]
    for name, content in (("pick", pick), ("even", even), ("sums", sums)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def suite(folder: Path) -> FileSuite:
    return FileSuite.open(folder, test=["pick", "even", "sums"])


@pytest.fixture(scope="module")
def adapter_folder(
    tiny_base: Base,
    tiny_spec: LoraSpec,
    tiny_adapters: LoraBatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "second"
    save_adapter(
        folder, tiny_adapters.to_state_dicts()[1], adapter_config(tiny_spec, tiny_base.path)
    )
    return folder


@pytest.fixture(scope="module")
def merged(tiny_base: Base, adapter_folder: Path) -> torch.nn.Module:
    """The base with the second adapter merged into its weights, by PEFT."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base.path)
    return PeftModel.from_pretrained(model, str(adapter_folder)).merge_and_unload().eval()


def prompts_of(
    suite: FileSuite, base: Base, task: str, count: int
) -> tuple[list[Example], list[str]]:
    examples = suite.examples(task, "evaluation", count, "parity")
    return examples, [chat_prompt(base.tokenizer, e.prompt, e.system) for e in examples]


def test_batched_answers_are_those_of_merged_weights_one_prompt_at_a_time(
    suite: FileSuite,
    tiny_base: Base,
    tiny_spec: LoraSpec,
    tiny_adapters: LoraBatch,
    merged: torch.nn.Module,
) -> None:
    _, prompts = prompts_of(suite, tiny_base, "even", 9)
    lengths = {len(tiny_base.tokenizer(p)["input_ids"]) for p in prompts}
    assert len(lengths) > 1, "prompts of one length would hide a wrong padding"
    tokenizer = tiny_base.tokenizer
    with System("x", tiny_adapters.select([1]), tiny_spec).applied(tiny_base):
        ours = respond(tiny_base, prompts, 12, "x")
    for prompt, text in zip(prompts, ours, strict=True):
        ids = tokenizer([prompt], return_tensors="pt")["input_ids"]
        whole = merged.generate(
            ids,
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        assert text == tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    assert respond(tiny_base, prompts, 12, "x") != ours, (
        "the adapter changes nothing: the test would be blind"
    )


def test_the_likeliest_choice_is_that_of_merged_weights(
    suite: FileSuite,
    tiny_base: Base,
    tiny_spec: LoraSpec,
    tiny_adapters: LoraBatch,
    merged: torch.nn.Module,
) -> None:
    examples, prompts = prompts_of(suite, tiny_base, "pick", 6)
    with System("x", tiny_adapters.select([1]), tiny_spec).applied(tiny_base):
        ours = likeliest_rivals(tiny_base, "choice", prompts, examples)
    for prompt, picked in zip(prompts, ours or [], strict=True):
        chances = {}
        for rival in ("[A]", "[B]", "[C]", "[D]"):
            start = tiny_base.tokenizer(prompt)["input_ids"]
            end = [*tiny_base.tokenizer(rival)["input_ids"], tiny_base.tokenizer.eos_token_id]
            with torch.no_grad():
                logits = merged(torch.tensor([[*start, *end]])).logits[0].log_softmax(-1)
            chances[rival] = sum(
                logits[len(start) + i - 1, token].item() for i, token in enumerate(end)
            )
        assert picked == max(chances, key=chances.__getitem__)
    assert likeliest_rivals(tiny_base, "number", prompts, examples) is None


CASES = [
    Example(METALS, "[B]"),
    Example(METALS, "[B]"),
    Example(PAIR, "[A]"),
    Example(METALS, "[C]"),
]


def test_scores_are_those_counted_by_hand() -> None:
    found = score_responses(
        "choice", CASES, ["[B]", "The answer is B.", "", "[A] [C]"], ["[B]", "[A]", "[A]", "[C]"]
    )
    assert found["accuracy"] == 0.5 and found["answered"] == 0.5 and found["in_form"] == 0.25
    assert found["likelihood_accuracy"] == 0.75
    numbers = [Example("How many?", "#### 1,200"), Example("How many?", "#### 7")]
    found = score_responses("number", numbers, ["so 1200.00", "#### 8"], None)
    assert (found["accuracy"], found["answered"], found["in_form"]) == (0.5, 1.0, 0.5)
    assert found["likelihood_accuracy"] is None


def test_what_needs_no_model_is_counted_by_hand() -> None:
    assert majority_accuracy("choice", [Example(METALS, f"[{x}]") for x in "BBBCA"], CASES) == 0.5
    assert chance_accuracy("choice", CASES) == pytest.approx((3 / 4 + 1 / 2) / 4)
    assert chance_accuracy("truth", [Example("is it?", "[True]")]) == 0.5
    assert chance_accuracy("number", [Example("how many?", "#### 1")]) == 0


@pytest.mark.parametrize(("right", "n"), [(0, 12), (5, 12), (12, 12)])
def test_the_interval_is_wilsons(right: int, n: int) -> None:
    z, p = 1.959964, right / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert wilson(right, n) == pytest.approx(
        [(centre + s * half) / (1 + z * z / n) for s in (-1, 1)], abs=1e-4
    )


def test_solved_examples_are_training_rows_and_none_is_scored_on(
    suite: FileSuite, tiny_base: Base
) -> None:
    shots = solved_examples(suite, "pick", 4)
    scored = {row.example.prompt for row in suite.datasets["pick"].rows["evaluation"]}
    assert len(shots) == 4 and not {p for p, _ in shots} & scored
    assert all(answer in chat_prompt(tiny_base.tokenizer, "q", "", shots) for _, answer in shots)


def test_the_command_puts_systems_side_by_side(
    folder: Path,
    suite: FileSuite,
    tiny_base: Base,
    adapter_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        "evaluate",
        "--data",
        str(folder),
        "--tasks",
        "pick",
        "sums",
        "--adapter",
        f"teacher={adapter_folder}",
    ]
    assert main([*arguments, "--examples", "8", "--shots", "2", "--max-tokens", "6"]) == 0
    captured = capsys.readouterr()
    pick, sums = json.loads(captured.out)["results"]
    assert list(pick["systems"]) == ["base", "2 examples in context", "teacher"]
    assert (pick["examples"], pick["kind"], pick["chance"]) == (8, "choice", 0.25)
    assert sums["systems"]["teacher"]["likelihood_accuracy"] is None
    alone = measure(tiny_base, suite, "pick", [System("base")], 8, 6)
    assert alone["systems"]["base"] == pick["systems"]["base"]
    assert "majority" in captured.err and "pick (choice, 8 examples)" in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either --task"),
        (["--task", "copy-plain", "--data", "x"], "either --task"),
        (["--task", "copy-plain"], "one --adapter"),
        (["--data", "{folder}"], "needs --tasks"),
        (["--data", "{folder}", "--tasks", "pic", "--base", "x"], "pick"),
        (["--data", "{folder}", "--tasks", "pick"], "--base"),
        (["--data", "{folder}", "--tasks", "pick", "--examples", "0"], "--examples is 0"),
        (["--data", "{folder}", "--tasks", "pick", "--max-tokens", "-1"], "--max-tokens is -1"),
        (
            ["--data", "{folder}", "--tasks", "pick", "--shots", "99", "--base", "{base}"],
            "99 solved examples",
        ),
        (
            ["--data", "{folder}", "--tasks", "pick", "--adapter", "a={adapter}", "a={adapter}"],
            "two systems are called 'a'",
        ),
        (["--data", "{folder}", "--tasks", "pick", "--adapter", "{folder}"], "adapter_config.json"),
    ],
)
def test_the_command_refuses(
    arguments: list[str],
    words: str,
    folder: Path,
    tiny_base: Base,
    adapter_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    named = [
        a.format(folder=folder, base=tiny_base.path, adapter=adapter_folder) for a in arguments
    ]
    assert main(["evaluate", *named]) == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: ") and words in last and not captured.out
