"""A transformers model of the shape of ours, both with the same random weights."""

import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
)

from configs.model import V3Config, V32Config
from model.transformer import Transformer

TOLERANCE = 1e-4
"""Of the logits' standard deviation: float32 sums in another order differ by some 5e-6 of it."""


def transformers_twin(config: V3Config, *, seed: int = 0) -> tuple[Transformer, nn.Module]:
    """(ours, theirs), float32, in evaluation mode; not one weight or buffer has its first value.

    Names of the state dicts are equal, so that weights pass from one to the other as they are.
    """
    fields = config.model_dump(exclude={"family", "engram", "rope_theta", "rope_scaling"})
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "yarn"}
        # In config.json a magnitude of none is an absent field.
        rope |= {name: x for name, x in config.rope_scaling.model_dump().items() if x}
    sparse = isinstance(config, V32Config)
    make_config = DeepseekV32Config if sparse else DeepseekV3Config
    theirs_config = make_config(
        **fields,
        num_key_value_heads=config.num_attention_heads,
        rope_parameters=rope,
        attn_implementation="eager",
    )
    theirs = (DeepseekV32ForCausalLM if sparse else DeepseekV3ForCausalLM)(theirs_config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                tensor.copy_(1 + 0.3 * noise)
            else:
                tensor.copy_(0.2 * noise)
    ours = Transformer(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def disagreement(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference of logits, in standard deviations of theirs."""
    return float((ours - theirs).abs().max() / theirs.std())
