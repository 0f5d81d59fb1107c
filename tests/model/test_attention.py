"""Latent attention against a loop over heads and positions in float64."""

import pytest
import torch
from torch import Tensor, nn

from model.attention import LATENT_NORM_EPSILON, LatentAttention
from model.passes import Whole
from tests.references import rotate_as_complex, tiny


def attention(q_lora_rank: int | None) -> LatentAttention:
    made = LatentAttention(tiny(q_lora_rank=q_lora_rank, rms_norm_eps=0.1), "high")
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return made


def normed(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm with the latent norms' own epsilon, which is not the model's."""
    return x / (x.square().mean(-1, keepdim=True) + LATENT_NORM_EPSILON).sqrt() * weight.double()


def head_by_head(block: LatentAttention, x_SD: Tensor, allowed_SS: Tensor) -> Tensor:
    """Eq. 1-11 of DeepSeek-V3 for one sequence."""
    config, x_SD = block.config, x_SD.double()
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
    w = {name: parameter.double() for name, parameter in block.named_parameters()}
    if config.q_lora_rank is None:
        queries = x_SD @ w["q_proj.weight"].T
    else:
        latent = normed(x_SD @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"])
        queries = latent @ w["q_b_proj.weight"].T
    compressed = x_SD @ w["kv_a_proj_with_mqa.weight"].T
    latent_SC = normed(compressed[:, : config.kv_lora_rank], w["kv_a_layernorm.weight"])
    shared_key = rotate_as_complex(compressed[:, config.kv_lora_rank :], config.rope_theta)
    expanded = latent_SC @ w["kv_b_proj.weight"].T
    outputs = []
    for head in range(config.num_attention_heads):
        q = queries[:, head * (nope + rope) : (head + 1) * (nope + rope)]
        kv = expanded[
            :, head * (nope + config.v_head_dim) : (head + 1) * (nope + config.v_head_dim)
        ]
        q_rope = rotate_as_complex(q[:, nope:], config.rope_theta)
        score = q[:, :nope] @ kv[:, :nope].T + q_rope @ shared_key.T
        score = (score / (nope + rope) ** 0.5).masked_fill(~allowed_SS, float("-inf"))
        outputs.append(score.softmax(-1) @ kv[:, nope:])
    return torch.cat(outputs, 1) @ w["o_proj.weight"].T


@pytest.mark.parametrize("q_lora_rank", [None, 16])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_the_papers_head_by_head(q_lora_rank: int | None, masked: bool) -> None:
    block = attention(q_lora_rank)
    x_BSD = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    causal_SS = torch.ones(9, 9, dtype=torch.bool).tril()
    mask_BSS = causal_SS.repeat(2, 1, 1)
    if masked:
        mask_BSS[1, 5:, :5] = False
    segments_BS = torch.zeros(2, 9, dtype=torch.int64)
    segments_BS[1, 5:] = 1
    tokens_BS = torch.zeros(2, 9, dtype=torch.int64)
    found = block(x_BSD, Whole(tokens_BS, segments_BS if masked else None))
    for row in range(2):
        expected = head_by_head(block, x_BSD[row], mask_BSS[row])
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-4, atol=1e-5)


def test_what_is_cached_is_a_latent_and_one_key_for_all_heads() -> None:
    block = attention(16)
    x = torch.randn(1, 3, 32)
    *_, latent, k_rope = block.project(x, torch.arange(3))
    assert latent.shape[-1] + k_rope.shape[-1] == 16 + 4
    x_other = x.clone()
    x_other[:, 2] = 0
    *_, latent_other, k_rope_other = block.project(x_other, torch.arange(3))
    assert torch.equal(latent[:, :2], latent_other[:, :2])
    assert torch.equal(k_rope[:, :2], k_rope_other[:, :2])
