"""Hyper-connections and the decoder layer of DeepSeek-V4."""

from torch import nn


class HyperHead(nn.Module):
    """Collapses the streams in front of the final norm."""


class HyperLayer(nn.Module):
    """A decoder layer over several residual streams."""


class HyperMtpLayer(HyperLayer):
    """The multi-token-prediction layer of V4."""
