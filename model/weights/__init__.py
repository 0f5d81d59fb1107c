"""Ingot names to Hugging Face names and back, one table a family."""
