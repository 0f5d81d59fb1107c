"""GRPO's objective against a plain loop, finite differences, enumeration and hand-worked cases."""

import math

import pytest
import torch
from torch import Tensor

from configs.errors import TrainingError
from configs.rl import GrpoConfig
from stages.posttrain.learner import GrpoLoss
from stages.posttrain.objective import advantages, grpo_loss, token_logprobs

CONFIG = GrpoConfig(clip_epsilon=0.2, kl_weight=0.05, off_policy_delta=0.5)
PURE = GrpoConfig(clip_epsilon=0.2, kl_weight=0.0, off_policy_delta=0.5)


def reference_loss(
    policy: Tensor, behaviour: Tensor, reference: Tensor, gains: Tensor, mask: Tensor
) -> float:
    """-J of CONFIG, read off the paper token by token."""
    total = 0.0
    for i in range(len(policy)):
        answer = [t for t in range(policy.shape[1]) if mask[i, t]]
        gap = sum(float(behaviour[i, t] - policy[i, t]) for t in answer) / len(answer)
        keep = 0.0 if gains[i] < 0 and gap > CONFIG.off_policy_delta else 1.0
        for t in answer:
            r = math.exp(float(policy[i, t] - behaviour[i, t]))
            q = math.exp(float(reference[i, t] - policy[i, t]))
            clipped = min(max(r, 1 - CONFIG.clip_epsilon), 1 + CONFIG.clip_epsilon)
            gain = keep * min(r * float(gains[i]), clipped * float(gains[i]))
            total += (gain - CONFIG.kl_weight * r * (q - math.log(q) - 1)) / len(answer)
    return -total / len(policy)


