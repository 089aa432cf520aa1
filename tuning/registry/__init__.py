"""Register, promote and serve generators."""

from tuning.registry.register import Score, fetch_bundle, register_generator

__all__ = ["Score", "fetch_bundle", "register_generator"]
