"""Programming: train on adapters of Qwen2.5-1.5B; the benchmarks are held out."""

import sys

from dnd.commands import exit_status, train_command
from dnd.recipes import CODING, CODING_TASKS

if __name__ == "__main__":
    bank, out = "data/coding1.5B", "checkpoints/qwen1.5lora__Coding"
    sys.exit(exit_status(lambda: train_command(CODING, bank, out, CODING_TASKS)))
