"""Load balance: what the bias does over steps, and the sequence-wise loss by its formula."""

import math

import pytest
import torch
from torch import Tensor, nn

from model.balance import imbalance, sequence_balance_loss, updated_bias
from model.moe import Gate
from tests.references import tiny


def test_an_overloaded_expert_is_lowered_and_an_idle_one_raised() -> None:
    bias = torch.tensor([0.5, 0.0, -0.5, 0.0])
    moved = updated_bias(bias, torch.tensor([10.0, 4.0, 0.0, 2.0]), 0.125)
    assert moved.tolist() == [0.34375, -0.03125, -0.40625, 0.09375]  # 1 / 32 less each
    assert bias.tolist() == [0.5, 0.0, -0.5, 0.0]


def test_a_skewed_router_is_flattened_within_two_hundred_steps() -> None:
    gate = Gate(tiny(n_group=1, topk_group=1))
    generator = torch.Generator().manual_seed(0)
    nn.init.normal_(gate.weight, std=0.1, generator=generator)
    with torch.no_grad():
        gate.weight[:2] += 0.08  # with the shifted inputs below, two favourites
    history = []
    for _ in range(200):
        x_TD = torch.randn(512, 32, generator=generator) + 0.5
        experts_TK, _, _ = gate(x_TD)
        load_E = torch.bincount(experts_TK.flatten(), minlength=8).float()
        history.append(float(imbalance(load_E)))
        gate.e_score_correction_bias.copy_(updated_bias(gate.e_score_correction_bias, load_E, 0.01))
    assert history[0] > 1.5
    assert max(history[-20:]) < 0.5


def test_a_bias_that_is_moved_keeps_a_mean_of_zero_and_the_same_choices() -> None:
    """With loads of which more lie above the mean than below, all biases would sink together."""
    load_E = torch.tensor([5.0, 5.0, 5.0, 0.0])
    bias_E, drifting_E = torch.zeros(4), torch.zeros(4)
    for _ in range(5000):
        bias_E = updated_bias(bias_E, load_E, 0.01)
        drifting_E += 0.01 * torch.sign(load_E.mean() - load_E)
    assert float(drifting_E.mean()) < -20
    assert abs(float(bias_E.mean())) < 1e-4
    torch.testing.assert_close(bias_E, drifting_E - drifting_E.mean(), rtol=1e-3, atol=0)


def test_a_speed_of_zero_leaves_the_bias_as_it_came() -> None:
    bias = torch.tensor([0.5, 0.25, 3.0, 0.0])
    assert torch.equal(updated_bias(bias, torch.tensor([10.0, 4.0, 0.0, 2.0]), 0.0), bias)


def test_the_sequence_loss_teaches_a_gate_whose_bias_has_evened_out_the_load() -> None:
    """The gradient is that of eq. 17-20 by finite differences, in float64, after 300 updates."""
    gate = Gate(tiny(n_group=4, topk_group=2)).double()
    generator = torch.Generator().manual_seed(0)
    nn.init.normal_(gate.weight, std=0.1, generator=generator)
    x_BSD = torch.randn(4, 64, 32, generator=generator, dtype=torch.float64) + 0.5
    with torch.no_grad():
        gate.weight[:2] += 0.08
        for _ in range(300):
            experts_TK, _, _ = gate(x_BSD.flatten(0, 1))
            load_E = torch.bincount(experts_TK.flatten(), minlength=8).double()
            bias_E = gate.e_score_correction_bias
            bias_E.copy_(updated_bias(bias_E, load_E, 0.01))

    def by_the_paper(weight_ED: Tensor) -> float:
        total = 0.0
        for x_SD in x_BSD:
            scores = [
                [1 / (1 + math.exp(-v)) for v in row] for row in (x_SD @ weight_ED.T).tolist()
            ]
            for i in range(8):
                top = [i in sorted(range(8), key=lambda e: -s[e])[:2] for s in scores]
                share = sum(s[i] / sum(s) for s in scores) / len(scores)
                total += 8 / (2 * len(scores)) * sum(top) * share
        return total

    _, _, scores_TE = gate(x_BSD.flatten(0, 1))
    loss = sequence_balance_loss(scores_TE.unflatten(0, (4, 64)), 2).sum()
    (slope_ED,) = torch.autograd.grad(loss, [gate.weight])
    weight_ED, step = gate.weight.detach(), 1e-6
    for _ in range(3):
        way_ED = torch.randn(8, 32, generator=generator, dtype=torch.float64)
        ahead, back = (by_the_paper(weight_ED + sign * step * way_ED) for sign in (1, -1))
        measured = (ahead - back) / (2 * step)
        assert float((slope_ED * way_ED).sum()) == pytest.approx(measured, rel=1e-5)
    assert float(slope_ED.norm()) > 1.0


def test_imbalance_is_the_excess_of_the_largest_load() -> None:
    assert imbalance(torch.tensor([4.0, 4.0])) == 0
    assert float(imbalance(torch.tensor([6.0, 2.0, 4.0, 4.0]))) == pytest.approx(0.5)
    assert imbalance(torch.zeros(4)) == -1


def test_the_sequence_loss_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 7, 6, generator=generator)
    found = sequence_balance_loss(scores, 2)
    for b in range(3):
        expected = 0.0
        for i in range(6):
            best = [sorted(range(6), key=lambda e: -float(scores[b, t, e]))[:2] for t in range(7)]
            chosen = sum(i in best[t] for t in range(7))
            share = sum(float(scores[b, t, i] / scores[b, t].sum()) for t in range(7)) / 7
            expected += 6 / (2 * 7) * chosen * share
        assert float(found[b]) == pytest.approx(expected, rel=1e-5)


def test_the_sequence_loss_is_one_when_balanced_and_grows_to_experts_over_choices() -> None:
    turns = torch.arange(8)[:, None].add(torch.arange(2)).remainder(4)
    even = torch.full((8, 4), 0.3).scatter(1, turns, 0.6)[None]
    assert float(sequence_balance_loss(even, 2)) == pytest.approx(1)
    sure = torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(1, 8, 4)
    assert float(sequence_balance_loss(sure, 2)) == pytest.approx(2)


def test_the_sequence_losss_gradient_lowers_the_favourite() -> None:
    logits = torch.tensor([0.2, 0.1, 0.0, -0.1]).repeat(1, 8, 1).requires_grad_()
    sequence_balance_loss(logits.sigmoid(), 2).sum().backward()
    assert logits.grad is not None
    assert bool((logits.grad[..., :2] > 0).all())
    assert bool((logits.grad[..., 2:] < 0).all())
