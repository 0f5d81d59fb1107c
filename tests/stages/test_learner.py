"""GRPO as trainers compute it: what a step does to the policy, and what a rank contributes."""

import pytest
import torch
from torch import Tensor

from configs.rl import GrpoConfig, PosttrainConfig
from model.decode import sample
from model.drawing import Drawing
from model.transformer import Transformer
from stages.posttrain.learner import GrpoLoss, minibatches
from stages.posttrain.objective import token_logprobs
from stages.posttrain.rollout import Rollout, ScoredRollout
from stages.prompts import Prompt
from stages.verifiers import Problem, Verdict
from tests.references import random_model

GROUPS, SIZE, TEMPERATURE = 4, 3, 0.8
LOSS = GrpoLoss(config=GrpoConfig(kl_weight=0.0), temperature=TEMPERATURE)


def rollouts(model: Transformer) -> list[ScoredRollout]:
    """Answers that the model itself drew; the first of each group was right."""
    found = []
    for group in range(GROUPS):
        problem = Problem(id=f"p{group}", prompt="?", answer="!", source="arithmetic")
        prompt = Prompt(problem=problem, token_ids=(0, 10 + group, 20))
        answers = sample(
            model,
            [prompt.token_ids] * SIZE,
            max_new_tokens=5,
            drawing=Drawing(TEMPERATURE),
            stop_tokens={1},
            seeds=[100 * group + index for index in range(SIZE)],
        )
        for index, answer in enumerate(answers):
            reward = float(index == 0)
            rollout = Rollout(
                prompt=prompt,
                token_ids=tuple(answer.token_ids),
                logprobs=tuple(answer.logprobs),
                version=0,
                stopped=answer.stopped,
            )
            verdict = Verdict(reward=reward, reason="")
            found.append(ScoredRollout(rollout, verdict, advantage=reward - 1 / SIZE))
    return found


def batch_of(scored: list[ScoredRollout]) -> dict[str, Tensor]:
    config = PosttrainConfig(steps=1, prompts_per_step=GROUPS, group_size=SIZE)
    (batch,) = minibatches(scored, config)
    return batch


def answer_logprobs(model: Transformer, batch: dict[str, Tensor]) -> Tensor:
    """Log-probability of each whole answer."""
    with torch.no_grad():
        tokens = batch["tokens"]
        found = token_logprobs(model(tokens), tokens, temperature=TEMPERATURE)
    return (found * batch["mask"]).sum(1)


def test_a_step_makes_good_answers_likelier_and_bad_ones_rarer() -> None:
    model = random_model()
    batch = batch_of(rollouts(model))
    before = answer_logprobs(model, batch)
    loss, _ = LOSS(model, batch, LOSS.counts(batch))
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(3e-2 * parameter.grad)
    gain = answer_logprobs(model, batch) - before
    advantages = batch["advantages"]
    assert float(gain[advantages > 0].mean()) > 1e-3
    assert float(gain[advantages > 0].mean()) > float(gain[advantages < 0].mean())
    assert float((gain * advantages).sum()) > 0


def test_the_policy_that_sampled_has_ratio_one_and_masks_nothing() -> None:
    model = random_model()
    batch = batch_of(rollouts(model))
    _, metrics = LOSS(model, batch, LOSS.counts(batch))
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-3)
    assert metrics["clip_share"] == metrics["masked_share"] == 0
    assert "ratio_max" not in metrics  # it would not add up over ranks


def test_another_temperature_is_another_policy() -> None:
    model = random_model()
    batch = batch_of(rollouts(model))
    other = GrpoLoss(config=LOSS.config, temperature=2 * TEMPERATURE)
    _, metrics = other(model, batch, other.counts(batch))
    assert abs(metrics["ratio_mean"] - 1) > 0.05


@torch.no_grad()
def test_ranks_parts_add_up_to_the_whole() -> None:
    model = random_model()
    loss = GrpoLoss(config=GrpoConfig(kl_weight=0.1), temperature=TEMPERATURE)
    batch = batch_of(rollouts(model))
    batch["reference_logprobs"] = batch["behaviour_logprobs"] - 0.1
    totals = loss.counts(batch)
    whole, metrics = loss(model, batch, totals)
    parts = [{name: t[part] for name, t in batch.items()} for part in (slice(5), slice(5, None))]
    assert sum(loss.counts(part)["sequences"] for part in parts) == totals["sequences"] == 12
    values, reports = zip(*(loss(model, part, totals) for part in parts), strict=True)
    assert float(sum(values)) == pytest.approx(float(whole.detach()), rel=1e-4, abs=1e-6)
    assert metrics["kl"] > 0
    for name in metrics:
        assert sum(r[name] for r in reports) == pytest.approx(metrics[name], rel=1e-4, abs=1e-6)


def test_a_group_of_equal_rewards_contributes_no_gradient() -> None:
    model = random_model()
    batch = batch_of(rollouts(model))
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    loss, _ = LOSS(model, batch, LOSS.counts(batch))
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert not any(bool(grad.any()) for grad in grads)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_minibatches_keep_groups_whole_and_drop_nothing(parts: int) -> None:
    scored = rollouts(random_model())
    config = PosttrainConfig(steps=1, prompts_per_step=GROUPS, group_size=SIZE, minibatches=parts)
    batches = list(minibatches(scored, config))
    assert [len(batch["tokens"]) for batch in batches] == [12 // parts] * parts
    for batch in batches:
        groups = batch["advantages"].view(-1, SIZE)
        torch.testing.assert_close(groups.sum(1), torch.zeros(len(groups)))
    prompts = [int(row[1]) for batch in batches for row in batch["tokens"]]
    assert prompts == [10 + group for group in range(GROUPS) for _ in range(SIZE)]
