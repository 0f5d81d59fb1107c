"""Rollouts: grouping, scoring, staleness, and the alignment of a batch."""

from collections.abc import Sequence

import pytest
import torch

from cluster.generation import Sample
from configs.errors import TrainingError, VerifierError
from stages.posttrain.objective import advantages, token_logprobs
from stages.posttrain.rollout import Rollout, check_staleness, collate, group_rollouts, score
from stages.prompts import Prompt
from stages.verifiers import Problem


def prompt(answer: str, *token_ids: int, source: str = "arithmetic") -> Prompt:
    problem = Problem(id=f"p/{answer}", prompt="?", answer=answer, source=source)
    return Prompt(problem=problem, token_ids=token_ids)


def sample(*token_ids: int, version: int = 3) -> Sample:
    logprobs = [-0.25 * token for token in token_ids]
    return Sample(token_ids=list(token_ids), logprobs=logprobs, version=version, stopped=True)


def spell(token_ids: Sequence[int]) -> str:
    return "".join(map(str, token_ids))


PROMPTS = [prompt("78", 0, 5, 6), prompt("9", 0, 4)]
SAMPLES = [sample(7, 8), sample(7), sample(9), sample(9)]


def test_samples_join_the_prompt_they_answer() -> None:
    groups = group_rollouts(PROMPTS, SAMPLES, group_size=2)
    assert [[item.prompt for item in group] for group in groups] == [[p, p] for p in PROMPTS]
    assert [[item.token_ids for item in group] for group in groups] == [[(7, 8), (7,)], [(9,)] * 2]
    assert groups[0][0].logprobs == (-1.75, -2.0)


def test_missing_answers_are_an_error_with_both_numbers() -> None:
    with pytest.raises(TrainingError, match="3 answers to 2 prompts, not 2 each"):
        group_rollouts(PROMPTS, SAMPLES[:3], group_size=2)


@pytest.mark.parametrize(
    "broken",
    [
        Sample(token_ids=[], logprobs=[], version=0, stopped=False),
        Sample(token_ids=[4, 5], logprobs=[-1.0], version=0, stopped=False),
    ],
)
def test_an_answer_without_a_logprob_for_each_token_is_an_error(broken: Sample) -> None:
    with pytest.raises(TrainingError, match="log-probabilities"):
        group_rollouts(PROMPTS[:1], [broken], group_size=1)


def test_scores_compare_an_answer_with_its_own_group_only() -> None:
    groups = group_rollouts(PROMPTS, SAMPLES, group_size=2)
    scored = score(groups, answer_text=spell, advantages=advantages)
    assert [item.rollout for item in scored] == [item for group in groups for item in group]
    assert [item.verdict.reward for item in scored] == [1.0, 0.0, 1.0, 1.0]
    assert [item.advantage for item in scored] == [0.5, -0.5, 0.0, 0.0]


def test_a_reward_that_cannot_be_computed_is_an_error_not_a_zero() -> None:
    groups = group_rollouts([prompt("1", 0, source="chess")], [sample(1)], group_size=1)
    with pytest.raises(VerifierError):
        score(groups, answer_text=spell, advantages=advantages)


@pytest.mark.parametrize(("version", "refused"), [(0, True), (1, False), (3, False), (4, True)])
def test_a_rollout_past_the_staleness_bound_is_refused(version: int, refused: bool) -> None:
    rollout = Rollout(
        prompt=PROMPTS[0], token_ids=(7,), logprobs=(-1.0,), version=version, stopped=True
    )
    if not refused:
        check_staleness([rollout], policy_version=3, max_staleness=2)
        return
    message = rf"version {version}, but the policy is at version 3 .* at most 2 versions"
    with pytest.raises(TrainingError, match=message):
        check_staleness([rollout], policy_version=3, max_staleness=2)


def test_a_batch_holds_each_answers_numbers_where_they_are_predicted() -> None:
    scored = score(
        group_rollouts(PROMPTS, SAMPLES, group_size=2), answer_text=spell, advantages=advantages
    )[:3]
    batch = collate(scored, pad_id=99)
    assert batch.tokens_NT.tolist() == [[0, 5, 6, 7, 8], [0, 5, 6, 7, 99], [0, 4, 9, 99, 99]]
    assert batch.tokens_NT.dtype == torch.int64
    no, yes = False, True
    assert batch.mask_NT.tolist() == [
        [no, no, yes, yes, no],
        [no, no, yes, no, no],
        [no, yes, no, no, no],
    ]
    assert batch.behaviour_logprobs_NT.tolist() == [
        [0, 0, -1.75, -2.0, 0],
        [0, 0, -1.75, 0, 0],
        [0, -2.25, 0, 0, 0],
    ]
    assert batch.advantages_N.tolist() == [0.5, -0.5, 0.0]


def test_an_unchanged_policy_agrees_with_its_own_sampler_on_every_answer_token() -> None:
    """Sampler and trainer read one table of next-token logits; a shift by one would show."""
    table_VV = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    samples = []
    for source, drawn in zip(PROMPTS, ([7, 8, 1], [9, 1]), strict=True):
        before = [source.token_ids[-1], *drawn[:-1]]
        logprobs = [
            float((table_VV[last] / 0.7).log_softmax(-1)[token])
            for last, token in zip(before, drawn, strict=True)
        ]
        samples.append(Sample(token_ids=drawn, logprobs=logprobs, version=0, stopped=True))
    scored = score(
        group_rollouts(PROMPTS, samples, group_size=1), answer_text=spell, advantages=advantages
    )
    batch = collate(scored, pad_id=1)
    logits_NTV = table_VV[batch.tokens_NT]
    found_NT = token_logprobs(logits_NTV, batch.tokens_NT, temperature=0.7)
    torch.testing.assert_close(found_NT[batch.mask_NT], batch.behaviour_logprobs_NT[batch.mask_NT])
    assert int(batch.mask_NT.sum()) == 5
