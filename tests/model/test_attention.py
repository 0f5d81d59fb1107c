"""Latent attention against a loop over heads in float64, and against transformers' models."""

import pytest
import torch
from torch import nn

from model.attention import LatentAttention
from model.fp8.scheme import HIGH
from model.passes import Whole
from tests.model.transformers_twin import TOLERANCE, disagreement, transformers_twin
from tests.references import latent_attention, random_tokens, tiny


def attention(q_lora_rank: int | None) -> LatentAttention:
    made = LatentAttention(tiny(q_lora_rank=q_lora_rank, rms_norm_eps=0.1), HIGH)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return made


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
    found, loss = block(x_BSD, Whole(tokens_BS, segments_BS if masked else None))
    assert loss is None
    for row in range(2):
        expected, _ = latent_attention(block, x_BSD[row], mask_BSS[row])
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-4, atol=1e-5)


def test_layers_share_one_table_of_angles_and_none_is_their_own() -> None:
    one, other = attention(16), attention(None)
    assert one.rotary(3, torch.device("cpu")) is other.rotary(9, torch.device("cpu"))
    assert not list(one.buffers())


def test_what_is_cached_is_a_latent_and_one_key_for_all_heads() -> None:
    block = attention(16)
    x = torch.randn(1, 3, 32)
    table = block.rotary(3, x.device)
    entries = block.project(x, table, torch.arange(3)).entries()
    assert entries.shape[-1] == 16 + 4
    other = x.clone()
    other[:, 2] = 0
    entries_of_other = block.project(other, table, torch.arange(3)).entries()
    assert torch.equal(entries[:, :2], entries_of_other[:, :2])
    assert not torch.equal(entries[:, 2], entries_of_other[:, 2])


YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 1.0}
WITHOUT = {"mscale": 0.0, "mscale_all_dim": 0.0}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
        {"first_k_dense_replace": 2, "num_hidden_layers": 3, "norm_topk_prob": False},
        {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.5}},
        # The magnitude then lies in the rotary table instead of the softmax's scale.
        {"rope_scaling": YARN | WITHOUT},
        {"rope_scaling": YARN | WITHOUT | {"beta_fast": 32.0}, "qk_rope_head_dim": 8},
    ],
)
@torch.no_grad()
def test_a_model_of_latent_attention_is_transformers_model(changes: dict[str, object]) -> None:
    config = tiny(num_nextn_predict_layers=0, max_position_embeddings=64, **changes)
    ours, theirs = transformers_twin(config)
    tokens_BS = random_tokens(2, 40)
    assert disagreement(ours(tokens_BS), theirs(tokens_BS, use_cache=False).logits) < TOLERANCE
