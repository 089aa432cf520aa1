"""Measure generators and adapters: metrics, baselines and benchmark files."""
