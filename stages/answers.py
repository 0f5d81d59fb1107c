"""Asks a model problems, and counts which answers are right: greedily, and sampled.

Evaluation asks checkpoints this way, post-training its policy now and then, and export what a
bundle answers through its own files.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cluster.generation import Sampling
from configs.seed import derive
from model import decode
from model.drawing import Drawing
from model.transformer import Transformer
from stages.estimators import Estimate, mean_over_problems, pass_at_k
from stages.prompts import Prompt
from stages.verifiers import Problem, verify

_PROMPTS_PER_CALL = 512


class Drawn(Protocol):
    """What a sampler returns for a prompt."""

    @property
    def token_ids(self) -> Sequence[int]:
        """The answer, the token that ends it included if it was reached."""


Sampler = Callable[[list[list[int]], Sampling, list[int]], Sequence[Drawn]]
"""prompts, sampling, a seed for each prompt -> one answer for each prompt."""
_ROWS = 128
"""Answers that a model in this process works on at a time; their caches are in memory together."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A problem with a model's answers to it."""

    problem: Problem
    greedy: str
    """What the model answers if it always takes the likeliest token."""
    greedy_correct: bool
    answers: tuple[str, ...]
    """Sampled."""
    correct: tuple[bool, ...]
    """One verdict a sampled answer."""


def sampler_of(model: Transformer) -> Sampler:
    """Answers by a model in this process."""

    def sample(
        prompts: list[list[int]], sampling: Sampling, seeds: list[int]
    ) -> Sequence[decode.Sample]:
        return decode.sample(
            model,
            prompts,
            max_new_tokens=sampling.max_new_tokens,
            drawing=Drawing(sampling.temperature, sampling.top_k, sampling.top_p),
            stop_tokens=sampling.stop_tokens,
            seeds=seeds,
            max_rows=_ROWS,
        )

    return sample


def choose(problems: Sequence[Problem], count: int, *, seed: int) -> list[Problem]:
    """The first `count` of a seeded shuffle, or all of them where there are fewer."""
    order = np.random.default_rng(derive(seed, "evaluate")).permutation(len(problems))
    return [problems[index] for index in order[:count]]


def ask(
    sample: Sampler,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    samples_per_problem: int,
    seed: int,
    answer_text: Callable[[Sequence[int]], str],
) -> Iterator[list[Answered]]:
    """One greedy answer and some sampled ones to every prompt, verified; some hundred at a time.

    Each sample's seed is keyed on its problem's id and its number, so it does not depend on which
    other problems are asked, and two models draw from the same stream. VerifierError passes
    through: an answer that cannot be judged is never counted as wrong.
    """
    each = samples_per_problem
    greedy = Sampling(sampling.max_new_tokens, 0.0, sampling.stop_tokens)
    step = max(1, _PROMPTS_PER_CALL // each)
    for start in range(0, len(prompts), step):
        chunk = prompts[start : start + step]
        asked = [(prompt, index) for prompt in chunk for index in range(each)]
        firm = sample([list(one.token_ids) for one in chunk], greedy, [0] * len(chunk))
        drawn = sample(
            [list(prompt.token_ids) for prompt, _ in asked],
            sampling,
            [derive(seed, "evaluate", prompt.problem.id, index) for prompt, index in asked],
        )
        texts = [answer_text(found.token_ids) for found in drawn]
        yield [
            _judge(
                prompt.problem,
                answer_text(firm[place].token_ids),
                texts[place * each : (place + 1) * each],
            )
            for place, prompt in enumerate(chunk)
        ]


def greedy_accuracy(answered: Sequence[Answered]) -> Estimate:
    """The share of problems that the model gets right if it takes the likeliest tokens."""
    return mean_over_problems([float(item.greedy_correct) for item in answered])


def pass_values(answered: Sequence[Answered], k: int) -> list[float]:
    """pass@k of each problem."""
    return [
        pass_at_k(num_samples=len(item.correct), num_correct=sum(item.correct), k=k)
        for item in answered
    ]


def all_right_values(answered: Sequence[Answered]) -> list[float]:
    """Of each problem, 1 if every one of its sampled answers is right, else 0."""
    return [float(all(item.correct)) for item in answered]


def _judge(problem: Problem, greedy: str, answers: Sequence[str]) -> Answered:
    return Answered(
        problem=problem,
        greedy=greedy,
        greedy_correct=verify(problem, greedy).reward == 1.0,
        answers=tuple(answers),
        correct=tuple(verify(problem, text).reward == 1.0 for text in answers),
    )
