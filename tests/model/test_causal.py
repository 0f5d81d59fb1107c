"""Attention in blocks against the formula, in float64."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from model import causal
from model.causal import causal_attention
from tests.memory import saved_tensors

SCALE = 0.3


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def heads(length: int) -> list[Tensor]:
    """Queries and keys wider than values, in other layouts than those they are used in."""
    return [
        normal(2, length, 3, 6, seed=0),
        normal(2, length, 3, 6, seed=1),
        normal(2, length, 3, 5, seed=2),
    ]


def attend(leaves: list[Tensor], mask: Tensor | None) -> Tensor:
    q, k, v = (leaf.transpose(1, 2) for leaf in leaves)
    return causal_attention(q, k, v, mask, scale=SCALE)


def expected(leaves: list[Tensor], mask: Tensor | None) -> Tensor:
    q, k, v = (leaf.transpose(1, 2) for leaf in leaves)
    length = q.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask
    scores = (SCALE * q @ k.mT).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def segments(length: int) -> Tensor:
    """Two texts a row, of other lengths in each."""
    begin = torch.tensor([[length // 3], [length // 2]])
    segment_BS = (torch.arange(length) >= begin).long()
    same_BSS = segment_BS[:, :, None] == segment_BS[:, None]
    return (same_BSS & torch.ones(length, length, dtype=torch.bool).tril())[:, None]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 3, 4, 9, 16])
def test_outputs_and_gradients_are_the_formulas(
    monkeypatch: pytest.MonkeyPatch, length: int, masked: bool
) -> None:
    monkeypatch.setattr(causal, "BLOCK", 4)
    leaves, mask = heads(length), segments(length) if masked else None
    found, reference = attend(leaves, mask), expected(leaves, mask)
    torch.testing.assert_close(found, reference)
    dy = normal(*found.shape, seed=3).detach()
    grads = [torch.autograd.grad(y, leaves, dy) for y in (found, reference)]
    torch.testing.assert_close(*grads)


def test_long_texts_and_narrow_types_get_the_same_from_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leaves = heads(12)
    monkeypatch.setattr(causal, "LONGEST", 11)
    torch.testing.assert_close(attend(leaves, None), expected(leaves, None))
    mask = segments(12)
    torch.testing.assert_close(attend(leaves, mask), expected(leaves, mask))
    rounded = [leaf.detach().bfloat16()[:, :4] for leaf in leaves]
    found = attend(rounded, None)
    assert found.dtype == torch.bfloat16


def test_what_is_kept_grows_with_half_the_square() -> None:
    """Probabilities of later blocks are never made."""
    leaves = heads(4 * causal.BLOCK)
    with saved_tensors() as kept:
        attend(leaves, None)
    pairs = 2 * 3
    probabilities = sum(t.numel() for t in kept if t.dim() == 3 and t.shape[2] % 8 == 0)
    blocks = (1 + 2 + 3 + 4) * causal.BLOCK**2
    assert probabilities == pairs * blocks


def test_reading_keeps_no_probabilities() -> None:
    q, k, v = (leaf.detach().transpose(1, 2) for leaf in heads(4 * causal.BLOCK))
    kept: list[Tensor] = []
    for learns in (False, True):
        kept.clear()
        context = SimpleNamespace(
            needs_input_grad=(learns,) * 3 + (False,) * 2,
            save_for_backward=lambda *tensors: kept.extend(tensors),
        )
        causal._CausalAttention.forward(context, q, k, v, None, SCALE)
        assert len(kept) == 3 + 4 * learns
