"""DeepSeek-V4's attention: its ways to one result, documents, and what its indexer learns."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.compressed import CompressedAttention, GroupedLinear, PickingCompressor
from model.fp8.linear import Linear
from model.fp8.scheme import Fp8, Numerics
from model.indexer import NONE, divergence, index_scores
from model.multiquery import Sight
from model.passes import Whole
from tests.references import attend_by_query, random_model, tiny_v4

KINDS = {"window": 0, "csa": 1, "hca": 2}
"""Layers of `TINY_V4` by kind."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def attention(kind: str, **changes: object) -> CompressedAttention:
    block = random_model(tiny_v4(**changes)).model.layers[KINDS[kind]].self_attn
    assert isinstance(block, CompressedAttention)
    return block.requires_grad_()


def whole(x_BSD: Tensor, segments: Tensor | None = None, **more: object) -> Whole:
    return Whole(torch.zeros(x_BSD.shape[:2], dtype=torch.int64), segments, **more)  # type: ignore[arg-type]


def documents(*lengths: int) -> Tensor:
    return torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]


@contextmanager
def chunked(block: CompressedAttention, chunk: int, gather_factor: int) -> Iterator[None]:
    before = block.sight
    block.sight = replace(before, chunk=chunk, gather_factor=gather_factor)
    yield
    block.sight = before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", ["off", "dense", "sparse"])
@pytest.mark.parametrize("packed", [False, True])
def test_long_and_short_ways_agree_in_output_gradients_and_losses(
    kind: str, phase: str, packed: bool
) -> None:
    """Chunks of one window whose blocks are gathered, against one mask over everything."""
    block = attention(kind).double()
    x_BSD = normal(2, 50, 32).requires_grad_()
    segments = documents(21, 3, 26).expand(2, -1) if packed else None
    found = []
    for chunk, gather_factor in ((1, 0), (1000, 1000)):
        batch = whole(x_BSD, segments, indexer=phase)
        with chunked(block, chunk, gather_factor):
            out, loss = block(x_BSD, batch)
        assert (loss is not None) == (kind == "csa" and phase != "off")
        losses = [] if loss is None else [loss]
        (out.square().sum() + sum(losses)).backward()
        gradients = {n: p.grad for n, p in block.named_parameters()} | {"x": x_BSD.grad}
        found.append((out.detach(), [loss.detach() for loss in losses], gradients))
        block.zero_grad()
        x_BSD.grad = None
    assert found[0][2].keys() == found[1][2].keys()
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-8)


