"""Bases of others: families that are accepted, held against PeftModel, and folders that are refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from spoiled_bases import CONFIGS, CONTENTS, FILES, change
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llgbm.lora import LoraBatch, LoraSpec
from llgbm.lora.apply import adapters_applied, final_hidden, head_logits
from llgbm.lora.external import read_external
from llgbm.models.encoding import EncodedPairs, chat_prompt, encode_pairs, encode_prompts
from llgbm.models.load import Base, BaseSource, load_base, weightless_model
from llgbm.models.pretrain import make_tokenizer
from llgbm.models.scoring import continue_texts, right_answers
from llgbm.runtime import UserError

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
# Families with a list of target modules, and settings that make their heads do something.
FAMILIES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "qwen2": (["q_proj", "down_proj"], {}),
    "qwen3": (["q_proj", "down_proj"], {"head_dim": 4}),
    "llama": (["q_proj", "down_proj"], {}),
    "mistral": (["q_proj", "down_proj"], {}),
    "gemma": (["q_proj", "down_proj"], {"head_dim": 4}),
    "gemma2": (["q_proj", "down_proj"], {"head_dim": 4, "final_logit_softcapping": 2.0}),
    "gemma3_text": (["q_proj", "down_proj"], {"head_dim": 4}),
    "cohere": (["q_proj", "down_proj"], {"logit_scale": 0.25}),
    "cohere2": (["q_proj", "down_proj"], {"logit_scale": 0.25}),
    "granite": (["q_proj", "down_proj"], {"logits_scaling": 8.0, "embedding_multiplier": 3.0}),
    "phi": (["q_proj", "dense", "fc2"], {}),
    "phi3": (["qkv_proj", "gate_up_proj", "down_proj"], {}),
    "gpt2": (["c_attn", "c_fc", "c_proj"], {}),
    "olmo2": (["q_proj", "down_proj"], {}),
    "starcoder2": (["q_proj", "c_proj"], {}),
    "stablelm": (["q_proj", "down_proj"], {}),
    "gpt_neox": (["query_key_value", "dense_4h_to_h"], {}),
    "smollm3": (["q_proj", "down_proj"], {}),
    "qwen2_moe": (["q_proj", "v_proj"], {"num_experts": 4, "moe_intermediate_size": 8}),
    "mixtral": (["q_proj", "v_proj"], {"num_local_experts": 4}),
}
IDS = torch.arange(24).view(2, 12) * 13 % 320


def write_family(folder: Path, kind: str, **settings: Any) -> None:
    """Write a random model of a family, with weights that move its head visibly, and a tokenizer."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {kind}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES, **settings)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder)
    make_tokenizer(["red", "green", "blue"]).save_pretrained(folder)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_has_the_logits_of_the_model_and_of_peft(kind: str, tmp_path: Path) -> None:
    targets, settings = FAMILIES[kind]
    write_family(tmp_path / "base", kind, **settings)
    base = load_base(tmp_path / "base")
    with torch.no_grad():
        own = base.model(IDS).logits
        got = head_logits(base.model, final_hidden(base.model, IDS))
    torch.testing.assert_close(got, own, atol=1e-5, rtol=0)

    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base").float().eval()
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    config.fan_in_fan_out = kind == "gpt2"
    get_peft_model(fresh, config).save_pretrained(tmp_path / "adapter")
    plain = read_external(tmp_path / "adapter", base.model)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base").float().eval()
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))(IDS).logits
        batch = LoraBatch.from_state_dicts([plain.state, plain.state])
        half = LoraBatch(
            batch.a, {n: b * torch.tensor([0.0, 1.0])[:, None, None] for n, b in batch.b.items()}
        )
        with adapters_applied(base.model, half, plain.spec.scaling):
            both = head_logits(base.model, final_hidden(base.model, IDS.repeat(2, 1)))
    # Two adapters in one pass, one of them nothing: neither sees the other.
    torch.testing.assert_close(both[:2], own, atol=1e-5, rtol=0)
    torch.testing.assert_close(both[2:], wanted, atol=1e-5, rtol=0)
    assert (wanted - own).abs().max() > 1e-3


