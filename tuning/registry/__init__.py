"""Registered generators: versions, champions and serving."""

from tuning.registry.register import fetch_bundle, register_generator

__all__ = ["fetch_bundle", "register_generator"]
