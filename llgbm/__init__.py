"""LLGBM: Learning LoRA Generator by Behavioral Matching. Importing it loads neither Ray nor MLflow."""

import os

# Threads of torch that wait for each other by spinning make a busy machine tens of times slower (docs/log.md);
# the OpenMP runtime reads this when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
