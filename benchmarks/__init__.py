"""Measurements of speed, run from the repository: ``python -m benchmarks.NAME``."""
