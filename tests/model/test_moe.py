"""Routing and experts against a loop over tokens."""

import collections
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.model import V3Config
from configs.parallel import Recompute
from model import moe as module
from model.balance import sequence_balance_loss
from model.decoder import DecoderLayer
from model.dispatch import LocalDispatcher, counts_of
from model.fp8.scheme import HIGH
from model.moe import Gate, HashGate, MoE
from model.passes import LayerReport, Whole
from tests.references import (
    moe_by_token,
    random_model,
    random_tokens,
    reading,
    route,
    tiny,
    tiny_v4,
)

CONFIGS = [
    tiny(),
    tiny(n_group=1, topk_group=1, num_experts_per_tok=3),
    tiny(n_group=2, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0),
    tiny(n_shared_experts=2, num_experts_per_tok=4),
]


def moe(config: V3Config) -> MoE:
    made = MoE(config, config.num_hidden_layers, HIGH, LocalDispatcher(config.n_routed_experts))
    generator = torch.Generator().manual_seed(0)
    for tensor in made.state_dict().values():
        nn.init.normal_(tensor, std=0.3, generator=generator)
    return made


def tokens(count: int) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(1))


def through(block: MoE, x_BSD: Tensor) -> Tensor:
    """What the block makes of rows."""
    out_BSD: Tensor = block(x_BSD, reading(x_BSD))[0]
    return out_BSD


def told(block: MoE, x_BSD: Tensor, *, balance: bool = False, routing: bool = False) -> LayerReport:
    """What it reports of them."""
    report: LayerReport = block(x_BSD, reading(x_BSD, balance=balance, routing=routing))[1]
    return report


