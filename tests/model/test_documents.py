"""Attention within documents as devices are told of it, beside a mask of every pair."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.causal import causal_attention
from model.documents import _ends, _on_npu, beginnings, blocks_of, by_blocks
from model.passes import Whole


def segments(rows: int, length: int, *, share: float) -> Tensor:
    """Documents that begin at random, on average after 1 / share tokens."""
    generator = torch.Generator().manual_seed(length)
    return (torch.rand(rows, length, generator=generator) < share).cumsum(1)


def batch_of(segments_BS: Tensor | None, rows: int = 2, length: int = 5) -> Whole:
    shape = (rows, length) if segments_BS is None else segments_BS.shape
    return Whole(torch.zeros(shape, dtype=torch.int64), segments_BS)


def test_every_token_knows_where_its_document_begins() -> None:
    found = beginnings(torch.tensor([[0, 0, 1, 1, 1, 2], [7, 7, 7, 7, 7, 7], [3, 2, 1, 0, 1, 1]]))
    assert found.tolist() == [[0, 0, 2, 2, 2, 5], [0] * 6, [0, 1, 2, 3, 4, 4]]


@pytest.mark.parametrize("share", [0.0, 0.003, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("length", [3, 128, 300, 512])
def test_blocks_are_whole_partial_or_unseen_as_their_pairs_are(length: int, share: float) -> None:
    batch = batch_of(segments(2, length, share=share))
    blocks = blocks_of(batch)
    assert blocks_of(batch) is blocks
    mask_B1SS = batch.mask_B1SS
    assert mask_B1SS is not None
    for row in range(2):
        for query in range(0, length, 128):
            i = query // 128
            partial = blocks.kv_indices[row, 0, i, : blocks.kv_num_blocks[row, 0, i]].tolist()
            assert blocks.full_kv_indices is not None and blocks.full_kv_num_blocks is not None
            full = blocks.full_kv_indices[row, 0, i, : blocks.full_kv_num_blocks[row, 0, i]]
            for j in range(-(-length // 128)):
                pairs = mask_B1SS[row, 0, query : query + 128, j * 128 : (j + 1) * 128]
                assert (j in full.tolist()) <= bool(pairs.all())
                assert (j in partial or j in full.tolist()) >= bool(pairs.any())
                assert not (j in partial and j in full.tolist())
            # In one document the diagonal alone is asked of the mask.
            assert partial == [i] or share > 0


# Compiled, it is fused; as it is it gives the same and says so.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("share", [0.0, 0.01, 0.2])
@pytest.mark.parametrize("length", [40, 256, 300])
def test_attention_by_blocks_is_that_by_a_mask(length: int, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, length, width, generator=generator, dtype=torch.float64)
        for width in (24, 24, 16)
    )
    batch = batch_of(segments(2, length, share=share))
    found = by_blocks(q, k, v, blocks_of(batch), 0.3)
    wanted = causal_attention(q, k, v, batch.mask_B1SS, scale=0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_ends_are_of_documents_of_all_rows_one_after_another() -> None:
    assert _ends(batch_of(None), 2, 5) == [5, 10]
    segments_BS = torch.tensor([[0, 0, 1, 1, 1], [1, 2, 2, 3, 3]])
    assert _ends(batch_of(segments_BS), 2, 5) == [2, 5, 6, 8, 10]


@pytest.mark.parametrize("limit", [1, 3, 1024])
def test_attention_by_ends_is_that_by_a_mask(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """However few documents the NPU's kernel takes in one call; a plain one is in its place."""

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, *_: Any, scale: float, **given: Any
    ) -> list[Tensor]:
        ends = given["actual_seq_qlen"]
        assert ends == given["actual_seq_kvlen"] and len(ends) <= limit and ends[-1] == len(q)
        documents = zip([0, *ends], ends, strict=False)
        return [torch.cat([plain(q[a:b], k[a:b], v[a:b], scale) for a, b in documents])]

    def plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(0, 1)

    monkeypatch.setattr(torch.ops.npu, "npu_fusion_attention", kernel, raising=False)
    monkeypatch.setattr("model.documents._NPU_DOCUMENTS", limit)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, 40, width, generator=generator, dtype=torch.float64)
        for width in (24, 24, 16)
    )
    batch = batch_of(segments(2, 40, share=0.2))
    wanted = causal_attention(q, k, v, batch.mask_B1SS, scale=0.3)
    torch.testing.assert_close(_on_npu(q, k, v, batch, 0.3), wanted, rtol=1e-9, atol=1e-9)
