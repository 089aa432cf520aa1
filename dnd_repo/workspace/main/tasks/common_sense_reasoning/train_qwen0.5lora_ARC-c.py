"""Common sense: train on the other data sets' adapters of Qwen2.5-0.5B, ARC-c is held out."""

import sys

from dnd.commands import exit_status, train_command
from dnd.recipes import ARC_C, COMMON_SENSE

if __name__ == "__main__":
    bank, out = "data/common_sense_reasoning", "checkpoints/qwen0.5lora__ARC-c"
    sys.exit(exit_status(lambda: train_command(COMMON_SENSE, bank, out, ARC_C)))
