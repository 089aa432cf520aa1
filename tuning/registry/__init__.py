"""Register, promote and serve generators."""

from tuning.registry.fetch import fetch_bundle, load_bundle
from tuning.registry.register import Score, register_generator

__all__ = ["Score", "fetch_bundle", "load_bundle", "register_generator"]
