"""Programming: train on adapters of Qwen2.5-1.5B."""

import sys

from dnd.commands import exit_status, train_command
from dnd.recipes import CODING

if __name__ == "__main__":
    sys.exit(
        exit_status(
            lambda: train_command(CODING, "data/coding1.5B", "checkpoints/qwen1.5lora__Coding")
        )
    )
