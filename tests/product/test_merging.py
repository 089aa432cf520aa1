"""Adapters merged into their base and stacked, held against PEFT and against the sum of their updates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from output_checks import one_sentence, tree
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llgbm.__main__ import main
from llgbm.lora.adapters import load_adapter
from llgbm.lora.external import AdapterReader
from llgbm.lora.stacking import Mixture, stack_adapters
from llgbm.models.load import Base, load_base
from llgbm.models.pretrain import make_tokenizer
from llgbm.tasks.synthetic import SyntheticSuite

# Of one length: no padding.
TEXTS = ["reverse it : guitar piano =>", "reverse it : river stone =>"]
IDS = torch.tensor(make_tokenizer(SyntheticSuite().vocabulary)(TEXTS)["input_ids"])


def model_of(base: Base | Path, dtype: torch.dtype = torch.float32) -> Any:
    path = base.path if isinstance(base, Base) else base
    return AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def with_adapter(base: Base, folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    # PEFT casts what it loads to float32, unless it is told not to; the adapter is rounded as the base is.
    model = PeftModel.from_pretrained(
        model_of(base, dtype), str(folder), autocast_adapter_dtype=False
    )
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return logits(model)


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_model_has_the_logits_of_base_and_adapter(
    dtype: str, source: Path, tiny_base: Base, user: Path, capsys: Any
) -> None:
    (user / "texts.txt").write_text("\n".join(TEXTS))
    command = ["merge", "--adapter", str(source / "one"), "--dtype", dtype, "--out", "merged"]
    assert main([*command, "--prompts", "texts.txt"]) == 0, capsys.readouterr().err
    told = said(capsys)["logits"]
    kind = getattr(torch, dtype)
    apart, merged = with_adapter(tiny_base, source / "one"), model_of(user / "merged", kind)
    error = float((logits(merged) - apart).abs().max())  # over all tokens of the same texts
    assert merged.dtype == kind and (logits(model_of(tiny_base)) - apart).abs().max() > 0.1
    assert told["float32"]["largest_error"] < 1e-4 < told["bfloat16"]["largest_error"]
    assert error == pytest.approx(told[dtype]["largest_error"], rel=1e-3, abs=1e-5)
    halves = with_adapter(tiny_base, source / "one", torch.bfloat16)
    unmerged = float((halves - apart).abs().max())
    assert told["bfloat16_unmerged"]["largest_error"] == pytest.approx(unmerged, rel=1e-3)
    assert unmerged != told["bfloat16"]["largest_error"]
    loaded = load_base(user / "merged")
    names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    for name in names:
        assert tree(user / "merged").get(name) == tree(Path(tiny_base.path)).get(name)
    assert loaded.tokenizer.get_vocab() == tiny_base.tokenizer.get_vocab()
    lineage = json.loads((user / "merged" / "llgbm_lineage.json").read_text())
    assert lineage["base"]["hash"] == tiny_base.hash and lineage["adapters"][0]["name"] == "one"


def test_an_adapter_that_changes_its_base_is_merged_as_peft_means_it(
    tiny_base: Base, user: Path, capsys: Any
) -> None:
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], init_lora_weights="pissa")
    made = get_peft_model(model_of(tiny_base), config)
    with torch.no_grad():
        made.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.add_(0.1)
    made.save_pretrained("pissa")
    assert main(["merge", "--adapter", "pissa", "--base", tiny_base.path, "--out", "merged"]) == 0
    torch.testing.assert_close(
        logits(model_of(user / "merged")),
        with_adapter(tiny_base, user / "pissa"),
        atol=1e-4,
        rtol=0,
    )


def updates(folder: Path) -> dict[str, Tensor]:
    """ΔW by module, written out."""
    state, config = load_adapter(folder), json.loads((folder / "adapter_config.json").read_text())
    names = {key.rsplit(".lora_", 1)[0] for key in state}
    factor = config["lora_alpha"] / config["r"]
    return {n: factor * state[f"{n}.lora_B.weight"] @ state[f"{n}.lora_A.weight"] for n in names}


def stack(source: Path, *options: str, out: str = "stacked") -> int:
    return main(
        ["stack", "--adapter", str(source / "one"), str(source / "two"), *options, "--out", out]
    )


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.3, -1.5]])
def test_a_stack_is_the_weighted_sum_of_the_updates(
    weights: list[float], source: Path, tiny_base: Base, user: Path, capsys: Any
) -> None:
    assert stack(source, "--weights", *map(str, weights)) == 0
    told = said(capsys)
    got, parts = updates(user / "stacked"), [updates(source / name) for name in ("one", "two")]
    for name, update in got.items():
        wanted = weights[0] * parts[0][name] + weights[1] * parts[1][name]
        torch.testing.assert_close(update, wanted, atol=1e-5, rtol=0)
    assert told["rank"] == 6 and told["delta_w_error"] < 1e-3
    moved = with_adapter(tiny_base, user / "stacked")
    assert (moved - with_adapter(tiny_base, source / "one")).abs().max() > 0.1
    assert main(["show", "stacked", "--json"]) == 0
    lineage = said(capsys)["lineage"]
    assert [part["weight"] for part in lineage["adapters"]] == weights
    assert "| adapters 2 weight | `" in (user / "stacked" / "README.md").read_text()


def test_a_stack_of_adapters_of_other_layers_and_ranks_is_exact(
    source: Path, tiny_base: Base, user: Path, capsys: Any
) -> None:
    config = LoraConfig(r=1, lora_alpha=5, target_modules=["v_proj"], init_lora_weights=False)
    get_peft_model(model_of(tiny_base), config).save_pretrained("other")
    adapters = [str(source / "one"), "other"]
    assert main(["stack", "--adapter", *adapters, "--out", "stacked"]) == 0
    first, second = updates(source / "one"), updates(user / "other")
    for name, update in updates(user / "stacked").items():
        wanted = first[name] + second[name] if name in second else first[name]
        torch.testing.assert_close(update, wanted, atol=1e-5, rtol=0)
    capsys.readouterr()
    mixed = ["stack", "--adapter", *adapters, "--way", "linear", "--out", "mixed"]
    assert main(mixed) == 2 and "ranks 1, 3 have no linear mixture" in one_sentence(capsys)


def test_stacking_leaves_the_base_as_it_was(source: Path, tiny_base: Base) -> None:
    model = model_of(tiny_base)
    before, names = logits(model), [name for name, _ in model.named_modules()]
    reader = AdapterReader(model)
    adapters = [reader.read(source / name) for name in ("one", "two")]
    stack_adapters(model, Mixture(adapters, [1.0, 1.0]))
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_modules()] == names


def test_an_adapter_of_another_base_is_neither_merged_nor_stacked(
    commands: Any, tiny_base: Base, user: Path, capsys: Any
) -> None:
    assert main([*commands["generate"], "--out", "adapter"]) == 0
    shutil.copytree(tiny_base.path, user / "other")
    state = load_file(user / "other" / "model.safetensors")
    moved = {key: value + 0.01 for key, value in state.items()}
    save_file(moved, user / "other" / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    for command in (["merge", "--adapter"], ["stack", "--adapter", "adapter"]):
        assert main([*command, "adapter", "--base", "other", "--out", "made"]) == 2
        assert "was made for another base" in one_sentence(capsys)
    assert not (user / "made").exists()


def test_rough_mixtures_say_how_rough_they_are(source: Path, user: Path, capsys: Any) -> None:
    parts = [updates(source / name) for name in ("one", "two")]
    for options in (["--way", "linear"], ["--way", "svd", "--rank", "5"]):
        assert stack(source, *options) == 0
        told, got = said(capsys), updates(user / "stacked")
        wanted = {name: parts[0][name] + parts[1][name] for name in got}
        off = sum((got[n] - wanted[n]).square().sum() for n in got)
        error = float(off / sum(update.square().sum() for update in wanted.values())) ** 0.5
        assert told["delta_w_error"] == pytest.approx(error, rel=1e-3) and error > 0.05
        assert main(["show", "stacked", "--json"]) == 0
        assert said(capsys)["lineage"]["delta_w_error"] == told["delta_w_error"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--weights", "1"], "1 weights for 2 adapters"),
        (["--way", "svd"], "`svd` needs one"),
        (["--rank", "2"], "goes with `svd`"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(
    options: list[str], words: str, source: Path, user: Path, capsys: Any
) -> None:
    assert stack(source, *options) == 2
    assert words in one_sentence(capsys) and not (user / "stacked").exists()
    assert main(["stack", "--adapter", str(source / "one"), "--out", "stacked"]) == 2
    assert "name two or more" in one_sentence(capsys)


def test_a_merge_replaces_no_model_of_others(source: Path, user: Path, capsys: Any) -> None:
    (user / "mine").mkdir()
    (user / "mine" / "config.json").write_text("{}")
    assert main(["merge", "--adapter", str(source / "one"), "--out", "mine"]) == 2
    assert "did not write" in one_sentence(capsys)
    assert main(["merge", "--adapter", str(source / "one"), "--dtype", "int4", "--out", "m"]) == 2
    assert "unknown dtype" in one_sentence(capsys)
