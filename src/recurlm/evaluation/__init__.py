"""Measuring language models."""
