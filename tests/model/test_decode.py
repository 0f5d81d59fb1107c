"""Sampling through the latent cache against full forward passes, and against statistics."""

import math

import pytest
import torch

from configs.errors import ConfigError, DataError, TrainingError
from model.attention import LatentAttention
from model.decode import Sample, sample
from model.drawing import Drawing
from model.passes import Step, Whole
from model.transformer import Transformer
from tests.references import random_model, random_tokens, tiny

PROMPTS = [[5], [9, 8, 7, 6, 5, 4, 3], [1, 2, 3], [40, 41, 42, 43]]
SEEDS = [11, 12, 13, 14]
NEVER = -1
"""No token: nothing stops an answer."""


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model()


def draw(
    model: Transformer,
    prompts: list[list[int]],
    seeds: list[int],
    *,
    new: int = 8,
    temperature: float = 1.0,
    stop: int = NEVER,
) -> list[Sample]:
    return sample(
        model,
        prompts,
        max_new_tokens=new,
        drawing=Drawing(temperature),
        stop_tokens={stop},
        seeds=seeds,
    )


def logprobs_by_forward(
    model: Transformer, prompt: list[int], answer: list[int], temperature: float
) -> torch.Tensor:
    """Log-probabilities [answer, V] before each answer token, from one full forward pass."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([prompt + answer]))[0]
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


@pytest.mark.parametrize("q_lora_rank", [None, 16])
def test_the_absorbed_form_is_the_expanded_one(q_lora_rank: int | None) -> None:
    config = tiny(q_lora_rank=q_lora_rank)
    block = random_model(config).model.layers[0].self_attn
    assert isinstance(block, LatentAttention)
    x_BSD = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    cache = {"latent_BLW": torch.full((2, 12, 20), float("nan"))}
    tokens_BS = torch.zeros(2, 9, dtype=torch.int64)
    with torch.no_grad():
        whole, _ = block(x_BSD, Whole(tokens_BS))
        for position in range(9):
            step = Step(tokens_BS[:, :1], torch.full((2,), position), {block: cache})
            found, _ = block(x_BSD[:, position : position + 1], step)
            torch.testing.assert_close(found[:, 0], whole[:, position], rtol=1e-4, atol=1e-5)
    assert bool(cache["latent_BLW"][:, :9].isfinite().all())
    assert bool(cache["latent_BLW"][:, 9:].isnan().all())


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_every_logprob_is_that_of_a_full_forward_pass(
    model: Transformer, temperature: float
) -> None:
    answers = draw(model, PROMPTS, SEEDS, temperature=temperature)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer.token_ids) == len(answer.logprobs) == 8
        table = logprobs_by_forward(model, prompt, answer.token_ids, temperature)
        expected = [float(row[token]) for row, token in zip(table, answer.token_ids, strict=True)]
        assert answer.logprobs == pytest.approx(expected, abs=1e-4)


def test_temperature_zero_takes_the_likeliest_token(model: Transformer) -> None:
    for prompt, answer in zip(PROMPTS, draw(model, PROMPTS, SEEDS, temperature=0.0), strict=True):
        table = logprobs_by_forward(model, prompt, answer.token_ids, 1.0)
        assert answer.token_ids == table.argmax(-1).tolist()
        assert answer.logprobs == pytest.approx(table.max(-1).values.tolist(), abs=1e-4)


def test_a_rows_answer_does_not_depend_on_the_other_rows(model: Transformer) -> None:
    # A stop token that rows draw at different steps, if at all.
    stop = draw(model, PROMPTS, SEEDS, new=16)[1].token_ids[4]
    together = draw(model, PROMPTS, SEEDS, new=16, stop=stop)
    backwards = draw(model, PROMPTS[::-1], SEEDS[::-1], new=16, stop=stop)[::-1]
    assert len({len(answer.token_ids) for answer in together}) > 1
    for prompt, seed, a, b in zip(PROMPTS, SEEDS, together, backwards, strict=True):
        (alone,) = draw(model, [prompt], [seed], new=16, stop=stop)
        assert a.token_ids == b.token_ids == alone.token_ids
        assert a.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        assert a.stopped == b.stopped == alone.stopped


def test_a_longer_limit_only_appends(model: Transformer) -> None:
    short, long = (draw(model, PROMPTS, SEEDS, new=new) for new in (3, 9))
    assert [a.token_ids for a in short] == [a.token_ids[:3] for a in long]


def test_an_answer_ends_with_the_first_stop_token(model: Transformer) -> None:
    free = draw(model, PROMPTS, SEEDS, new=12)
    stop = free[1].token_ids[4]
    for before, answer in zip(free, draw(model, PROMPTS, SEEDS, new=12, stop=stop), strict=True):
        reached = stop in before.token_ids
        end = before.token_ids.index(stop) + 1 if reached else 12
        assert answer.token_ids == before.token_ids[:end]
        assert answer.stopped == reached
    assert {stop in answer.token_ids for answer in free} == {True, False}


@pytest.mark.parametrize(
    "drawing", [Drawing(0.9), Drawing(1.2, top_k=30), Drawing(0.9, top_p=0.8)], ids=str
)
def test_draws_follow_what_truncation_leaves_of_the_softmax(drawing: Drawing) -> None:
    """Chi-square of 4,000 draws over the likeliest tokens and the rest, below its 99.99 % point.

    Each draw has a seed of its own, so this is about the numbers that seeds make as well.
    """
    model, prompt, draws = random_model(tiny(initializer_range=0.1)), [3, 1, 4], 4000
    answers = sample(
        model,
        [prompt] * draws,
        max_new_tokens=1,
        drawing=drawing,
        stop_tokens=(),
        seeds=range(draws),
    )
    counts = torch.bincount(torch.tensor([a.token_ids[0] for a in answers]), minlength=64)
    chances = logprobs_by_forward(model, prompt, [0], drawing.temperature)[0].double().exp()
    order = chances.argsort(descending=True)
    ranked = chances[order]
    kept = ranked.cumsum(0) - ranked < drawing.top_p * ranked[: drawing.top_k].sum()
    kept[drawing.top_k or len(kept) :] = False
    chances[order[~kept]] = 0
    chances /= chances.sum()
    for answer in answers[:20]:
        (token,), (logprob,) = answer.token_ids, answer.logprobs
        assert logprob == pytest.approx(math.log(chances[token]), abs=1e-4)
    expected = chances * draws
    often = expected > 20
    assert int(often.sum()) > 15
    assert not counts[expected == 0].any()
    observed = torch.cat([counts[often], counts[~often].sum()[None]]).double()
    wanted = torch.cat([expected[often], expected[~often].sum()[None]])
    filled = wanted > 0
    freedom = int(filled.sum()) - 1
    chi_square = float(((observed - wanted).square() / wanted)[filled].sum())
    # Wilson and Hilferty's cube-root approximation of the quantile, z = 3.72.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < limit


def test_the_same_seed_draws_the_same_answer_and_another_does_not(model: Transformer) -> None:
    first, again = (draw(model, PROMPTS, SEEDS) for _ in range(2))
    assert first == again
    other = draw(model, PROMPTS, [seed + 100 for seed in SEEDS])
    assert all(a.token_ids != b.token_ids for a, b in zip(first, other, strict=True))


def test_what_does_not_fit_the_context_is_refused(model: Transformer) -> None:
    fits = random_tokens(24).tolist()
    assert len(draw(model, [fits], [0])[0].token_ids) == 8
    with pytest.raises(DataError, match=r"25 tokens and max_new_tokens = 8 .* context of 32"):
        draw(model, [[5], [*fits, 1]], [0, 1])
    with pytest.raises(DataError, match="no tokens"):
        draw(model, [[5], []], [0, 1])


@pytest.mark.parametrize("prompt", [[3, 64], [-1, 3]])
def test_tokens_that_the_model_does_not_have_are_refused(
    model: Transformer, prompt: list[int]
) -> None:
    with pytest.raises(DataError, match=r"holds tokens .* but the model's are 0 to 63"):
        draw(model, [[5], prompt], [0, 1])


def test_no_tokens_and_no_rows_are_refused(model: Transformer) -> None:
    with pytest.raises(ConfigError, match="max_new_tokens = 0"):
        draw(model, [[5]], [0], new=0)
    with pytest.raises(ConfigError, match="max_rows = 0"):
        sample(
            model,
            [[5]],
            max_new_tokens=1,
            drawing=Drawing(),
            stop_tokens=(),
            seeds=[0],
            max_rows=0,
        )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_damaged_model_says_so_and_gives_no_answer(temperature: float) -> None:
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight[7, 3] = float("nan")
    with pytest.raises(TrainingError, match=r"after 3 tokens of prompt and 0 of answer"):
        draw(model, [[1, 2, 3]], [0], temperature=temperature)


def test_no_prompts_make_no_answers(model: Transformer) -> None:
    assert draw(model, [], []) == []


def test_fp8_samples_from_nearly_the_distribution_that_it_trains() -> None:
    """Not the same: decoding absorbs the key and value expansion without rounding it."""
    model = random_model(tiny(initializer_range=0.1), precision="fp8")
    prompts = [[token] for token in range(2, 34)]
    gaps = []
    for prompt, answer in zip(prompts, draw(model, prompts, list(range(32))), strict=True):
        table = logprobs_by_forward(model, prompt, answer.token_ids, 1.0)
        gaps += [
            abs(float(row[token]) - logprob)
            for row, token, logprob in zip(table, answer.token_ids, answer.logprobs, strict=True)
        ]
    assert 0 < sum(gaps) / len(gaps) < 0.1
