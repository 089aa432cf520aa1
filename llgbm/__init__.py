"""LLGBM: Learning LoRA Generator by Behavioral Matching. Importing it loads neither Ray nor MLflow."""

__version__ = "0.1.0"
