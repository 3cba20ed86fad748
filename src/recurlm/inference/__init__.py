"""Inference: scoring and generation over ids."""
