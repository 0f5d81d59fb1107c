"""Draws against a distribution written out token by token, and at their edges."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.errors import ConfigError
from model.drawing import Drawing, draw

DRAWINGS = [
    Drawing(1.0),
    Drawing(0.6),
    Drawing(1.7, top_k=13),
    Drawing(1.0, top_k=1),
    Drawing(1.0, top_k=1000),
    Drawing(1.0, top_p=0.8),
    Drawing(1.0, top_p=1e-6),
    Drawing(0.8, top_k=40, top_p=0.9),
]


def distribution(logits: list[float], drawing: Drawing) -> list[float]:
    """The probability of each token, in the words of `Drawing`."""
    weights = [math.exp((x - max(logits)) / drawing.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    order = order[: drawing.top_k]
    total, reached, kept = sum(weights[token] for token in order), 0.0, []
    for token in order:
        if reached < drawing.top_p:
            kept.append(token)
        reached += weights[token] / total
    left = sum(weights[token] for token in kept)
    return [weights[token] / left * (token in kept) for token in range(len(logits))]


def random_logits(vocabulary: int, seed: int = 0) -> Tensor:
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def evenly(count: int) -> Tensor:
    """Uniform numbers that leave no gap wider than 1 / count."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


@pytest.mark.parametrize("vocabulary", [5, 64, 200])
@pytest.mark.parametrize("drawing", DRAWINGS, ids=str)
def test_even_numbers_draw_each_token_as_often_as_it_is_likely(
    vocabulary: int, drawing: Drawing
) -> None:
    logits_V, count = random_logits(vocabulary), 4096
    expected = distribution(logits_V.tolist(), drawing)
    chosen, logprobs = draw(logits_V.expand(count, -1), drawing, evenly(count))
    counts = torch.bincount(chosen, minlength=vocabulary).tolist()
    for token, (found, probability) in enumerate(zip(counts, expected, strict=True)):
        # An interval of the unit line holds its length in numbers, give or take one.
        assert abs(found - count * probability) <= 1, token
        assert probability > 0 or found == 0
    wanted = torch.tensor([math.log(expected[token]) for token in chosen])
    torch.testing.assert_close(logprobs, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("drawing", [Drawing(1.0, top_k=7), Drawing(1.0, top_p=0.6)], ids=str)
def test_of_equal_tokens_truncation_keeps_those_of_lower_id(drawing: Drawing) -> None:
    # Three values for 40 tokens: the cut goes through a crowd of equals.
    logits_V = random_logits(40).sign() * (random_logits(40, seed=1) > 0.5)
    expected = distribution(logits_V.tolist(), drawing)
    kept = [token for token, probability in enumerate(expected) if probability]
    last = logits_V[kept].min()
    assert any(logits_V[token] == last for token in range(40) if token not in kept)
    chosen, _ = draw(logits_V.expand(2000, -1), drawing, evenly(2000))
    assert sorted(set(chosen.tolist())) == kept


def test_the_ends_of_the_unit_line_draw_tokens_that_are_possible() -> None:
    impossible = float("-inf")
    logits_V = torch.tensor([impossible, impossible, 0.5, 3.0, -90.0, 1.0, impossible])
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    chosen, logprobs = draw(logits_V.expand(2, -1), Drawing(1.0), ends)
    assert chosen.tolist() == [2, 5]
    torch.testing.assert_close(logprobs, logits_V.log_softmax(0)[chosen])


def test_rows_are_drawn_each_by_its_own_logits_and_number() -> None:
    logits_BV = torch.stack([random_logits(100, seed) for seed in range(6)])
    uniform_B = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drawing = Drawing(0.9, top_k=30, top_p=0.95)
    chosen, logprobs = draw(logits_BV, drawing, uniform_B)
    assert len(set(chosen.tolist())) > 1
    for row in range(6):
        one = slice(row, row + 1)
        alone, its_logprobs = draw(logits_BV[one], drawing, uniform_B[one])
        assert torch.equal(alone, chosen[one])
        assert torch.equal(its_logprobs, logprobs[one])


def test_no_temperature_takes_the_likeliest_token_and_of_equals_the_first() -> None:
    logits_BV = torch.tensor([[0.0, 2.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    numbers = torch.tensor([0.99, 0.99], dtype=torch.float64)
    chosen, logprobs = draw(logits_BV, Drawing(0.0, top_k=1, top_p=0.1), numbers)
    assert chosen.tolist() == [1, 0]
    torch.testing.assert_close(logprobs, logits_BV.log_softmax(1)[[0, 1], [1, 0]])


@pytest.mark.parametrize("drawing", [Drawing(0.0), Drawing(1.0), Drawing(1.0, top_p=0.5)], ids=str)
def test_logits_that_are_no_numbers_show_in_the_logprob(drawing: Drawing) -> None:
    logits_BV = random_logits(9).repeat(2, 1)
    logits_BV[0, 4] = float("nan")
    chosen, logprobs = draw(logits_BV, drawing, torch.zeros(2, dtype=torch.float64))
    assert logprobs.isfinite().tolist() == [False, True]
    assert bool((chosen < 9).all())


def test_the_least_temperature_takes_the_likeliest_token() -> None:
    """1e-300 makes infinities of logits; only what lies between them counts."""
    logits_BV = random_logits(50, 3)[None]
    chosen, logprobs = draw(logits_BV, Drawing(1e-300), torch.zeros(1, dtype=torch.float64))
    assert chosen.tolist() == [int(logits_BV.argmax())]
    assert logprobs.tolist() == [0.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, r"temperature = -0\.1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_k": 0}, "top_k = 0"),
        ({"top_p": 0.0}, r"top_p = 0\.0"),
        ({"top_p": 1.01}, r"top_p = 1\.01"),
        ({"top_p": float("nan")}, "top_p = nan"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Drawing(**fields)


def test_a_number_that_was_rounded_to_one_draws_the_last_token_that_has_a_chance() -> None:
    logits_V = torch.full((200,), -math.inf)
    logits_V[[3, 70, 90]] = torch.tensor([1.0, 0.0, -3.0])
    chosen, logprobs = draw(logits_V[None], Drawing(1.0), torch.ones(1, dtype=torch.float64))
    assert chosen.tolist() == [90]
    assert bool(logprobs.isfinite().all())
