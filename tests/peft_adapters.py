"""Adapters as PEFT saves them after a training, what PEFT makes of them, and changes to their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llgbm.models.load import Base

IDS = torch.arange(24).view(2, 12) % 40
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = ["q_proj", "v_proj", "down_proj"]


def fresh(base: Base) -> Any:
    return AutoModelForCausalLM.from_pretrained(base.path).float().eval()


def train_with_peft(base: Base, folder: Path, **settings: Any) -> None:
    """Save an adapter as PEFT does after a training that moved every value of it."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **settings}
    model = get_peft_model(fresh(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if settings["target_modules"] == "all-linear":  # as older versions of PEFT leave it in the file
        change(folder, target_modules="all-linear")


def logits_of_peft(base: Base, folder: Path) -> Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(fresh(base), str(folder))(IDS).logits


def change(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rekey(folder: Path, new: Callable[[str], str]) -> None:
    state = {new(k): v.clone() for k, v in load_file(folder / WEIGHTS).items()}
    save_file(state, folder / WEIGHTS)


def as_whole_numbers(folder: Path) -> None:
    state = {k: (100 * v).to(torch.int8) for k, v in load_file(folder / WEIGHTS).items()}
    save_file(state, folder / WEIGHTS)


def only_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
