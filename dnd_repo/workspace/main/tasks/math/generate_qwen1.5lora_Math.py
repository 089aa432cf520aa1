"""Mathematics: adapters of Qwen2.5-1.5B for GSM8K, from its prompts alone."""

import sys

from dnd.commands import exit_status, generate_command
from dnd.recipes import MATH

if __name__ == "__main__":
    checkpoint, out = "checkpoints/qwen1.5lora__Math", "generated/qwen1.5lora__Math"
    sys.exit(exit_status(lambda: generate_command(MATH, checkpoint, out, "GSM8K")))
