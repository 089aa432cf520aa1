"""Frozen base models: loading, pretraining, encoding, scoring and cost."""