def saved_numbers(block: CompressedAttention, length: int) -> int:
    """Distinct numbers that one forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        alive.append(tensor)
        return tensor

    alive: list[Tensor] = []
    x_BSD = normal(1, length, 32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x_BSD, whole(x_BSD))
    return sum(kept.values())


@pytest.mark.parametrize("kind", KINDS)
def test_what_training_keeps_grows_with_the_text_and_not_with_its_square(kind: str) -> None:
    block = attention(kind, max_position_embeddings=2048).double()
    with chunked(block, 1, 1):
        short, double, long = (saved_numbers(block, length) for length in (256, 512, 1024))
    # Weights are kept whatever the length, so it is the growth that doubles.
    assert (long - double) / (double - short) == pytest.approx(2, abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_do_not_see_each_other_wherever_they_are_cut(kind: str) -> None:
    block = attention(kind)
    segments = documents(5, 9, 13, 1, 12)
    x_BSD = normal(1, 40, 32).float().requires_grad_()
    out_BSD, _ = block(x_BSD, whole(x_BSD, segments))
    for i in range(5):
        (gradient,) = torch.autograd.grad(out_BSD[segments == i].sum(), x_BSD, retain_graph=True)
        assert gradient[segments == i].any(-1).all()
        assert not gradient[segments != i].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("yarn", [False, True])
def test_a_document_reads_the_same_wherever_whole_blocks_put_it(kind: str, yarn: bool) -> None:
    """Turning outputs back leaves distances alone; blocks keep their tokens if 8 divides."""
    scaling = {"factor": 16.0, "original_max_position_embeddings": 32}
    block = attention(kind, rope_scaling=scaling if yarn else None)
    x_BSD = normal(1, 50, 32).float()
    packed, _ = block(x_BSD, whole(x_BSD, documents(16, 34)))
    alone, _ = block(x_BSD[:, 16:], whole(x_BSD[:, 16:]))
    torch.testing.assert_close(packed[:, 16:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_depends_on_later_tokens(kind: str) -> None:
    block = attention(kind)
    x_BSD = normal(1, 40, 32).float().requires_grad_()
    out_BSD, _ = block(x_BSD, whole(x_BSD))
    for t in (0, 7, 8, 22):
        (gradient,) = torch.autograd.grad(out_BSD[0, t].sum(), x_BSD, retain_graph=True)
        assert not gradient[0, t + 1 :].any()
    # The window is 8 wide; what lies before reaches the last token through blocks alone.
    (gradient,) = torch.autograd.grad(out_BSD[0, 39].sum(), x_BSD)
    assert gradient[0, :32].any() == (kind != "window")


def plain_block_mass(block: CompressedAttention, x_BSD: Tensor, sight: Sight) -> Tensor:
    """How much weight each query gives each block, from operands as the block makes them."""
    positions, table = torch.arange(x_BSD.shape[1]), block._rotary(x_BSD.shape[1], x_BSD.device)
    _, q, kv = block.project(x_BSD, table, positions)
    assert block.compressor is not None
    return attend_by_query(q, kv, block.compressor(x_BSD, whole(x_BSD)), block.sinks, sight)[1]


@pytest.mark.parametrize("phase", ["dense", "sparse"])
def test_an_indexer_learns_how_attention_spreads_over_blocks(phase: str) -> None:
    block = attention("csa").double()
    x_BSD = normal(1, 40, 32)
    assert isinstance(block.compressor, PickingCompressor)
    indexer, sight = block.compressor.indexer, Sight(window=8, ratio=4)
    batch = whole(x_BSD, indexer=phase)
    _, loss = block(x_BSD, batch)

    positions, table = torch.arange(40), block._rotary(40, x_BSD.device)
    latent = block.q_a_norm(block.q_a_proj(x_BSD))
    q, weights = indexer.queries(x_BSD, latent, table, positions)
    scores = index_scores(q, indexer(x_BSD, whole(x_BSD)), weights)
    seen = sight.blocks(0, 40, x_BSD.device)
    if phase == "sparse":
        best = scores.masked_fill(~seen, float("-inf")).topk(4).indices
        seen = seen & torch.zeros_like(seen).scatter(2, best, True)
        chosen = torch.where(seen.gather(2, best), best, NONE)
        sight = replace(sight, chosen_BSK=chosen)
    with torch.no_grad():
        mass = plain_block_mass(block, x_BSD, sight)
    assert not seen[:, 0].any(), "some query must see nothing"
    expected = divergence(scores, mass, seen).sum() / 40
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("phase", ["dense", "sparse"])
def test_language_and_indexer_losses_train_parameters_apart(phase: str) -> None:
    block = attention("csa")
    x_BSD = normal(2, 40, 32).float().requires_grad_()
    batch = whole(x_BSD, indexer=phase)
    out_BSD, loss = block(x_BSD, batch)
    out_BSD.square().sum().backward(retain_graph=True)
    reached = {name for name, p in block.named_parameters() if p.grad is not None}
    assert not any("indexer" in name for name in reached)
    block.zero_grad()
    x_BSD.grad = None
    loss.backward()
    taught = {name for name, p in block.named_parameters() if p.grad is not None and p.grad.any()}
    assert taught == {n for n, _ in block.named_parameters()} - reached
    assert x_BSD.grad is None


@pytest.mark.parametrize("phase", ["dense", "sparse"])
def test_gradients_of_the_indexer_loss_are_those_of_finite_differences(phase: str) -> None:
    block = attention("csa").double()
    x_BSD = normal(1, 26, 32)
    assert isinstance(block.compressor, PickingCompressor)
    parameters = {n: p for n, p in block.named_parameters() if "indexer" in n}
    directions = [normal(*p.shape, seed=i) for i, p in enumerate(parameters.values())]

    def loss(step: float) -> Tensor:
        moved = zip(parameters.items(), directions, strict=True)
        values = {name: p + step * direction for (name, p), direction in moved}
        batch = whole(x_BSD, indexer=phase)
        missed: Tensor = torch.func.functional_call(block, values, (x_BSD, batch))[1]
        return missed

    found = torch.autograd.grad(loss(0.0), list(parameters.values()))
    slope = sum((g * d).sum() for g, d in zip(found, directions, strict=True))
    # A step so small turns no ReLU and changes no choice; central differences err by its square.
    expected = (loss(1e-6).detach() - loss(-1e-6).detach()) / 2e-6
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-8)


def test_texts_of_few_blocks_need_no_indexer_and_give_what_choosing_all_gives() -> None:
    few, all_of_them = attention("csa", index_topk=5), attention("csa", index_topk=100)
    x_BSD = normal(2, 23, 32).float()
    torch.testing.assert_close(few(x_BSD, whole(x_BSD))[0], all_of_them(x_BSD, whole(x_BSD))[0])
    x_BSD = normal(2, 24, 32).float()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(few(x_BSD, whole(x_BSD))[0], all_of_them(x_BSD, whole(x_BSD))[0])


@pytest.mark.parametrize("scheme", [None, Fp8("attention")], ids=["high", "fp8"])
def test_grouped_output_is_a_linear_for_each_group(scheme: Fp8 | None) -> None:
    grouped = GroupedLinear(3 * 64, 160, 2, scheme)
    with torch.no_grad():
        grouped.weight.copy_(normal(320, 192))
    x_BSHW = normal(2, 5, 6, 64).float()
    expected = []
    for g in range(2):
        linear = Linear(192, 160, scheme)
        with torch.no_grad():
            linear.weight.copy_(grouped.weight[160 * g : 160 * (g + 1)])
        expected.append(linear(x_BSHW[:, :, 3 * g : 3 * (g + 1)].flatten(2)))
    torch.testing.assert_close(grouped(x_BSHW), torch.cat(expected, -1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_projections_run_in_fp8_but_compressors_gates_and_head_weights_do_not(kind: str) -> None:
    config = tiny_v4()
    block = CompressedAttention(config, KINDS[kind], Numerics("fp8"))
    linears = [(n, m) for n, m in block.named_modules() if isinstance(m, Linear | GroupedLinear)]
    rounded = {"q_a_proj", "q_b_proj", "kv_proj", "o_a_proj", "o_b_proj"}
    if kind == "csa":
        rounded.add("compressor.indexer.q_b_proj")
    assert {name for name, linear in linears if linear.scheme is not None} == rounded
    rough = random_model(config, precision="fp8").model.layers[KINDS[kind]].self_attn
    assert isinstance(rough, CompressedAttention)
    x_BSD = normal(2, 20, 32).float().requires_grad_()
    found, exact = (block(x_BSD, whole(x_BSD))[0] for block in (rough, attention(kind)))
    # Five roundings of 2^-4 at most each, most of which cancel; but rounded they must be.
    error = float((found - exact).norm().detach() / exact.norm().detach())
    assert 1e-3 < error < 0.2
    found.sum().backward()
    assert all(p.grad is not None for n, p in rough.named_parameters() if "indexer" not in n)


def test_window_layers_turn_by_their_own_frequencies_without_yarn() -> None:
    scaling = {"factor": 16.0, "original_max_position_embeddings": 32}
    x_BSD = normal(1, 30, 32).float()

    def out(kind: str, **changes: object) -> Tensor:
        read: Tensor = attention(kind, **changes)(x_BSD, whole(x_BSD))[0]
        return read

    for kind in KINDS:
        moved = {
            name: not torch.allclose(out(kind), out(kind, **{name: value}), atol=1e-4)
            for name, value in (
                ("rope_theta", 50.0),
                ("compress_rope_theta", 50.0),
                ("rope_scaling", scaling),
            )
        }
        compressing = kind != "window"
        assert moved == {
            "rope_theta": not compressing,
            "compress_rope_theta": compressing,
            "rope_scaling": compressing,
        }


def test_magnitudes_are_not_scaled_whatever_the_scaling_says_of_them() -> None:
    scaling = {"factor": 16.0, "original_max_position_embeddings": 32}
    x_BSD = normal(1, 30, 32).float()
    plain, _ = attention("csa", rope_scaling=scaling)(x_BSD, whole(x_BSD))
    zeros = scaling | {"mscale": 0.0, "mscale_all_dim": 0.0}
    assert torch.equal(attention("csa", rope_scaling=zeros)(x_BSD, whole(x_BSD))[0], plain)


def test_a_text_shorter_than_any_block_is_read_by_the_window_alone() -> None:
    x_BSD = normal(1, 3, 32).float()
    for kind in KINDS:
        block = attention(kind)
        for phase in ("off", "dense", "sparse"):
            out_BSD, loss = block(x_BSD, whole(x_BSD, indexer=phase))
            assert torch.isfinite(out_BSD).all()
            assert (loss is not None) == (kind == "csa" and phase != "off")
            assert loss is None or float(loss) == 0.0