def random_case(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Six sequences of unequal length; some ratios clipped, some sequences masked."""
    generator = torch.Generator().manual_seed(seed)
    policy = -3 * torch.rand(6, 7, generator=generator, dtype=torch.float64)
    behaviour = policy + 0.4 * torch.randn(6, 7, generator=generator, dtype=torch.float64)
    behaviour[:2] += 0.9
    reference = policy + 0.5 * torch.randn(6, 7, generator=generator, dtype=torch.float64)
    gains = torch.tensor([-0.5, 0.5, 0.25, -0.75, 0.0, 0.5], dtype=torch.float64)
    lengths = torch.tensor([5, 6, 1, 2, 6, 3])
    mask = (torch.arange(7) >= 1) & (torch.arange(7) < 1 + lengths[:, None])
    return policy, behaviour, reference, gains, mask


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_is_the_papers_formula(seed: int) -> None:
    case = random_case(seed)
    loss, metrics = grpo_loss(*case, config=CONFIG, num_sequences=6)
    assert float(loss) == pytest.approx(reference_loss(*case), rel=1e-12)
    assert metrics["masked_share"] > 0
    assert metrics["clip_share"] > 0


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_that_of_finite_differences(seed: int) -> None:
    policy, *rest = random_case(seed)
    leaf = policy.clone().requires_grad_()
    loss, _ = grpo_loss(leaf, *rest, config=CONFIG, num_sequences=6)
    loss.backward()
    assert leaf.grad is not None
    step = 1e-6
    for i in range(6):
        for t in range(7):
            nudge = torch.zeros_like(policy)
            nudge[i, t] = step
            slope = reference_loss(policy + nudge, *rest) - reference_loss(policy - nudge, *rest)
            assert float(leaf.grad[i, t]) == pytest.approx(slope / (2 * step), abs=1e-7)


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "slope"),
    [
        (1.0, 1.0, 1.0, 1.0),
        (1.5, 1.0, 1.2, 0.0),  # a good token made likelier than allowed: no further
        (0.7, 1.0, 0.7, 0.7),  # a good token made rarer: push back up
        (1.5, -1.0, -1.5, -1.5),  # a bad token made likelier: push back down
        (0.7, -1.0, -0.8, 0.0),  # a bad token made rarer than allowed: no further
    ],
)
def test_the_clip_stops_only_what_went_too_far(
    ratio: float, advantage: float, objective: float, slope: float
) -> None:
    policy = torch.tensor([[math.log(ratio) - 1]], dtype=torch.float64, requires_grad=True)
    behaviour = torch.tensor([[-1.0]], dtype=torch.float64)
    gains, mask = torch.tensor([advantage], dtype=torch.float64), torch.tensor([[True]])
    loss, metrics = grpo_loss(
        policy, behaviour, behaviour, gains, mask, config=PURE, num_sequences=1
    )
    loss.backward()
    assert policy.grad is not None
    assert -loss.item() == pytest.approx(objective)
    assert float(-policy.grad) == pytest.approx(slope)  # d objective / d log pi
    assert metrics["clip_share"] == (slope == 0.0)
    assert metrics["ratio_mean"] == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("advantage", "gap", "masked"),
    [(-1.0, 0.6, True), (-1.0, 0.4, False), (-1.0, -0.6, False), (1.0, 0.6, False)],
)
def test_only_bad_answers_that_the_policy_left_behind_are_masked(
    advantage: float, gap: float, masked: bool
) -> None:
    # Token gaps of 0 and 2 * gap: it is their mean that counts.
    behaviour = torch.tensor([[-0.5, -0.5]])
    policy = (behaviour - torch.tensor([[0.0, 2 * gap]])).requires_grad_()
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, metrics = grpo_loss(
        policy, behaviour, behaviour, torch.tensor([advantage]), mask, config=PURE, num_sequences=1
    )
    loss.backward()
    assert policy.grad is not None
    assert metrics["masked_share"] == masked
    assert bool((policy.grad == 0).all()) == masked


def test_a_masked_answer_is_still_held_to_the_reference() -> None:
    behaviour, reference = torch.tensor([[-0.5]]), torch.tensor([[-0.1]])
    policy = torch.tensor([[-1.5]], requires_grad=True)
    gains, mask = torch.tensor([-1.0]), torch.tensor([[True]])
    loss, _ = grpo_loss(policy, behaviour, reference, gains, mask, config=CONFIG, num_sequences=1)
    r, d = math.exp(-1.0), 1.4
    assert loss.item() == pytest.approx(CONFIG.kl_weight * r * (math.exp(d) - d - 1))


@pytest.mark.parametrize("on_policy", [True, False])
def test_the_kl_term_is_the_true_kl_and_so_is_its_gradient(on_policy: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
    other = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
    behaviour = logits.detach().log_softmax(0) if on_policy else other
    policy = logits.log_softmax(0)
    true_kl = (policy.exp() * (policy - reference)).sum()
    (true_gradient,) = torch.autograd.grad(true_kl, logits, retain_graph=True)

    config = GrpoConfig(kl_weight=1.0)
    zero, mask = torch.zeros(1, dtype=torch.float64), torch.tensor([[True]])
    expected = torch.zeros((), dtype=torch.float64)
    for token in range(5):  # the exact expectation over what the sampler may draw
        at = slice(token, token + 1)
        one = policy[at][None], behaviour[at][None], reference[at][None], zero, mask
        loss, _ = grpo_loss(*one, config=config, num_sequences=1)
        expected = expected + behaviour[token].exp() * loss
    (gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(expected, true_kl)
    torch.testing.assert_close(gradient, true_gradient)


def test_the_kl_pulls_nowhere_when_policy_sampler_and_reference_agree() -> None:
    policy = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    same, mask = policy.detach(), torch.ones(1, 2, dtype=torch.bool)
    loss, metrics = grpo_loss(
        policy, same, same, torch.zeros(1), mask, config=GrpoConfig(kl_weight=1.0), num_sequences=1
    )
    loss.backward()
    assert policy.grad is not None
    assert metrics["kl"] == 0
    assert policy.grad.tolist() == [[0.0, 0.0]]


def test_advantages_are_rewards_less_their_mean() -> None:
    assert advantages([1.0, 0.0, 0.0, 1.0, 0.0]) == pytest.approx([0.6, -0.4, -0.4, 0.6, -0.4])
    assert math.fsum(advantages([0.3, 0.1, 1.0, 0.7])) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0])
def test_a_group_of_equal_rewards_contributes_no_gradient(reward: float) -> None:
    policy, behaviour, reference, _, mask = random_case(0)
    policy.requires_grad_()
    gains = torch.tensor(advantages([reward] * 6), dtype=torch.float64)
    loss, _ = grpo_loss(policy, behaviour, reference, gains, mask, config=PURE, num_sequences=6)
    loss.backward()
    assert policy.grad is not None
    assert bool((policy.grad == 0).all())


def test_losses_gradients_and_metrics_of_shards_add_up_to_the_whole() -> None:
    case = random_case(2)
    leaf = case[0].clone().requires_grad_()
    whole, metrics = grpo_loss(leaf, *case[1:], config=CONFIG, num_sequences=6)
    whole.backward()
    parts = []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        policy, *rest = (tensor[rows] for tensor in case)
        policy = policy.clone().requires_grad_()
        loss, part = grpo_loss(policy, *rest, config=CONFIG, num_sequences=6)
        loss.backward()
        parts.append((loss.detach(), policy.grad, part))
    losses, gradients, shares = zip(*parts, strict=True)
    torch.testing.assert_close(sum(losses), whole.detach())
    torch.testing.assert_close(torch.cat(gradients), leaf.grad)
    for name in metrics.keys() - {"ratio_max"}:
        assert sum(share[name] for share in shares) == pytest.approx(metrics[name])
    assert max(share["ratio_max"] for share in shares) == metrics["ratio_max"]


def test_padding_and_filler_rows_are_never_read() -> None:
    policy, behaviour, reference, gains, mask = random_case(3)
    clean, _ = grpo_loss(policy, behaviour, reference, gains, mask, config=CONFIG, num_sequences=6)
    rubbish = [
        torch.cat([torch.where(mask, tensor, wrong), torch.full((1, 7), wrong)])
        for tensor, wrong in ((policy, math.nan), (behaviour, -math.inf), (reference, 1e9))
    ]
    leaf, behaviour, reference = rubbish
    leaf.requires_grad_()
    longer = torch.cat([mask, torch.zeros(1, 7, dtype=torch.bool)])
    more = torch.cat([gains, torch.tensor([-1.0])])
    loss, _ = grpo_loss(leaf, behaviour, reference, more, longer, config=CONFIG, num_sequences=6)
    loss.backward()
    assert leaf.grad is not None
    torch.testing.assert_close(loss, clean)
    assert bool((leaf.grad[~longer] == 0).all())


@pytest.mark.parametrize("name", ["behaviour_logprobs", "reference_logprobs"])
def test_a_number_that_is_not_finite_is_an_error_that_names_its_place(name: str) -> None:
    policy, behaviour, reference, gains, mask = random_case(0)
    batch = {"tokens": policy, "mask": mask, "advantages": gains}
    batch |= {"behaviour_logprobs": behaviour, "reference_logprobs": reference}
    assert GrpoLoss(CONFIG, 1.0).counts(batch) == {"sequences": 6.0}
    batch[name][3, 2] = math.nan
    with pytest.raises(TrainingError, match=rf"^{name} is nan at sequence 3, position 2"):
        GrpoLoss(CONFIG, 1.0).counts(batch)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("config", [CONFIG, PURE], ids=["kl", "pure"])
def test_a_policy_that_is_not_finite_shows_in_the_loss(value: float, config: GrpoConfig) -> None:
    case = random_case(0)
    case[0][3, 2] = value
    loss, _ = grpo_loss(*case, config=config, num_sequences=6)
    assert not loss.isfinite()


def test_a_ratio_beyond_the_number_format_shows_in_the_metrics() -> None:
    policy, behaviour = torch.tensor([[0.0]]), torch.tensor([[-200.0]])
    mask = torch.tensor([[True]])
    _, metrics = grpo_loss(
        policy, behaviour, policy, torch.ones(1), mask, config=PURE, num_sequences=1
    )
    assert metrics["ratio_mean"] == metrics["ratio_max"] == math.inf


def test_token_logprobs_are_of_the_next_token_at_the_samplers_temperature() -> None:
    logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[1, 5, 0, 2], [3, 3, 4, 1]])
    found = token_logprobs(logits, tokens, temperature=0.5)
    for i in range(2):
        for t in range(3):
            weights = (logits[i, t].double() / 0.5).exp()
            expected = math.log(weights[tokens[i, t + 1]] / weights.sum())
            assert float(found[i, t]) == pytest.approx(expected, abs=1e-5)
    assert found[:, 3].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("better", [0, 1])
def test_one_step_on_a_two_armed_bandit_raises_the_reward(better: int) -> None:
    logits = torch.tensor([0.3, -0.2], requires_grad=True)
    arms = torch.multinomial(
        logits.detach().softmax(0), 16, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    assert 0 < int(arms.sum()) < 16
    gains = torch.tensor(advantages([float(arm == better) for arm in arms.tolist()]))
    policy = logits.log_softmax(0)[arms][:, None]
    same, mask = policy.detach(), torch.ones(16, 1, dtype=torch.bool)
    loss, _ = grpo_loss(policy, same, same, gains, mask, config=CONFIG, num_sequences=16)
    loss.backward()
    assert logits.grad is not None
    stepped = logits.detach() - logits.grad
    assert stepped.softmax(0)[better] > logits.softmax(0)[better] + 0.01
