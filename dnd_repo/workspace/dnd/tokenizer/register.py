"""The tokenizer under the names of the model sizes: they differ in their usual token size alone."""

from __future__ import annotations

from dnd.tokenizer.tokenizer import LoraTokenizer2D


class Qwen2505LoRA_Tokenizer2D(LoraTokenizer2D):
    """Qwen2.5-0.5B at rank 8: 179 tokens a layer."""

    usual_token_size = (10, 130)


class Qwen2515LoRA_Tokenizer2D(LoraTokenizer2D):
    """Qwen2.5-1.5B at rank 16: 161 tokens a layer."""

    usual_token_size = (18, 258)


class Qwen257BLoRA_Tokenizer2D(LoraTokenizer2D):
    """Qwen2.5-7B at rank 16."""

    usual_token_size = (18, 514)
