"""Mathematics: train on adapters of Qwen2.5-1.5B; the benchmarks are held out."""

import sys

from dnd.commands import exit_status, train_command
from dnd.recipes import MATH, MATH_TASKS

if __name__ == "__main__":
    bank, out = "data/math1.5B", "checkpoints/qwen1.5lora__Math"
    sys.exit(exit_status(lambda: train_command(MATH, bank, out, MATH_TASKS)))
