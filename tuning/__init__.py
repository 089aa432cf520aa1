"""Ablations of LoRA generators: studies, searches, sweeps by Ray Tune, tracking in MLflow, registry and report."""
