"""Experiment and site files: strict YAML, schemas, resolution. Never imports torch."""
