"""Places that a bfloat16 model would make narrow: each is float32 inside, by a bound in float64.

Inputs are bfloat16 numbers, which float64 holds exactly, so that all that is measured is what the
code does with them. A result in bfloat16 was rounded once, by 2^-8 of its value at most, and sums
in float32 are off by some 2^-24 of the sum of their terms' sizes. Where a result leaves in float32,
nothing was rounded to eight bits at all.
"""

import pytest
import torch
from torch import Tensor

from configs.model import ModelConfig
from model.attention import absorbed
from model.compressor import Compressor
from model.decode import Session
from model.dispatch import Dispatched
from model.fp8.scheme import HIGH
from model.gathering import over_chosen
from model.hyper import HyperConnection
from model.multiquery import Sight, attend
from model.passes import Whole
from model.rope import rotary_table, rotate_halves, rotate_tail
from model.sparse import SparseLatentAttention
from model.swiglu import grouped_swiglu
from tests.references import (
    TINY,
    attend_by_query,
    latent_attention,
    random_model,
    random_tokens,
    rotate_as_complex,
    tiny_v4,
    tiny_v32,
)

EXACT = 2**-18
"""Of a tensor's largest value: what sums of some hundred terms in float32 may be off by."""
ROUNDED = 2**-8 + EXACT
"""Of a tensor's largest value: what one rounding to bfloat16 may take beside that."""


def narrow(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(shape, generator=generator)).bfloat16()


def gap(found: Tensor, exact: Tensor) -> float:
    """The largest difference, over the largest value."""
    difference = (found.detach().double() - exact.detach().double()).abs().max()
    return float(difference / exact.detach().abs().max())


