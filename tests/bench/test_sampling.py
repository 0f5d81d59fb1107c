"""Sampling speed beside transformers' own DeepSeek-V3: the same weights, prompts and threads.

    python -m tests.bench.test_sampling

One process lets both models continue the same prompts in turn, so that whatever else the machine
does meets both. Both draw from the whole softmax, in float32, with caches, and never stop early; a
run is prefill and all draws. transformers runs with the experts and the attention that are quickest
here. The test starts a process of its own, because the suite checks shapes at every call of our
model.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from configs.model import V3Config
from model.decode import generate
from model.transformer import Transformer
from tests.bench import machine
from tests.bench.test_against_transformers import SHAPES, THREADS, run_apart, theirs
from tests.model.transformers_twin import continued

pytestmark = pytest.mark.slow

TARGET = 5.0
FLOOR = 1.8
"""A ratio that no noise explains: below it something has become slow."""
ROWS, PROMPT, NEW, ROUNDS = 64, 32, 96, 5
CHOICES = list(itertools.product(("grouped_mm", "batched_mm", "eager"), ("sdpa", "eager")))
"""transformers' experts and attention."""

Continue = Callable[[Tensor, int], Tensor]
"""(prompts [B, S], new tokens) -> [B, S + new tokens], drawn at temperature 1."""


def their_sampling(model: nn.Module) -> Continue:
    return partial(continued, model, do_sample=True, top_k=0, use_cache=True)


def our_sampling(model: Transformer) -> Continue:
    return lambda tokens_BS, new: generate(model, tokens_BS, max_new_tokens=new, temperature=1.0)


def seconds(sampling: Continue, tokens_BS: Tensor, new: int) -> float:
    begin = time.perf_counter()
    answers = sampling(tokens_BS, new)
    taken = time.perf_counter() - begin
    assert answers.shape == (len(tokens_BS), tokens_BS.shape[1] + new)
    return taken


def quickest(config: V3Config, tokens_BS: Tensor) -> tuple[str, str]:
    """(experts, attention) with which transformers takes least time here."""
    taken: dict[tuple[str, str], list[float]] = {choice: [] for choice in CHOICES}
    models: dict[tuple[str, str], nn.Module] = {
        choice: theirs(config, *choice) for choice in CHOICES
    }
    samplings = {choice: their_sampling(model.eval()) for choice, model in models.items()}
    for _ in range(2):
        for choice, sampling in samplings.items():
            taken[choice].append(seconds(sampling, tokens_BS, 6))
    return min(CHOICES, key=lambda choice: min(taken[choice]))


def compare(config: V3Config) -> tuple[float, float, float]:
    """Seconds of our run and of theirs, and their ratio: medians over rounds, a first not counted.

    Both must give the prompts the same logits.
    """
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(config.vocab_size, (ROWS, PROMPT), generator=generator)
    reference = theirs(config, *quickest(config, tokens_BS))
    reference.eval()
    model = Transformer(config).eval()
    model.load_state_dict(reference.state_dict())
    with torch.inference_mode():
        difference = (model(tokens_BS[:2]) - reference(tokens_BS[:2]).logits).abs().max()
    assert float(difference) < 1e-4, f"the models differ: {difference}"
    samplings = {"ours": our_sampling(model), "theirs": their_sampling(reference)}
    taken: dict[str, list[float]] = {name: [] for name in samplings}
    for _ in range(ROUNDS + 1):
        for name, sampling in samplings.items():
            taken[name].append(seconds(sampling, tokens_BS, NEW))
    ours, others = taken["ours"][1:], taken["theirs"][1:]
    ratios = [b / a for a, b in zip(ours, others, strict=True)]
    return statistics.median(ours), statistics.median(others), statistics.median(ratios)


def main() -> float:
    """Print the table; the least of the ratios."""
    torch.set_num_threads(THREADS)
    tokens, least = ROWS * NEW, float("inf")
    print(machine.describe())
    print(f"sampling {NEW} tokens after {PROMPT}, float32, {THREADS} threads, batch {ROWS},")
    print(f"{'new tokens/s:':26}{'Ingot':>8}{'transformers':>14}{'ratio':>7}")
    for name, config in SHAPES.items():
        ours, others, ratio = compare(config)
        print(f"{name:26}{tokens / ours:8,.0f}{tokens / others:14,.0f}{ratio:7.2f}", flush=True)
        least = min(least, ratio)
    print(f"target {TARGET}: {'met' if least >= TARGET else f'short by {TARGET - least:.2f}'}")
    return least


def test_sampling_takes_less_time_than_that_of_transformers() -> None:
    run_apart("test_sampling")


if __name__ == "__main__":
    sys.exit(main() < FLOOR)
