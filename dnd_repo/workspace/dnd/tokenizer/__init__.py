"""LoRA adapters as tokens."""

from dnd.tokenizer.register import (
    Qwen257BLoRA_Tokenizer2D,
    Qwen2505LoRA_Tokenizer2D,
    Qwen2515LoRA_Tokenizer2D,
)
from dnd.tokenizer.tokenizer import LoraTokenizer2D, default_token_size

__all__ = [
    "LoraTokenizer2D",
    "Qwen257BLoRA_Tokenizer2D",
    "Qwen2505LoRA_Tokenizer2D",
    "Qwen2515LoRA_Tokenizer2D",
    "default_token_size",
]
