"""Settings of the public trainings, by family of tasks: sizes of Liang et al. 2025, Drag-and-Drop LLMs."""

from __future__ import annotations

from dnd.training import TrainSettings

# Tasks that the public evaluations read, by the names that folders give them.
ARC_C, MATH_TASKS = ("ARC-c", "ARC-Challenge"), ("GSM8K", "MATH")
CODING_TASKS = ("HumanEval", "Live-Code-Bench")

# Qwen2.5-0.5B at rank 8: 4296 tokens.
COMMON_SENSE = TrainSettings(
    n_prompts=128,
    max_length=384,
    features=(
        (128, 200, 300),
        (128, 100, 256),
        (256, 50, 200),
        (512, 50, 200),
        (1024, 25, 200),
        (1024, 10, 200),
        (2048, 10, 200),
    ),
    kernel_size=9,
    token_size=(10, 130),
    steps=5000,
)

# Qwen2.5-1.5B at rank 16: 4508 tokens; prompts of up to 4608 tokens are shortened to 1000.
MATH = TrainSettings(
    n_prompts=32,
    max_length=4608,
    length=1000,
    features=((64, 500, 300), (256, 500, 300), (512, 125, 300), (1024, 64, 256), (2048, 32, 256)),
    kernel_size=11,
    token_size=(18, 258),
    steps=5000,
)

CODING = MATH
