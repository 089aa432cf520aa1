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

# Threads of torch that wait for each other by spinning make a busy machine tens of times slower, and threads that go to
# sleep at once an idle one by a half: they spin for a moment, then sleep (docs/log.md). The OpenMP runtime reads this
# when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"
