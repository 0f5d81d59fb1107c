"""Causal attention within documents on devices, without a mask of every pair of tokens.

Documents of a row are contiguous, so a query sees one range of keys: from where its document begins
to itself. Kernels are told of ranges in ways of their own:

| device | attention | told by |
|---|---|---|
| CUDA, several documents | FlexAttention, compiled | blocks of 128 tokens that see each other |
| CUDA, one document a row | `scaled_dot_product_attention` | its causal flag |
| NPU | `npu_fusion_attention` of torch_npu | where each document ends, on the host |
| CPU | `model.causal` | a mask, of short texts |

Axes: B sequences, H heads, S positions, Q query and key width, V value width, N blocks of tokens,
T = B * S.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from model.causal import causal_attention
from model.passes import Whole

BLOCK = 128
"""Tokens of a block: what FlexAttention's kernels skip or work on as a whole."""
_NPU_MASK = 2048
"""Side of the causal pattern that the NPU's kernel repeats along the diagonal."""
_NPU_DOCUMENTS = 1024
"""Documents that the NPU's kernel takes in one call at the most, as torch_npu's notes say."""
_DIAGONAL_BELOW = 3
"""The NPU kernel's number for a causal pattern that ends at each document's last token."""


def attend_in_documents(
    q_BHSQ: Float[Tensor, "B H S Q"],
    k_BHSQ: Float[Tensor, "B H S Q"],
    v_BHSV: Float[Tensor, "B H S V"],
    batch: Whole,
    *,
    scale: float,
) -> Float[Tensor, "B S H V"]:
    """softmax(scale q k^T) v over the keys that are not later and of the query's own document."""
    match q_BHSQ.device.type:
        case "cuda" if batch.segments_BS is not None:
            return by_blocks(q_BHSQ, k_BHSQ, v_BHSV, blocks_of(batch), scale, attend=_compiled())
        case "npu" if hasattr(torch.ops.npu, "npu_fusion_attention"):
            return _on_npu(q_BHSQ, k_BHSQ, v_BHSV, batch, scale)
        case _:
            return causal_attention(q_BHSQ, k_BHSQ, v_BHSV, batch.mask_B1SS, scale=scale)


def by_blocks(
    q_BHSQ: Tensor,
    k_BHSQ: Tensor,
    v_BHSV: Tensor,
    blocks: BlockMask,
    scale: float,
    *,
    attend: Callable[..., Any] = flex_attention,
) -> Float[Tensor, "B S H V"]:
    """By FlexAttention, as it is or compiled."""
    out_BHSV: Tensor = attend(q_BHSQ, k_BHSQ, v_BHSV, block_mask=blocks, scale=scale)
    return out_BHSV.transpose(1, 2)


def blocks_of(batch: Whole) -> BlockMask:
    """Which blocks of queries and keys see each other wholly, in part or not; made once a pass."""
    if batch.blocks is None:
        assert batch.segments_BS is not None
        batch.blocks = _blocks(beginnings(batch.segments_BS))
    return batch.blocks


def beginnings(segments_BS: Int[Tensor, "B S"]) -> Int[Tensor, "B S"]:
    """The position at which each token's document begins."""
    positions_S = torch.arange(segments_BS.shape[1], device=segments_BS.device)
    follows_BS = torch.zeros_like(segments_BS, dtype=torch.bool)
    follows_BS[:, 1:] = segments_BS[:, 1:] == segments_BS[:, :-1]
    return positions_S.masked_fill(follows_BS, 0).cummax(1).values


def _blocks(begin_BS: Tensor) -> BlockMask:
    length = begin_BS.shape[1]
    device = begin_BS.device
    first_N = torch.arange(0, length, BLOCK, device=device)
    last_N = (first_N + BLOCK - 1).clamp_max(length - 1)
    count = len(first_N)
    own_N = torch.arange(count, device=device)
    # The keys of a block of queries lie in neighbouring blocks. All queries see those from where
    # the last one's document begins, but not all of the block that they are in themselves.
    low_BN = begin_BS[:, first_N] // BLOCK
    full_BN = (-(-begin_BS[:, last_N] // BLOCK)).minimum(own_N)
    key_N = torch.arange(count, device=device)
    key_BNN = key_N.expand(len(begin_BS), count, count)
    full_BNN = (key_BNN >= full_BN.unsqueeze(2)) & (key_BNN < own_N[:, None])
    seen_BNN = (key_BNN >= low_BN.unsqueeze(2)) & (key_BNN <= own_N[:, None])

    return BlockMask.from_kv_blocks(
        *_listed(seen_BNN & ~full_BNN),
        *_listed(full_BNN),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda b, h, query, key: (key <= query) & (key >= begin_BS[b, query]),
        seq_lengths=(length, length),
    )


def _listed(chosen_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys are chosen for each block of queries, and the chosen ones first."""
    chosen_B1NN = chosen_BNN.unsqueeze(1).int()
    order_B1NN = chosen_B1NN.argsort(dim=-1, descending=True, stable=True)
    return chosen_B1NN.sum(-1, dtype=torch.int32), order_B1NN.int()


@lru_cache
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled


def _on_npu(q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, batch: Whole, scale: float) -> Tensor:
    rows, heads, length, _ = q_BHSQ.shape
    if batch.ends is None:
        batch.ends = _ends(batch, rows, length)
    hidden = torch.ones(_NPU_MASK, _NPU_MASK, dtype=torch.bool, device=q_BHSQ.device).triu_(1)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHSQ, k_BHSQ, v_BHSV))
    parts, begin = [], 0
    for first in range(0, len(batch.ends), _NPU_DOCUMENTS):
        ends = batch.ends[first : first + _NPU_DOCUMENTS]
        own = slice(begin, ends[-1])
        told = [end - begin for end in ends]
        part_THV: Tensor = torch.ops.npu.npu_fusion_attention(
            q[own],
            k[own],
            v[own],
            heads,
            "TND",
            atten_mask=hidden,
            scale=scale,
            sparse_mode=_DIAGONAL_BELOW,
            actual_seq_qlen=told,
            actual_seq_kvlen=told,
        )[0]
        parts.append(part_THV)
        begin = ends[-1]
    out_THV = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out_THV.view(rows, length, heads, -1)


def _ends(batch: Whole, rows: int, length: int) -> list[int]:
    """Where each document ends in all rows one after another; the kernel takes them on the host,
    which waits for the device to tell them."""
    if batch.segments_BS is None:
        return [length * (row + 1) for row in range(rows)]
    position_BS = torch.arange(length, device=batch.segments_BS.device)
    begins_T = (beginnings(batch.segments_BS) == position_BS).flatten().cpu()
    starts: list[int] = begins_T.nonzero().flatten().tolist()
    return [*starts[1:], rows * length]
