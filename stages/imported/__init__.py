"""A model made elsewhere, taken in place of pretraining."""
