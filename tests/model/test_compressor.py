"""Pooled blocks against one channel at a time, and the rings that decoding keeps."""

import pytest
import torch
from torch import Tensor

from model.compressed import PickingCompressor
from model.compressor import Compressor, fill_ring
from model.hyper import HyperLayer
from model.passes import Whole
from model.rope import rotary_table, rotate
from tests.references import random_model, tiny_v4

LAYERS = {"csa": 1, "indexer": 1, "hca": 2}
"""Layers of `TINY_V4` with each kind of compressor."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def pooled_by_channel(block: Compressor, x_SD: Tensor, segment: list[int]) -> Tensor:
    """Entries of one row, block after block and channel after channel."""
    config, m = block.config, block.ratio
    width = len(block.kv_norm.weight)
    kv, gate = x_SD @ block.kv_proj.weight.T, x_SD @ block.gate_proj.weight.T
    entries = []
    for i in range(len(x_SD) // m):
        own = list(range(i * m, (i + 1) * m))
        before = [s for s in range((i - 1) * m, i * m) if s >= 0] if block.series == 2 else []
        offset = width if block.series == 2 else 0
        candidates = [(s, 0) for s in before] + [(s, offset) for s in own]
        candidates = [(s, o) for s, o in candidates if segment[s] == segment[own[-1]]]
        entry = torch.zeros(width, dtype=x_SD.dtype)
        for c in range(width):
            score = torch.stack(
                [gate[s, o + c] + block.position_bias[s % m, o + c] for s, o in candidates]
            )
            values = torch.stack([kv[s, o + c] for s, o in candidates])
            entry[c] = (score.softmax(0) * values).sum()
        entry = entry / (entry.square().mean() + config.rms_norm_eps).sqrt() * block.kv_norm.weight
        rotary = config.qk_rope_head_dim
        table = rotary_table(rotary, config.compress_rope_theta, len(x_SD))
        turned = rotate(entry[-rotary:], table, torch.tensor(i * m))
        entries.append(torch.cat([entry[:-rotary], turned]))
    return torch.stack(entries)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_block_is_a_mean_weighted_by_channel_of_its_own_document(kind: str, packed: bool) -> None:
    block = random_model(tiny_v4()).model.layers[LAYERS[kind]].double()
    assert isinstance(block, HyperLayer)
    compressor = block.self_attn.compressor
    if kind == "indexer":
        assert isinstance(compressor, PickingCompressor)
        compressor = compressor.indexer
    assert compressor is not None
    x_BSD, tokens_BS = normal(1, 27, 32), torch.zeros(1, 27, dtype=torch.int64)
    lengths = torch.tensor([6, 1, 12, 8] if packed else [27])
    segments_BS = torch.arange(len(lengths)).repeat_interleave(lengths)[None]
    found = compressor(x_BSD, Whole(tokens_BS, segments_BS))
    expected = pooled_by_channel(compressor, x_BSD[0], segments_BS[0].tolist())
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-6)


def test_rings_hold_the_last_tokens_by_position() -> None:
    x_BSE, lengths = normal(4, 11, 2), [1, 5, 8, 11]
    ring = torch.zeros(4, 5, 2).double()
    fill_ring(ring, x_BSE, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        for position in range(max(0, length - 5), length):
            assert torch.equal(ring[row, position % 5], x_BSE[row, position])
