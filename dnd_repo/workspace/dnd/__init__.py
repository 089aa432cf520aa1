"""Drag-and-Drop LLMs, the framework that LLGBM extends. Installed by the project's root `pyproject.toml`."""
