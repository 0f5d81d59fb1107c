"""Answer held-out problems with a model, and count which answers are right."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.generation import Sample, Sampling
from configs.delivery import EvaluateConfig
from configs.seed import derive
from stages.evaluate.estimators import Estimate, mean_over_problems, pass_at_k
from stages.prompts import Prompt
from stages.shards import EOS_ID
from stages.verifiers import Problem, verify

_PROMPTS_PER_CALL = 512

Sampler = Callable[[list[list[int]], Sampling, list[int]], list[Sample]]
"""prompts, sampling, a seed for each prompt -> one sample for each prompt."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A problem with a model's answers to it, one verdict an answer."""

    problem: Problem
    answers: tuple[str, ...]
    correct: tuple[bool, ...]


def choose(problems: Sequence[Problem], count: int, *, seed: int) -> list[Problem]:
    """The first `count` of a seeded shuffle, or all of them where there are fewer."""
    order = np.random.default_rng(derive(seed, "evaluate")).permutation(len(problems))
    return [problems[index] for index in order[:count]]


def answer(
    sample: Sampler,
    prompts: Sequence[Prompt],
    config: EvaluateConfig,
    *,
    seed: int,
    answer_text: Callable[[Sequence[int]], str],
) -> Iterator[list[Answered]]:
    """Sample and verify answers to every prompt, some hundred answers at a time.

    Each sample's seed is keyed on its problem's id and its number, so it does not depend on which
    other problems are asked, and two models draw from the same stream. VerifierError passes
    through: an answer that cannot be judged is never counted as wrong.
    """
    each = config.samples_per_problem
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, stop_tokens=(EOS_ID,)
    )
    step = max(1, _PROMPTS_PER_CALL // each)
    for start in range(0, len(prompts), step):
        chunk = prompts[start : start + step]
        asked = [(prompt, index) for prompt in chunk for index in range(each)]
        samples = sample(
            [list(prompt.token_ids) for prompt, _ in asked],
            sampling,
            [derive(seed, "evaluate", prompt.problem.id, index) for prompt, index in asked],
        )
        texts = [answer_text(found.token_ids) for found in samples]
        yield [
            _judge(prompt.problem, texts[place * each : (place + 1) * each])
            for place, prompt in enumerate(chunk)
        ]


def pass_rates(answered: Sequence[Answered], ks: Sequence[int]) -> dict[int, Estimate]:
    """pass@k over the problems, for each k."""
    return {
        k: mean_over_problems(
            [
                pass_at_k(num_samples=len(item.correct), num_correct=sum(item.correct), k=k)
                for item in answered
            ]
        )
        for k in ks
    }


def _judge(problem: Problem, answers: Sequence[str]) -> Answered:
    correct = tuple(verify(problem, text).reward == 1.0 for text in answers)
    return Answered(problem=problem, answers=tuple(answers), correct=correct)
