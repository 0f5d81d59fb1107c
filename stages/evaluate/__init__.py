"""Bits per byte and pass@k, before and after post-training."""
