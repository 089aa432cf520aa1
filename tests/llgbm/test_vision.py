"""Models that read images: refused by name, or read by their text decoder alone, whose towers take no adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from llgbm.lora import LoraBatch, LoraSpec
from llgbm.lora.apply import adapters_applied, final_hidden, head_logits
from llgbm.lora.external import read_external
from llgbm.models.load import Base, BaseSource, load_base
from llgbm.runtime import UserError

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
}
SIGHT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def qwen2_vl(vocab: int) -> Any:
    sections = {"mrope_section": [1, 1, 2]}
    text = {**TEXT, "vocab_size": vocab, "rope_parameters": {"rope_type": "default", **sections}}
    sight = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    config = Qwen2VLConfig(text_config=text, vision_config=sight, image_token_id=vocab - 1)
    return Qwen2VLForConditionalGeneration(config)


def llava(vocab: int) -> Any:
    text = Qwen2Config(**TEXT, vocab_size=vocab)
    sight = CLIPVisionConfig(**SIGHT, projection_dim=16)
    config = LlavaConfig(text_config=text, vision_config=sight, image_token_index=vocab - 1)
    return LlavaForConditionalGeneration(config)


def gemma3(vocab: int) -> Any:
    text = {**TEXT, "vocab_size": vocab, "head_dim": 8, "sliding_window": 16}
    tokens = {
        "image_token_index": vocab - 1,
        "boi_token_index": vocab - 2,
        "eoi_token_index": vocab - 3,
    }
    config = Gemma3Config(text_config=text, vision_config=SIGHT, mm_tokens_per_image=4, **tokens)
    return Gemma3ForConditionalGeneration(config)


def saved(make: Any, tiny_base: Base, folder: Path) -> Path:
    torch.manual_seed(0)
    make(len(tiny_base.tokenizer) + 8).save_pretrained(folder)
    tiny_base.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("make", "name"), [(qwen2_vl, "qwen2_vl"), (llava, "llava")])
def test_a_vision_language_model_is_refused_by_name(
    tiny_base: Base, tmp_path: Path, make: Any, name: str
) -> None:
    folder = saved(make, tiny_base, tmp_path / name)
    for read in (load_base, BaseSource.find):
        with pytest.raises(UserError, match=f"a {name} model reads images beside text: name a"):
            read(str(folder))


@pytest.fixture(scope="module")
def gemma(tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A family that the library lists among writers of text, though it has a vision tower."""
    return load_base(saved(gemma3, tiny_base, tmp_path_factory.mktemp("gemma3")))


def adapter(base: Base, folder: Path, targets: Any) -> Path:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base.path),
        LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM"),
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def test_a_vision_tower_takes_no_adapter(gemma: Base) -> None:
    spec = LoraSpec.from_model(gemma.model, 2, 4.0)
    assert len(spec.modules) == 14
    assert all(m.name.startswith("model.language_model.layers.") for m in spec.modules)
    for kind in ("fc1", "out_proj"):
        with pytest.raises(UserError, match=f"no Linear layer called {kind}"):
            LoraSpec.from_model(gemma.model, 2, 4.0, [kind])


def test_an_adapter_of_the_text_decoder_is_that_of_peft(gemma: Base, tmp_path: Path) -> None:
    folder = adapter(gemma, tmp_path / "a", r".*language_model.*\.(q_proj|down_proj)")
    plain, ids = read_external(folder, gemma.model), torch.arange(12)[None]
    batch = LoraBatch.from_state_dicts([plain.state])
    base = AutoModelForCausalLM.from_pretrained(gemma.path)
    with torch.no_grad(), adapters_applied(gemma.model, batch, plain.spec.scaling):
        got = head_logits(gemma.model, final_hidden(gemma.model, ids))
    with torch.no_grad():
        bare = base(input_ids=ids).logits
        wanted = PeftModel.from_pretrained(base, folder).eval()(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - bare).abs().max() > 1e-2


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_an_adapter_of_the_vision_tower_is_refused_by_name(
    gemma: Base, tmp_path: Path, targets: Any
) -> None:
    folder = adapter(gemma, tmp_path / "a", targets)
    with pytest.raises(
        UserError, match=r"adapts model\.(vision_tower|multi_modal)\S+, which is no"
    ):
        read_external(folder, gemma.model)
