"""Choosing, scoring and the indexer's loss against loops over their definitions."""

import math

import pytest
import torch

from model.indexer import NONE, _lowest_of_equals, choose, divergence, index_scores


def random_scores(seed: int, *, levels: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [3, 9, 7] and visibility; of few `levels`, so that many tie, if any are named."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 9, 7, generator=generator)
    if levels:
        scores = torch.randint(levels, scores.shape, generator=generator).float()
    visible = torch.rand(scores.shape, generator=generator) < 0.6
    visible[0, 0] = False
    return scores, visible


@pytest.mark.parametrize("levels", [None, 1, 2, 3])
@pytest.mark.parametrize("keep", [1, 3, 7, 20])
def test_the_best_visible_entries_are_chosen_and_of_equals_the_first(
    keep: int, levels: int | None
) -> None:
    scores, visible = random_scores(keep, levels=levels)
    found = choose(scores, visible, keep)
    assert found.shape == (3, 9, min(keep, 7))
    for row in range(3):
        for query in range(9):
            seen = [s for s in range(7) if visible[row, query, s]]
            best = sorted(seen, key=lambda s: (-float(scores[row, query, s]), s))[:keep]
            some = found[row, query][found[row, query] != NONE].tolist()
            assert sorted(some) == sorted(best)


def test_no_entries_are_no_choice() -> None:
    found = choose(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), 4)
    assert found.shape == (2, 0)


def test_scores_are_weighted_sums_of_what_is_above_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 4, 6, generator=generator, dtype=torch.float64)
    k = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    w = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    found = index_scores(q, k, w)
    assert found.dtype == torch.float64
    assert index_scores(q.bfloat16(), k.bfloat16(), w.bfloat16()).dtype == torch.float32
    for b in range(2):
        for s in range(3):
            for entry in range(5):
                score = sum(
                    float(w[b, s, j]) * max(0.0, float(q[b, s, j] @ k[b, entry])) for j in range(4)
                )
                expected = score / math.sqrt(6) / math.sqrt(4)
                assert float(found[b, s, entry]) == pytest.approx(expected, rel=1e-12)


def test_divergence_is_from_attention_normalised_over_heads() -> None:
    scores, visible = random_scores(4)
    attention = torch.rand(scores.shape, generator=torch.Generator().manual_seed(5)) * 3
    attention[1, 2] *= torch.tensor([1.0, 0, 1, 0, 1, 0, 1])
    counted = 0
    for row in range(3):
        for query in range(9):
            seen = [s for s in range(7) if visible[row, query, s]]
            if not seen:
                continue
            total = sum(float(attention[row, query, s]) for s in seen)
            partition = sum(math.exp(float(scores[row, query, s])) for s in seen)
            term = 0.0
            for s in seen:
                p = float(attention[row, query, s]) / total
                q = math.exp(float(scores[row, query, s])) / partition
                term += p * math.log(p / q) if p else 0.0
            counted += 1
            assert float(divergence(scores, attention, visible)[row, query]) == pytest.approx(
                term, abs=1e-6
            )
    assert 0 < counted < 27, "some query must see nothing"


def test_the_loss_teaches_the_scores_alone_and_only_where_they_are_seen() -> None:
    scores, visible = random_scores(6)
    attention = torch.rand(scores.shape).requires_grad_()
    scores.requires_grad_()
    divergence(scores, attention, visible).sum().backward()
    assert attention.grad is None
    assert scores.grad is not None
    assert bool(scores.grad.isfinite().all())
    assert not scores.grad[~visible].any()
    assert bool(scores.grad[visible].any())


def test_scores_that_say_what_attention_does_have_nothing_to_learn() -> None:
    scores, visible = random_scores(7)
    visible[..., 0] = True
    attention = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    assert float(divergence(scores + 3, 5 * attention, visible).abs().max()) < 1e-6


@pytest.mark.parametrize("levels", [None, 1, 2, 3])
@pytest.mark.parametrize("keep", [1, 3, 7])
def test_devices_choose_as_cpus_do(keep: int, levels: int | None) -> None:
    scores, visible = random_scores(keep, levels=levels)
    masked = scores.masked_fill(~visible, float("-inf"))
    last = masked.topk(keep, dim=-1).values.amin(-1, keepdim=True)
    found = _lowest_of_equals(masked, last, keep)
    wanted = choose(scores, visible, keep)
    assert torch.equal(found.sort(-1).values, wanted.sort(-1).values)
