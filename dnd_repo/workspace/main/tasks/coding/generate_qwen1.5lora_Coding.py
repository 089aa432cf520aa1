"""Programming: adapters of Qwen2.5-1.5B for HumanEval, from its prompts alone."""

import sys

from dnd.commands import exit_status, generate_command
from dnd.recipes import CODING

if __name__ == "__main__":
    checkpoint, out = "checkpoints/qwen1.5lora__Coding", "generated/qwen1.5lora__Coding"
    sys.exit(exit_status(lambda: generate_command(CODING, checkpoint, out, "HumanEval")))
