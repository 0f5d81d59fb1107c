"""Bundles for CUDA and Ascend servers, each proved against its source."""