def test_a_tower_for_images_has_no_targets(tmp_path: Path) -> None:
    model = nn.Module()
    model.vision_tower = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
    model.language_model = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
    spec = LoraSpec.from_model(model, 2, 4.0, ["q_proj"])
    assert [m.name for m in spec.modules] == ["language_model.q_proj"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_family(tmp_path / "base", "qwen2")
    return tmp_path / "base"


@pytest.mark.parametrize(
    "spoil",
    [*CONFIGS.values(), *FILES.values(), *CONTENTS.values()],
    ids=[*CONFIGS, *FILES, *CONTENTS],
)
def test_a_base_that_cannot_be_is_one_sentence(
    folder: Path, spoil: tuple[Callable[[Path], Any], str]
) -> None:
    spoil[0](folder)
    with pytest.raises(UserError) as refused:
        load_base(folder)
    said = str(refused.value)
    assert said.startswith("no base model can be loaded") and spoil[1] in said and "\n" not in said


@pytest.mark.parametrize("spoil", [*CONFIGS.values(), *FILES.values()], ids=[*CONFIGS, *FILES])
def test_a_base_is_checked_when_a_run_is_planned(
    folder: Path, spoil: tuple[Callable[[Path], Any], str]
) -> None:
    spoil[0](folder)
    with pytest.raises(UserError) as refused:
        BaseSource.find(str(folder))
    assert spoil[1] in str(refused.value)


@pytest.mark.parametrize("spoil", CONFIGS.values(), ids=list(CONFIGS))
def test_a_config_is_checked_for_an_estimate(
    folder: Path, spoil: tuple[Callable[[Path], Any], str]
) -> None:
    spoil[0](folder)
    with pytest.raises(UserError) as refused:
        weightless_model(str(folder))
    assert spoil[1] in str(refused.value)


def test_weights_in_parts_are_loaded(folder: Path) -> None:
    before = load_base(folder).model.state_dict()
    state = load_file(folder / "model.safetensors")
    names = list(state)
    index: dict[str, str] = {}
    for number, own in enumerate((names[::2], names[1::2])):
        file = f"part-{number}.safetensors"
        save_file({k: state[k] for k in own}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(own, file)
    (folder / "model.safetensors").unlink()
    listing = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing))
    after = load_base(folder).model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_a_model_that_is_no_writer_of_text_is_refused(tmp_path: Path) -> None:
    write_family(tmp_path / "ahead", "gemma3_text", head_dim=4, use_bidirectional_attention=True)
    with pytest.raises(UserError, match="looks at later tokens"):
        load_base(tmp_path / "ahead")
    write_family(tmp_path / "bert", "bert")
    with pytest.raises(UserError, match="the head of a bert model"):
        load_base(tmp_path / "bert")


def test_a_head_that_does_more_than_is_known_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Qwen2ForCausalLM

    plain = Qwen2ForCausalLM.forward

    def twice(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        output.logits = 2 * output.logits
        return output

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", twice)
    with pytest.raises(UserError, match="does more than is known"):
        load_base(folder)


def written(base: Base, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    model: Any = base.model
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)[0].tolist()


def test_any_end_token_of_the_model_ends_an_answer(folder: Path) -> None:
    base, prompt = load_base(folder), [5, 9]
    long = written(base, prompt)
    end = long[5]
    assert len(long) == 14 and end not in long[:5]
    change(folder / "generation_config.json", eos_token_id=[1, end])
    ending = load_base(folder)
    assert written(ending, prompt) == long[:6]
    # An answer closed by the tokenizer's end token is right where the model takes the other one.
    targets = torch.tensor([[-100, *long[2:5], base.tokenizer.eos_token_id]])
    texts = EncodedPairs(torch.tensor([long[:5]]), targets)
    with torch.no_grad():
        assert right_answers(ending.model, texts).tolist() == [True]
        assert right_answers(base.model, texts).tolist() == [False]
    assert len(continue_texts(ending, ["red"], 3)) == 1


def with_start(folder: Path) -> Base:
    """Give the tokenizer a start token of Llama's kind."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(["red", "green", "blue"])
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save_pretrained(folder)
    return load_base(folder)


def test_a_start_token_stands_before_every_text_once(tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    plain, base = load_base(tmp_path), with_start(tmp_path)
    if base.tokenizer("red")["input_ids"][0] != 0:
        pytest.skip("this transformers drops the post-processor of the folder")
    ids = base.tokenizer("red")["input_ids"]
    assert encode_prompts(plain.tokenizer, ["red"])[0].tolist() == [ids[1:]]
    for text in ("red", "<|endoftext|>red"):
        assert encode_prompts(base.tokenizer, [text])[0].tolist() == [ids]
        pairs = encode_pairs(base.tokenizer, [(text, " blue")])
        assert pairs.input_ids_ST[0, :2].tolist() == ids


NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
)
SILENT = (
    "{% for m in messages %}{% if m['role'] != 'system' %}"
    "[{{ m['role'] }}] {{ m['content'] }}\n{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [NO_SYSTEM, SILENT], ids=["raises", "drops"])
def test_system_text_goes_before_the_first_prompt_where_there_is_no_turn(template: str) -> None:
    tokenizer = make_tokenizer(["red"])
    tokenizer.chat_template = template
    shots = [("two?", "2")]
    assert chat_prompt(tokenizer, "red?", "Be brief.", shots) == (
        "[user] Be brief.\n\ntwo?\n[assistant] 2\n[user] red?\n"
    )
    assert chat_prompt(tokenizer, "red?", "") == "[user] red?\n"


def test_a_template_that_takes_no_such_turns_is_one_sentence() -> None:
    tokenizer = make_tokenizer(["red"])
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    for system in ("", "Be brief."):
        with pytest.raises(UserError, match="takes no such turns"):
            chat_prompt(tokenizer, "red?", system)