def test_angles_are_not_rounded() -> None:
    table_SR, x = rotary_table(8, 10_000.0, 600), narrow(600, 8)
    positions = torch.arange(600)
    exact = rotate_as_complex(x.double(), 10_000.0)
    for sign in (False, True):
        turned = rotate_tail(x, table_SR, positions, inverse=sign)
        assert turned.dtype == torch.bfloat16
        if not sign:
            # Each value is rounded once, and is right to the last of its own bits but one.
            assert bool(((turned.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all())
    split = torch.cat([x[:, 0::2], x[:, 1::2]], dim=1)
    exact_split = torch.cat([exact[:, 0::2], exact[:, 1::2]], dim=1)
    turned = rotate_halves(split, table_SR, positions)
    assert turned.dtype == torch.bfloat16
    assert bool(((turned.double() - exact_split).abs() <= 2**-8 * exact_split.abs() + 1e-6).all())


def connection(dtype: torch.dtype) -> HyperConnection:
    block = HyperConnection(tiny_v4(hidden_size=64)).to(dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(block.parameters()):
            parameter.copy_(narrow(*parameter.shape, seed=seed + 5, size=0.3))
    return block


def test_streams_are_mixed_by_weights_that_were_not_rounded() -> None:
    rough, exact = connection(torch.bfloat16), connection(torch.float64)
    x_BSND = narrow(2, 40, 4, 64)
    x = x_BSND.clone().requires_grad_()
    wide = x_BSND.double().requires_grad_()
    for mix_TNN in (rough.weights(x_BSND.flatten(0, 1))[2], exact.weights(wide.flatten(0, 1))[2]):
        assert float((mix_TNN.detach().double().sum(1) - 1).abs().max()) < 1e-5
    read, writing = rough(x)
    y = writing.write(0 * read)
    read, writing = exact(wide)
    expected = writing.write(0 * read)
    assert gap(y, expected) < ROUNDED
    # What all streams held together, they still hold: columns of the mix sum to 1.
    kept = y.detach().double().sum(2), x_BSND.double().sum(2)
    assert float((kept[0] - kept[1]).abs().mean() / kept[1].abs().mean()) < 2**-9
    dy = narrow(2, 40, 4, 64, seed=9)
    y.backward(dy)
    expected.backward(dy.double())
    assert x.grad is not None
    assert wide.grad is not None
    # It comes by three ways, from what is read, weighed and mixed, each rounded for itself.
    assert gap(x.grad, wide.grad) < 3 * ROUNDED
    for (name, parameter), twin in zip(rough.named_parameters(), exact.parameters(), strict=True):
        assert parameter.grad is not None and twin.grad is not None
        assert gap(parameter.grad, twin.grad) < ROUNDED, name


def absorbed_operands() -> tuple[Tensor, ...]:
    return (
        narrow(6, 4, 32, size=4.0),
        narrow(6, 4, 16, seed=1, size=4.0),
        narrow(6, 80, 64 + 16, seed=2),
        narrow(4, 32, 64, seed=3, size=0.2),
        narrow(4, 24, 64, seed=4, size=0.2),
    )


def test_absorbed_attention_scores_weighs_and_differentiates_in_float32() -> None:
    visible_QL = torch.rand(6, 80, generator=torch.Generator().manual_seed(5)) < 0.7
    rough = [t.clone().requires_grad_() for t in absorbed_operands()]
    exact = [t.double().requires_grad_() for t in absorbed_operands()]
    found = absorbed(rough[0], rough[1], rough[2], visible_QL, *rough[3:], scale=48**-0.5)
    nope, rope, entries, key, value = exact
    latent, shared = entries[..., :64], entries[..., 64:]
    scores = torch.einsum("qhn,hnc,qlc->qhl", nope, key, latent)
    scores = (scores + torch.einsum("qhr,qlr->qhl", rope, shared)) * 48**-0.5
    weights = scores.masked_fill(~visible_QL[:, None], float("-inf")).softmax(-1)
    expected = torch.einsum("qhl,qlc,hvc->qhv", weights, latent, value)
    assert float(weights.detach().max()) > 0.9  # scores are large, where a rounded one would matter
    assert found[1].dtype == torch.float32
    assert gap(found[1], weights) < EXACT
    assert found[0].dtype == torch.bfloat16
    assert gap(found[0], expected) < ROUNDED
    dy = narrow(6, 4, 24, seed=6)
    slopes = torch.autograd.grad(found[0], rough, dy)
    wanted = torch.autograd.grad(expected, exact, dy.double())
    for slope, exact_slope in zip(slopes, wanted, strict=True):
        assert gap(slope, exact_slope) < ROUNDED
    with torch.no_grad():
        again = absorbed(rough[0], rough[1], rough[2], visible_QL, *rough[3:], scale=48**-0.5)
    assert gap(again[1], weights) < EXACT


def test_an_indexer_learns_from_probabilities_that_were_not_rounded() -> None:
    """What the divergence is measured against, and the divergence itself, beside float64's."""
    config = tiny_v32(hidden_size=64, index_topk=4)
    block = SparseLatentAttention(config, HIGH).bfloat16()
    with torch.no_grad():
        for seed, parameter in enumerate(block.parameters()):
            parameter.copy_(narrow(*parameter.shape, seed=seed, size=0.5))
    tokens_BS = random_tokens(1, 24, config=config)
    x_BSD = narrow(1, 24, 64, seed=3)
    seen = Whole(tokens_BS, indexer="dense")
    _, loss = block(x_BSD, seen)
    assert loss.dtype == torch.float32
    # From the very tensors that the block's bfloat16 projections gave, in float64.
    positions = torch.arange(24)
    projected = block.project(x_BSD, block.rotary(24, x_BSD.device), positions)
    heads = block.expand(projected)
    score = heads.q_BHSQ.double() @ heads.k_BHSQ.double().transpose(2, 3) * block.scale
    causal = torch.ones(24, 24).tril().bool()
    p_SS = score.masked_fill(~causal, float("-inf")).softmax(-1).sum(1)[0] / len(score[0])
    assert projected.q_latent_BSA is not None
    table = block.rotary(24, x_BSD.device)
    q, w = block.indexer.queries(x_BSD, projected.q_latent_BSA, table, positions)
    k = block.indexer.keys(x_BSD, table, positions)
    dots = torch.einsum("bsjw,blw->bsjl", q.double(), k.double()).relu()
    scale = q.shape[-1] ** -0.5 * q.shape[-2] ** -0.5
    index_SS = torch.einsum("bsj,bsjl->bsl", w.double() * scale, dots)[0]
    log_q_SS = index_SS.masked_fill(~causal, float("-inf")).log_softmax(-1)
    terms = torch.where(causal, p_SS * (p_SS.clamp_min(1e-300).log() - log_q_SS), 0)
    assert float(loss.detach()) == pytest.approx(float(terms.detach().sum(-1).mean()), rel=2**-16)


def test_shared_entries_get_the_sum_of_all_chunks() -> None:
    """Many chunks look at the same blocks and overlap in the window."""
    q, kv, blocks = (
        narrow(1, 64, 2, 24, size=3.0),
        narrow(1, 64, 24, seed=1),
        narrow(1, 16, 24, seed=2),
    )
    sinks = narrow(2, seed=3)
    sight = Sight(8, 4, chunk=8)
    rough = [t.clone().requires_grad_() for t in (q, kv, blocks, sinks)]
    exact = [t.double().requires_grad_() for t in (q, kv, blocks, sinks)]
    y, mass = attend(rough[0], rough[1], rough[2], rough[3], sight, mass=True)
    expected, expected_mass = attend_by_query(exact[0], exact[1], exact[2], exact[3], sight)
    assert gap(y, expected) < ROUNDED
    assert mass is not None
    assert gap(mass, expected_mass) < EXACT
    dy = narrow(1, 64, 2, 24, seed=4)
    slopes = torch.autograd.grad(y, rough, dy)
    for slope, wanted in zip(
        slopes, torch.autograd.grad(expected, exact, dy.double()), strict=True
    ):
        assert gap(slope, wanted) < ROUNDED


def test_an_entry_that_thousands_chose_gets_all_of_their_gradients() -> None:
    """In bfloat16 a sum of equal terms stops at 256 of them."""
    entries_LX = narrow(4, 3)
    chosen_QK = torch.zeros(3000, 1, dtype=torch.int64)

    def core(queries, gathered, valid, shared):  # type: ignore[no-untyped-def]
        return (gathered[0][:, 0] * shared[0],)

    leaf, shared = entries_LX.clone().requires_grad_(), torch.ones(3).bfloat16().requires_grad_()
    (y,) = over_chosen(core, chosen_QK, entries=[leaf], queries=[], shared=[shared])
    y.sum().backward()
    assert leaf.grad is not None and shared.grad is not None
    assert leaf.grad[0].tolist() == [3008.0] * 3  # the bfloat16 nearest to 3000
    assert gap(shared.grad, 3000 * entries_LX[0].double()) < ROUNDED


def test_a_row_gets_the_sum_of_all_its_experts() -> None:
    """Twelve experts whose sums were rounded after each would be off by more than the last bit."""
    experts, rows, width, inner = 12, 20, 16, 8
    x_RD, gates_N = narrow(rows, width), narrow(rows * experts, seed=1).abs()
    gate_up, down = narrow(experts, 2 * inner, width, seed=2), narrow(experts, width, inner, seed=3)
    rows_N = torch.arange(rows).repeat(experts)
    counts_E = torch.full((experts,), rows)

    def run(dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = [t.to(dtype).requires_grad_() for t in (x_RD, gates_N, gate_up, down)]
        sent = Dispatched(leaves[0], rows_N, counts_E, leaves[1])
        y = grouped_swiglu(sent, leaves[2], leaves[3], None)
        return y, torch.autograd.grad(y, leaves, narrow(rows, width, seed=4).to(dtype))

    (rough, slopes), (exact, wanted) = run(torch.bfloat16), run(torch.float64)
    # Each product of bfloat16 operands is rounded on its way, and so are gate and up; not the sum.
    assert gap(rough, exact) < 4 * ROUNDED
    for slope, exact_slope in zip(slopes, wanted, strict=True):
        assert gap(slope, exact_slope) < 6 * ROUNDED
    y_ND = narrow(rows * experts, width, seed=6)
    sent = Dispatched(x_RD, rows_N, counts_E, gates_N)
    exact_sum = (y_ND * gates_N[:, None]).double().unflatten(0, (experts, rows)).sum(0)
    assert gap(sent.collect(y_ND), exact_sum) < ROUNDED


def test_a_block_is_pooled_in_float32() -> None:
    config = tiny_v4(hidden_size=64)
    rough = Compressor(config, 24, 8, series=1).bfloat16()
    exact = Compressor(config, 24, 8, series=1).double()
    with torch.no_grad():
        for seed, (a, b) in enumerate(zip(rough.parameters(), exact.parameters(), strict=True)):
            a.copy_(narrow(*a.shape, seed=seed, size=0.4))
            b.copy_(a)
    tokens_BS, x_BSD = random_tokens(1, 32, config=config), narrow(1, 32, 64, seed=8)
    # The projections are rounded to bfloat16; from there on nothing is until the norm's result.
    kv, gate = (x_BSD @ w.weight.T for w in (rough.kv_proj, rough.gate_proj))
    gate = gate.double().unflatten(1, (-1, 8)) + exact.position_bias
    pooled = (kv.double().unflatten(1, (-1, 8)) * gate.softmax(2)).sum(2)
    expected = exact.kv_norm(pooled)
    found = rough(x_BSD, Whole(tokens_BS))
    # Block 0 begins at position 0, where no pair is turned.
    assert gap(found[:, 0], expected[:, 0]) < 2 * ROUNDED


@pytest.mark.parametrize(
    "config",
    # An indexer that picks all picks the same by either path.
    [TINY, tiny_v32(index_topk=40), tiny_v4(index_topk=40)],
    ids=["v3", "v32", "v4"],
)
def test_a_bfloat16_model_decodes_from_caches_what_it_reads_at_once(config: ModelConfig) -> None:
    model = random_model(config).bfloat16()
    tokens = random_tokens(1, 40, config=config)
    with torch.inference_mode():
        session = Session(model, rows=1, tokens=40)
        session.join([tokens[0, :24].tolist()])
        stepped = torch.cat([session.step(token[None]) for token in tokens[0, 24:]])
        # Up to four layers round the stream some six times each, here otherwise than there.
        assert gap(stepped, model(tokens)[0, 24:]) < 12 * 2**-8


def test_latent_attention_in_bfloat16_is_within_its_operands_rounding() -> None:
    """The expanded form, whose softmax is torch's own: it computes in float32 too."""
    config = tiny_v32(hidden_size=64, index_topk=40)
    block = SparseLatentAttention(config, HIGH).bfloat16()
    with torch.no_grad():
        for seed, parameter in enumerate(block.parameters()):
            parameter.copy_(narrow(*parameter.shape, seed=seed, size=0.2))
    x_BSD = narrow(1, 24, 64, seed=3)
    found, _ = block(x_BSD, Whole(random_tokens(1, 24, config=config)))
    expected, _ = latent_attention(block, x_BSD[0], torch.ones(24, 24).tril().bool())
    # Seven roundings stand between input and output: of projections, norms, rotation and products.
    assert gap(found[0], expected) < 7 * 2**-8
