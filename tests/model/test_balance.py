"""Load balance: what the bias does over steps, and the sequence-wise loss by its formula."""

import pytest
import torch
from torch import nn

from model.balance import imbalance, sequence_balance_loss, updated_bias
from model.moe import Gate
from tests.references import tiny


def test_an_overloaded_expert_is_lowered_and_an_idle_one_raised() -> None:
    bias = torch.tensor([0.5, 0.0, -0.5, 0.0])
    moved = updated_bias(bias, torch.tensor([10.0, 4.0, 0.0, 2.0]), 0.125)
    assert moved.tolist() == [0.375, 0.0, -0.375, 0.125]
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
        history.append(imbalance(load_E))
        gate.e_score_correction_bias.copy_(updated_bias(gate.e_score_correction_bias, load_E, 0.01))
    assert history[0] > 1.5
    assert max(history[-20:]) < 0.5


def test_imbalance_is_the_excess_of_the_largest_load() -> None:
    assert imbalance(torch.tensor([4.0, 4.0])) == 0
    assert imbalance(torch.tensor([6.0, 2.0, 4.0, 4.0])) == pytest.approx(0.5)
    assert imbalance(torch.zeros(4)) == -1


def test_the_sequence_loss_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 7, 6, generator=generator)
    experts = torch.rand(3, 7, 6, generator=generator).topk(2).indices
    found = sequence_balance_loss(experts, scores)
    for b in range(3):
        expected = 0.0
        for i in range(6):
            chosen = sum(int(i in experts[b, t].tolist()) for t in range(7))
            share = sum(float(scores[b, t, i] / scores[b, t].sum()) for t in range(7)) / 7
            expected += 6 / (2 * 7) * chosen * share
        assert float(found[b]) == pytest.approx(expected, rel=1e-5)


def test_the_sequence_loss_is_one_when_balanced_and_grows_to_experts_over_choices() -> None:
    uniform = torch.full((1, 8, 4), 0.3)
    turns = torch.arange(8)[:, None].add(torch.arange(2)).remainder(4)[None]
    assert float(sequence_balance_loss(turns, uniform)) == pytest.approx(1)
    always = torch.tensor([0, 1]).expand(1, 8, 2)
    sure = torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(1, 8, 4)
    assert float(sequence_balance_loss(always, sure)) == pytest.approx(2)


def test_the_sequence_losss_gradient_lowers_the_favourite() -> None:
    logits = torch.zeros(1, 8, 4, requires_grad=True)
    always = torch.tensor([0, 1]).expand(1, 8, 2)
    sequence_balance_loss(always, logits.sigmoid()).sum().backward()
    assert logits.grad is not None
    assert bool((logits.grad[..., :2] > 0).all())
    assert bool((logits.grad[..., 2:] < 0).all())