@pytest.mark.parametrize("config", CONFIGS)
def test_the_block_and_its_gradients_are_a_sum_over_each_tokens_experts(
    config: V3Config,
) -> None:
    block, x_TD = moe(config), tokens(24).requires_grad_()
    dy = torch.randn(24, 32, generator=torch.Generator().manual_seed(2))
    found = through(block, x_TD.view(4, 6, 32)).flatten(0, 1)
    expected = moe_by_token(block, x_TD)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    leaves = [x_TD, *block.parameters()]
    grads = [torch.autograd.grad(y, leaves, dy) for y in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("favourite", [False, True])
@pytest.mark.parametrize("count", [1, 3, 24, 100])
def test_without_gradients_few_and_many_tokens_give_the_same_sum(
    count: int, favourite: bool
) -> None:
    """In decoding: experts without visits, with a few, and one that all tokens visit."""
    block, x_TD = moe(tiny(n_group=1, topk_group=1)), tokens(count)
    if favourite:
        assert block.bias_E is not None
        block.bias_E[5] = 10
    with torch.inference_mode():
        found = through(block, x_TD.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(found, moe_by_token(block, x_TD), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_each_token_gets_the_experts_of_the_formula(config: V3Config) -> None:
    gate, x_TD = moe(config).gate, tokens(100)
    experts_TK, gates_TK, _ = gate(x_TD)
    for x_D, experts_K, gates_K in zip(x_TD, experts_TK.tolist(), gates_TK, strict=True):
        expected = route(gate, x_D)
        assert set(experts_K) == set(expected)
        for expert, weight in zip(experts_K, gates_K, strict=True):
            torch.testing.assert_close(weight, expected[expert])


def test_no_token_leaves_its_best_groups() -> None:
    config = tiny(topk_group=1)
    experts_TK, _, scores_TE = moe(config).gate(tokens(200))
    group_TK = experts_TK // 2
    assert bool((group_TK[:, 0] == group_TK[:, 1]).all())
    free_TK = scores_TE.topk(2, -1).indices
    assert bool((free_TK.sort(1).values != experts_TK.sort(1).values).any())


def test_a_group_is_judged_by_its_two_best_experts() -> None:
    gate = Gate(tiny(n_routed_experts=8, n_group=2, topk_group=1))
    nn.init.zeros_(gate.weight)
    # Group 0 has the best expert, group 1 the better pair.
    gate.e_score_correction_bias.copy_(torch.tensor([9.0, 0, 0, 0, 5, 5, 0, 0]))
    experts_TK, _, _ = gate(torch.zeros(1, 32))
    assert sorted(experts_TK[0].tolist()) == [4, 5]


def test_groups_left_out_stay_out_though_every_choice_is_negative() -> None:
    gate = Gate(tiny(n_group=2, topk_group=1))
    nn.init.zeros_(gate.weight)
    gate.e_score_correction_bias.copy_(torch.tensor([-2.0, -3, -4, -5, -6, -7, -8, -9]))
    experts_TK, _, _ = gate(torch.zeros(1, 32))
    assert sorted(experts_TK[0].tolist()) == [0, 1]


def test_the_bias_changes_the_choice_and_never_the_weights() -> None:
    gate, x_TD = moe(tiny()).gate, tokens(100)
    experts_TK, gates_TK, scores_TE = gate(x_TD)
    chosen_TK = scores_TE.gather(1, experts_TK)
    expected = chosen_TK / chosen_TK.sum(1, keepdim=True) * gate.config.routed_scaling_factor
    torch.testing.assert_close(gates_TK, expected)
    gate.e_score_correction_bias[3] += 100
    moved_TK, moved_gates_TK, moved_scores_TE = gate(x_TD)
    assert bool((moved_TK == 3).any(1).all())
    assert torch.equal(moved_scores_TE, scores_TE)
    chosen_TK = scores_TE.gather(1, moved_TK)
    expected = chosen_TK / chosen_TK.sum(1, keepdim=True) * gate.config.routed_scaling_factor
    torch.testing.assert_close(moved_gates_TK, expected)


def test_a_constant_added_to_every_bias_changes_nothing() -> None:
    gate, x_TD = moe(tiny()).gate, tokens(100)
    before = gate(x_TD)
    gate.e_score_correction_bias.add_(0.5)
    after = gate(x_TD)
    assert torch.equal(before[0].sort(1).values, after[0].sort(1).values)


def test_a_tokens_weights_add_up_to_the_scaling_factor() -> None:
    _, gates_TK, _ = moe(tiny(routed_scaling_factor=1.7)).gate(tokens(50))
    torch.testing.assert_close(gates_TK.sum(1), torch.full((50,), 1.7))


def test_the_routing_bias_is_state_and_not_a_parameter() -> None:
    block = moe(tiny())
    assert "gate.e_score_correction_bias" in block.state_dict()
    assert "gate.e_score_correction_bias" not in dict(block.named_parameters())


def test_what_was_counted_is_no_part_of_a_saved_model() -> None:
    block = moe(tiny()).train()
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    told(block, tokens(30).view(5, 6, 32), balance=True, routing=True)
    after = block.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert {name for name, _ in block.named_buffers()} <= before.keys()


def test_a_model_of_a_narrow_type_counts_as_exactly() -> None:
    """bfloat16 holds whole numbers up to 256."""
    block = moe(tiny(n_group=1, topk_group=1)).bfloat16()
    x_TD = tokens(3000).bfloat16()
    load_E = told(block, x_TD.view(50, 60, 32)).load_E
    counts_E = torch.bincount(block.gate(x_TD)[0].flatten(), minlength=8)
    assert int(counts_E.max()) > 512
    assert load_E is not None
    assert load_E.tolist() == counts_E.tolist()


def test_an_expert_far_out_of_the_question_leaves_all_slopes_finite() -> None:
    """softplus(-200) is 0 in float32, and the square root of 0 has no slope."""
    gate = Gate(tiny_v4(n_routed_experts=4, num_experts_per_tok=2))
    logits = torch.tensor([3.0, 2.0, -110.0, -200.0])
    nn.init.zeros_(gate.weight)
    with torch.no_grad():
        gate.weight[:, 0] = logits
    x_TD = torch.zeros(1, gate.weight.shape[1])
    x_TD[0, 0] = 1
    x_TD.requires_grad_()
    experts_TK, gates_TK, scores_TE = gate(x_TD)
    assert sorted(experts_TK[0].tolist()) == [0, 1]
    torch.testing.assert_close(scores_TE[0], F.softplus(logits.double()).sqrt().float())
    # Equal weights for both would sum to a constant.
    weights = torch.tensor([[1.0, 2.0]])
    for slope in torch.autograd.grad((gates_TK * weights).sum(), [x_TD, gate.weight]):
        assert bool(slope.isfinite().all())
        assert bool(slope.any())


@pytest.mark.parametrize("recompute", ["attention", "all"])
def test_a_layer_that_is_computed_again_for_its_backward_pass_counts_once(
    recompute: Recompute,
) -> None:
    layer = random_model().train().model.layers[1]
    assert isinstance(layer, DecoderLayer) and isinstance(layer.mlp, MoE)
    calls = collections.Counter[str]()
    for name in ("self_attn", "mlp.gate", "mlp.shared_experts", "mlp.experts"):
        # In front of a call: the second ends as soon as all is there that was kept of the first.
        layer.get_submodule(name).register_forward_pre_hook(
            lambda *_, name=name: calls.update([name])
        )
    tokens_BS = random_tokens(5, 6)
    rows = tokens(30).view(5, 6, 32)

    def run(how: Recompute) -> tuple[Tensor, list[Tensor]]:
        """What is reported of each expert, and all gradients."""
        x_BSD = rows.clone().requires_grad_()
        y_BSD, report = layer(x_BSD, Whole(tokens_BS, recompute=how))
        once = report.load_E.clone()
        slopes = torch.autograd.grad(y_BSD.square().sum(), [x_BSD, *layer.parameters()])
        assert torch.equal(report.load_E, once)
        return once, list(slopes)

    once, expected = run("none")
    assert int(once.sum()) == 30 * 2
    assert set(calls.values()) == {1}
    calls.clear()
    again, slopes = run(recompute)
    assert torch.equal(again, once)
    assert all(torch.equal(a, b) for a, b in zip(slopes, expected, strict=True))
    twice = {"self_attn"} if recompute == "attention" else calls.keys() - {"mlp.gate"}
    assert calls == {name: 1 + (name in twice) for name in calls}


def test_one_histogram_serves_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(chosen: Tensor, experts: int) -> Tensor:
        nonlocal calls
        calls += 1
        return counts_of(chosen, experts)

    monkeypatch.setattr(module, "counts_of", counted)
    told(moe(tiny()).train(), tokens(30).view(5, 6, 32))
    assert calls == 1


def test_a_token_that_no_expert_wants_gets_nothing_from_the_routed_ones() -> None:
    """sigmoid(-200) is 0 in float32, and so is the sum that weights are divided by."""
    gate = Gate(tiny())
    nn.init.constant_(gate.weight, -200 / gate.weight.shape[1])
    _, gates_TK, _ = gate(torch.ones(1, gate.weight.shape[1]))
    assert not gates_TK.any()


def test_a_table_gives_each_token_distinct_experts_and_all_sets_are_as_likely() -> None:
    gate = HashGate(tiny_v4(n_routed_experts=4, num_experts_per_tok=2, vocab_size=6016))
    gate.draw(0, "layer")
    first = gate.tid2eid.clone()
    sets = collections.Counter(tuple(sorted(row)) for row in first.tolist())
    # Of the six pairs, each comes to a thousand of the tokens, and 5 times 29 of them more or less.
    assert set(sets) == set(itertools.combinations(range(4), 2))
    assert all(abs(count - 6016 / 6) < 5 * 29 for count in sets.values())
    gate.draw(0, "layer")
    assert torch.equal(gate.tid2eid, first)
    for seed, name in ((1, "layer"), (0, "another")):
        gate.draw(seed, name)
        assert not torch.equal(gate.tid2eid, first)


@pytest.mark.parametrize("training", [True, False])
def test_a_report_counts_every_copy_and_holds_what_the_pass_asks_for(training: bool) -> None:
    block, x_BSD = moe(tiny()).train(training), tokens(30).view(5, 6, 32)
    experts_TK, _, scores_TE = block.gate(tokens(30))
    counts_E = torch.bincount(experts_TK.flatten(), minlength=8)
    balance = sequence_balance_loss(scores_TE.view(5, 6, 8), 2).sum()
    for asks_balance, asks_routing in itertools.product((False, True), repeat=2):
        report = told(block, x_BSD, balance=asks_balance, routing=asks_routing)
        assert report.layer == "model.layers.2"
        assert report.load_E is not None
        assert torch.equal(report.load_E, counts_E)
        assert (report.routing is not None) == asks_routing
        assert report.routing is None or torch.equal(report.routing, experts_TK)
        assert (report.balance is not None) == asks_balance
        assert report.balance is None or torch.equal(report.balance, balance)
        assert report.indexer is None


def test_where_a_table_routes_there_is_nothing_to_balance() -> None:
    config = tiny_v4()
    block = MoE(config, 0, HIGH, LocalDispatcher(config.n_routed_experts))
    assert isinstance(block.gate, HashGate)
    block.gate.draw(0, "layer")
    nn.init.normal_(block.gate.weight)
    report = told(block, tokens(30).view(5, 6, 32), balance=True, routing=True)
    assert report.balance is None
    assert report.routing is not None
    assert torch.equal(report.routing, block.gate.tid2eid[0].expand(30, -1))
