"""FP8 pretraining over expert-parallel Ray workers."""
