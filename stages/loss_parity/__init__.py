"""Losses of trainings in FP8 beside those in high precision, seed by seed."""
