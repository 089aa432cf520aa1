"""LoRA adapters: their shapes, stacks and files (`adapters`), and a model run under many of them (`apply`)."""

from llgbm.lora.adapters import LoraBatch, LoraSpec

__all__ = ["LoraBatch", "LoraSpec"]
