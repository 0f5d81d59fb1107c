"""GRPO as trainers compute it: what a step does to the policy, and what a rank contributes.

The loss and its gradient are compared with the paper's equation in float64 (`rl_paper.py`).
"""

from collections.abc import Collection

import pytest
import torch
from torch import Tensor

from configs.rl import GrpoConfig, PosttrainConfig
from model.decode import sample
from model.drawing import Drawing
from model.transformer import Transformer
from stages.framing import EOS_ID
from stages.posttrain.learner import Grpo, GrpoLoss, NextTokenLogprobs, minibatches
from stages.posttrain.objective import token_logprobs
from stages.posttrain.rollout import Rollout, ScoredRollout
from stages.prompts import Prompt
from stages.verifiers import Problem, Verdict
from tests.losses import part_of
from tests.references import random_model
from tests.stages.rl_paper import Answered, logprobs_of, objective

GROUPS, SIZE, TEMPERATURE = 4, 3, 0.8
LOSS = GrpoLoss(config=GrpoConfig(kl_weight=0.0), temperature=TEMPERATURE)


def rollouts(model: Transformer, stop_tokens: Collection[int] = (EOS_ID,)) -> list[ScoredRollout]:
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
            stop_tokens=stop_tokens,
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
    loss, _ = part_of(LOSS, model, batch)
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
    _, metrics = part_of(LOSS, model, batch)
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-3)
    assert metrics["clip_share"] == metrics["masked_share"] == 0
    assert "ratio_max" not in metrics  # it would not add up over ranks


def test_another_temperature_is_another_policy() -> None:
    model = random_model()
    batch = batch_of(rollouts(model))
    other = GrpoLoss(config=LOSS.config, temperature=2 * TEMPERATURE)
    _, metrics = part_of(other, model, batch)
    assert abs(metrics["ratio_mean"] - 1) > 0.05


@torch.no_grad()
def test_ranks_parts_add_up_to_the_whole() -> None:
    model = random_model()
    loss = GrpoLoss(config=GrpoConfig(kl_weight=0.1), temperature=TEMPERATURE)
    batch = batch_of(rollouts(model))
    batch["reference_logprobs"] = batch["behaviour_logprobs"] - 0.1
    totals = loss.counts(batch)
    whole, metrics = part_of(loss, model, batch, totals)
    parts = [{name: t[part] for name, t in batch.items()} for part in (slice(5), slice(5, None))]
    assert sum(loss.counts(part)["sequences"] for part in parts) == totals["sequences"] == 12
    values, reports = zip(*(part_of(loss, model, part, totals) for part in parts), strict=True)
    assert float(sum(values)) == pytest.approx(float(whole.detach()), rel=1e-4, abs=1e-6)
    assert metrics["kl"] > 0
    for name in metrics:
        assert sum(r[name] for r in reports) == pytest.approx(
            float(metrics[name]), rel=1e-4, abs=1e-6
        )


def test_a_group_of_equal_rewards_contributes_no_gradient() -> None:
    model = random_model()
    batch = batch_of(rollouts(model))
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    loss, _ = part_of(LOSS, model, batch)
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


CONFIG = GrpoConfig(clip_epsilon=0.1, kl_weight=0.3, off_policy_delta=0.2)
PAPER = {"temperature": TEMPERATURE, "epsilon": 0.1, "beta": 0.3, "delta": 0.2}


def moved(model: Transformer, *, seed: int) -> Transformer:
    """The model after some learning that nobody did."""
    other = random_model()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for (_, mine), (_, theirs) in zip(
            other.named_parameters(), model.named_parameters(), strict=True
        ):
            mine.copy_(theirs + 0.02 * torch.randn(mine.shape, generator=generator))
    return other


