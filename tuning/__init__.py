"""Ablations of LoRA generators: studies, searches, sweeps by Ray Tune, tracking in MLflow, registry and report."""

import gc

# Libraries make a million objects that stay; looking for garbage among them every 700 objects takes a fifth of the time
# that they take to load.
gc.set_threshold(50_000)
