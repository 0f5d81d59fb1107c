"""A transformers model of the shape of ours, both with the same random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    PreTrainedModel,
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
    fields |= {
        "num_key_value_heads": config.num_attention_heads,
        "rope_parameters": rope,
        "attn_implementation": "eager",
    }
    theirs = _made(config, fields).eval()
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


def _made(config: V3Config, fields: dict[str, Any]) -> nn.Module:
    if isinstance(config, V32Config):
        return DeepseekV32ForCausalLM(DeepseekV32Config(**fields))
    return DeepseekV3ForCausalLM(DeepseekV3Config(**fields))


def loaded(
    load: Callable[..., object], folder: Path, **settings: object
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """(model, report) by a class's `from_pretrained`: what was missing, what nobody asked for.

    Its signature knows of no report.
    """
    found = load(folder, output_loading_info=True, **settings)
    assert isinstance(found, tuple)
    model, report = found
    assert isinstance(model, PreTrainedModel)
    return model, report


@runtime_checkable
class Generating(Protocol):
    """A model with transformers' loop of decoding, whose own signature admits none of its models.

    Without settings that ask for more, it returns the tokens alone.
    """

    def generate(self, tokens_BS: Tensor, **settings: object) -> Tensor:
        """[B, S + new tokens]."""


def continued(theirs: nn.Module, tokens_BS: Tensor, new_tokens: int, **settings: object) -> Tensor:
    """[B, S + new tokens]: the rows, and what transformers' own loop adds to them, to the end."""
    assert isinstance(theirs, Generating)
    return theirs.generate(
        tokens_BS,
        attention_mask=torch.ones_like(tokens_BS),
        max_new_tokens=new_tokens,
        eos_token_id=None,
        pad_token_id=0,
        **settings,
    )


def continued_greedily(theirs: nn.Module, tokens_BS: Tensor, new_tokens: int) -> Tensor:
    """`continued` by the likeliest tokens."""
    return continued(theirs, tokens_BS, new_tokens, do_sample=False)


def disagreement(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of logits, in standard deviations of theirs."""
    return float((ours - theirs).abs().max() / theirs.std())
