"""LLGBM: Learning LoRA Generator by Behavioral Matching. Importing it loads neither torch, Ray nor MLflow.

Names of tensors end in the letters of their axes: `delta_APQD` is [A, P, Q, D]. One table for `llgbm` and `tuning`:

    A  adapters                       M  adapted modules
    B  examples per adapter           N  prompts per condition
    C  condition (embedding) width    P  probes
    D  hidden size of the base        Q  marked positions per probe
    H  hidden width of a generator    R  LoRA rank
    I  input width of a module        S  texts
    J  tasks                          T  text tokens
    K  draws per row                  U  adapter tokens (DnD)
    L  layers                         V  values of a flat adapter
    O  output width of a module       X, Y  height and width of an adapter token
"""

import os

# Threads of torch that wait for each other by spinning make a busy machine tens of times slower (docs/log.md);
# the OpenMP runtime reads this when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