def off_policy_case() -> tuple[Transformer, dict[str, Tensor], list[list[Answered]]]:
    """A policy apart from sampler and reference, a batch, and the batch as the paper has it."""
    sampler = random_model()
    # One token in three ends an answer, so that they differ in length.
    scored = rollouts(sampler, range(EOS_ID, 64, 3))
    batch = batch_of(scored)
    policy, reference = moved(sampler, seed=1), moved(sampler, seed=2)
    with torch.no_grad():
        batch["reference_logprobs"] = NextTokenLogprobs(TEMPERATURE)(reference, batch)
    answered = [
        Answered(
            item.rollout.prompt.token_ids,
            item.rollout.token_ids,
            item.rollout.logprobs,
            logprobs_of(
                reference, item.rollout.prompt.token_ids, item.rollout.token_ids, TEMPERATURE
            ),
            item.verdict.reward,
        )
        for item in scored
    ]
    groups = [answered[at : at + SIZE] for at in range(0, len(answered), SIZE)]
    assert len({len(one.answer) for one in answered}) > 1, "nothing is padded"
    return policy, batch, groups


def test_the_loss_and_its_gradient_are_those_of_the_papers_objective() -> None:
    policy, batch, groups = off_policy_case()
    loss = GrpoLoss(CONFIG, TEMPERATURE)
    value, metrics = part_of(loss, policy, batch)
    value.backward()
    assert 0 < metrics["clip_share"] < 1
    assert 0 < metrics["masked_share"] < 0.5
    exact = moved(random_model(), seed=1).double()
    assert value.item() == pytest.approx(-objective(groups, exact, **PAPER), rel=1e-5)

    # Slopes of the equation along random directions of each parameter, in float64.
    generator, step = torch.Generator().manual_seed(3), 1e-6
    grads = {name: parameter.grad for name, parameter in policy.named_parameters()}
    learned = [one for one in exact.named_parameters() if grads[one[0]] is not None]
    assert len(learned) > 20
    for name, leaf in learned[::3]:
        grad = grads[name]
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        start, values = leaf.detach().clone(), []
        for sign in (1, -1):
            with torch.no_grad():
                leaf.copy_(start + sign * step * direction)
            values.append(-objective(groups, exact, **PAPER))
        with torch.no_grad():
            leaf.copy_(start)
        slope = (values[0] - values[1]) / (2 * step)
        assert grad is not None
        found = float((grad.double() * direction).sum())
        scale = float(grad.double().norm() * direction.norm()) / leaf.numel() ** 0.5
        assert found == pytest.approx(slope, rel=1e-3, abs=1e-3 * scale), name


def test_what_stands_in_padding_changes_neither_loss_nor_gradient() -> None:
    policy, batch, _ = off_policy_case()
    loss = GrpoLoss(CONFIG, TEMPERATURE)

    def gradient(batch: dict[str, Tensor]) -> tuple[float, Tensor]:
        policy.zero_grad()
        value, _ = part_of(loss, policy, batch)
        value.backward()
        grads = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
        return value.item(), torch.cat(grads)

    clean, expected = gradient(batch)
    mask = batch["mask"]
    shown = mask.clone()
    shown[:, 1:] |= mask[:, :-1]  # the token that is predicted at a position stands after it
    shown[:, :3] = True
    padding = ~shown
    assert padding.any()
    generator = torch.Generator().manual_seed(4)
    rubbish = torch.randint(2, 64, batch["tokens"].shape, generator=generator)
    wrong = dict(batch)
    wrong["tokens"] = torch.where(padding, rubbish, batch["tokens"])
    for name in ("behaviour_logprobs", "reference_logprobs"):
        wrong[name] = torch.where(mask, batch[name], -7.0)
    longer = {
        "tokens": torch.cat([wrong["tokens"], rubbish[:, :3]], 1),
        "mask": torch.nn.functional.pad(mask, (0, 3)),
        "advantages": wrong["advantages"],
        **{
            name: torch.nn.functional.pad(wrong[name], (0, 3), value=9.0)
            for name in ("behaviour_logprobs", "reference_logprobs")
        },
    }
    for other in (wrong, longer):
        found, grads = gradient(other)
        assert found == pytest.approx(clean, rel=1e-5)
        torch.testing.assert_close(grads, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.05])
def test_the_algorithm_has_a_reference_where_its_loss_uses_one(weight: float) -> None:
    config = GrpoConfig(kl_weight=weight)
    algorithm = Grpo(config, TEMPERATURE)
    assert algorithm.loss == GrpoLoss(config, TEMPERATURE)
    assert algorithm.reference == (NextTokenLogprobs(TEMPERATURE) if weight else None)
    assert algorithm.advantages([1.0, 0.0, 0.0]) == pytest.approx([2 / 3, -1 / 3, -1 / 3])
