"""Generated adapters take each other's place in a running model, by PEFT's own hot-swap and without compiling again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor
from transformers import AutoModelForCausalLM

from llgbm.lora.adapters import LoraBatch, LoraSpec, adapter_config, save_adapter
from llgbm.models.load import Base

IDS = torch.arange(24).view(2, 12)


@pytest.fixture
def folders(
    tiny_base: Base, tiny_spec: LoraSpec, tiny_adapters: LoraBatch, tmp_path: Path
) -> list[Path]:
    """Two adapters as `generate` writes them."""
    config = adapter_config(tiny_spec, tiny_base.path)
    places = [tmp_path / "one", tmp_path / "two"]
    for place, state in zip(places, tiny_adapters.to_state_dicts(), strict=False):
        save_adapter(place, state, config)
    return places


def loaded(base: Base, folder: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(folder)).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def test_a_swapped_adapter_has_its_own_logits_and_compiles_nothing_anew(
    tiny_base: Base, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    wanted = [logits(loaded(tiny_base, folder)) for folder in folders]
    model = loaded(tiny_base, folders[0])
    prepare_model_for_compiled_hotswap(model, target_rank=4)  # room for another rank
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled), wanted[0], atol=1e-5, rtol=0)
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    for place in (1, 0, 1):
        hotswap_adapter(model, str(folders[place]), adapter_name="default")
        torch.testing.assert_close(logits(compiled), wanted[place], atol=1e-5, rtol=0)
    assert (wanted[0] - wanted[1]).abs().max() > 0.1
