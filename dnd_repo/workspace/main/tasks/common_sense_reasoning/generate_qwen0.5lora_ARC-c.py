"""Common sense: adapters of Qwen2.5-0.5B for ARC-c, from its prompts alone."""

import sys

from dnd.commands import exit_status, generate_command
from dnd.recipes import COMMON_SENSE

if __name__ == "__main__":
    checkpoint, out = "checkpoints/qwen0.5lora__ARC-c", "generated/qwen0.5lora__ARC-c"
    sys.exit(exit_status(lambda: generate_command(COMMON_SENSE, checkpoint, out, "ARC-c")))
