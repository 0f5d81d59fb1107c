import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from configs.engram import EngramConfig
from configs.model import V4Config
from model.dispatch import LocalDispatcher
from model.fp8.scheme import HIGH
from model.hyper import HyperConnection, HyperHead, HyperLayer, HyperMtpLayer
from model.layers import RMSNorm
from model.passes import Whole
from tests.references import TINY_V4, random_model, random_tokens, tiny_v4


def randomised(block: torch.nn.Module, *, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return block.double().eval()


def connection(*, seed: int = 0, **changes: object) -> HyperConnection:
    block = randomised(HyperConnection(tiny_v4(hidden_size=6, **changes)), seed=seed)
    assert isinstance(block, HyperConnection)
    return block


def streams(rows: int, tokens: int, *, width: int = 6, count: int = 4, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, tokens, count, width, generator=generator, dtype=torch.float64)


def around(
    block: HyperConnection, x_BSND: Tensor, sublayer: Callable[[Tensor], Tensor] = torch.tanh
) -> Tensor:
    """The next streams, where `sublayer` makes its output of what the connection reads."""
    x_BSD, writing = block(x_BSND)
    next_BSND: Tensor = writing.write(sublayer(x_BSD))
    return next_BSND


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def weights_of_one_token(
    block: HyperConnection, x_ND: Tensor
) -> tuple[list[float], list[float], list[list[float]]]:
    """(pre, post, mix) in plain numbers, as V4's released code computes them."""
    config, n = block.config, len(x_ND)
    flat = x_ND.flatten().tolist()
    rms = math.sqrt(sum(v * v for v in flat) / len(flat) + config.rms_norm_eps)
    raw = [sum(f * v for f, v in zip(row, flat, strict=True)) / rms for row in block.fn.tolist()]
    base, scale = block.base.tolist(), block.scale.tolist()
    pre = [sigmoid(raw[i] * scale[0] + base[i]) + config.hc_eps for i in range(n)]
    post = [2 * sigmoid(raw[n + i] * scale[1] + base[n + i]) for i in range(n)]
    mix = []
    for j in range(n):
        start = 2 * n + j * n
        row = [math.exp(raw[start + k] * scale[2] + base[start + k]) for k in range(n)]
        mix.append([v / sum(row) + config.hc_eps for v in row])
    for step in range(2 * config.hc_sinkhorn_iters - 1):
        if step % 2:
            mix = [[v / (sum(row) + config.hc_eps) for v in row] for row in mix]
        else:
            sums = [sum(row[k] for row in mix) + config.hc_eps for k in range(n)]
            mix = [[v / s for v, s in zip(row, sums, strict=True)] for row in mix]
    return pre, post, mix


def one_token(block: HyperConnection, x_ND: Tensor) -> Tensor:
    """x'_k = post_k F(sum pre_i x_i) + sum_j mix[j][k] x_j for F = tanh."""
    pre, post, mix = weights_of_one_token(block, x_ND)
    n = len(x_ND)
    inner = torch.stack([pre[i] * x_ND[i] for i in range(n)]).sum(0)
    return torch.stack(
        [
            post[k] * inner.tanh() + torch.stack([mix[j][k] * x_ND[j] for j in range(n)]).sum(0)
            for k in range(n)
        ]
    )


def test_streams_are_read_mixed_and_written_as_the_released_code_does() -> None:
    block, x_BSND = connection(), streams(2, 3)
    found = around(block, x_BSND)
    expected = torch.stack([one_token(block, x_ND) for x_ND in x_BSND.flatten(0, 1)])
    torch.testing.assert_close(found.flatten(0, 1), expected, rtol=1e-9, atol=1e-9)


def test_the_released_form_is_that_of_the_paper_but_for_its_epsilons() -> None:
    """arXiv 2512.24880: norm in front of the product; H_res = Sinkhorn(exp(.)), columns first.

    The paper's H_res is the transpose of the released mix, so its columns are our rows, whose
    first normalisation the softmax has done already. Each epsilon moves a weight by about 1e-6.
    """
    block, x_BSND = connection(hc_eps=1e-9), streams(1, 5)
    n = 4
    normed = torch.nn.functional.rms_norm(x_BSND.flatten(2), (24,), eps=block.config.rms_norm_eps)
    raw = normed @ block.fn.T
    pre = torch.sigmoid(block.scale[0] * raw[..., :n] + block.base[:n])
    post = 2 * torch.sigmoid(block.scale[1] * raw[..., n : 2 * n] + block.base[n : 2 * n])
    residual = (block.scale[2] * raw[..., 2 * n :] + block.base[2 * n :]).exp()
    residual = residual.unflatten(-1, (n, n)).transpose(-1, -2)
    for _ in range(20):
        residual = residual / residual.sum(-2, keepdim=True)
        residual = residual / residual.sum(-1, keepdim=True)
    inner = (pre.unsqueeze(-1) * x_BSND).sum(2)
    expected = residual @ x_BSND + post.unsqueeze(-1) * inner.tanh().unsqueeze(2)
    torch.testing.assert_close(around(block, x_BSND), expected, rtol=1e-6, atol=1e-6)


def test_the_mix_is_doubly_stochastic_and_stays_so_over_many_layers() -> None:
    x_TND = streams(1, 50)[0]
    product = torch.eye(4, dtype=torch.float64).expand(50, 4, 4)
    for layer in range(20):
        with torch.no_grad():
            _, _, mix_TNN = connection(seed=layer).weights(x_TND)
        assert (mix_TNN >= 0).all()
        # The last step divides columns, so those are as near to 1 as epsilon lets them be.
        torch.testing.assert_close(
            mix_TNN.sum(1), torch.ones(50, 4, dtype=torch.float64), rtol=0, atol=3e-6
        )
        torch.testing.assert_close(
            mix_TNN.sum(2), torch.ones(50, 4, dtype=torch.float64), rtol=0, atol=1e-3
        )
        product = product @ mix_TNN
    # What went through 20 layers is neither amplified nor lost; without mixing it would be.
    assert float((product.sum(1) - 1).abs().max()) < 1e-3
    assert float((product.sum(2) - 1).abs().max()) < 1e-3


def test_one_stream_with_weights_of_one_is_the_plain_residual() -> None:
    block = connection(hc_mult=1)
    with torch.no_grad():
        block.scale.zero_()
        block.base.copy_(torch.tensor([40.0, 0.0, 0.0]))
    x_BSND = streams(2, 3, count=1)
    torch.testing.assert_close(around(block, x_BSND), x_BSND + x_BSND.tanh(), rtol=0, atol=1e-5)


def test_gradients_of_a_connection_are_those_of_finite_differences() -> None:
    block, x_BSND = connection(), streams(1, 3).requires_grad_()
    parameters = dict(block.named_parameters())

    def run(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> Tensor:
        values = {"fn": fn, "base": base, "scale": scale}
        inner, writing = torch.func.functional_call(block, values, (x,))
        out: Tensor = writing.write(inner.tanh())
        return out

    inputs = (x_BSND, parameters["fn"], parameters["base"], parameters["scale"])
    assert torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-6)


def test_gradients_through_the_sinkhorn_alone_are_those_of_finite_differences() -> None:
    block, x_TND = connection(), streams(1, 2)[0]

    def mix(base: Tensor) -> Tensor:
        values = {"of.fn": block.fn.detach(), "of.base": base, "of.scale": block.scale.detach()}
        mixed: Tensor = torch.func.functional_call(_Weights(block), values, x_TND)
        return mixed

    assert torch.autograd.gradcheck(mix, (block.base,), eps=1e-6, atol=1e-7)


class _Weights(torch.nn.Module):
    """The mixing matrix alone."""

    def __init__(self, of: HyperConnection) -> None:
        super().__init__()
        self.of = of

    def forward(self, x_TND: Tensor) -> Tensor:
        return self.of.weights(x_TND)[2]


def test_bfloat16_streams_are_weighed_in_float32() -> None:
    block, x_BSND = connection().float(), streams(2, 9).float()
    rough = around(block, x_BSND.bfloat16())
    assert rough.dtype == torch.bfloat16
    # Of its eight bits, the sum of five rounded terms loses two at most.
    exact = around(block, x_BSND.bfloat16().float())
    torch.testing.assert_close(rough.float(), exact, rtol=2**-6, atol=2**-6)
    for weights in block.weights(x_BSND[0].bfloat16()):
        assert weights.dtype == torch.float32


def test_the_head_sums_the_streams_by_their_sigmoids() -> None:
    head = randomised(HyperHead(tiny_v4(hidden_size=6)))
    assert isinstance(head, HyperHead)
    x_BSND = streams(2, 3)
    for x_ND, found in zip(x_BSND.flatten(0, 1), head(x_BSND).flatten(0, 1), strict=True):
        flat = x_ND.flatten()
        raw = head.hc_fn.detach() @ flat / (flat.square().mean() + head.config.rms_norm_eps).sqrt()
        pre = [
            sigmoid(float(v * head.hc_scale.detach() + b))
            for v, b in zip(raw, head.hc_base.tolist(), strict=True)
        ]
        expected = sum((p + head.config.hc_eps) * x for p, x in zip(pre, x_ND, strict=True))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(head, (x_BSND.requires_grad_(),), eps=1e-6, atol=1e-6)


def test_a_fresh_connection_shares_evenly_but_for_what_it_reads_of_the_streams() -> None:
    config = tiny_v4(initializer_range=1e-9)
    model = random_model(config)
    model.initialize(0)
    layer = model.model.layers[0]
    assert isinstance(layer, HyperLayer)
    pre, post, mix = layer.attn_hc.weights(torch.randn(3, 4, 32))
    torch.testing.assert_close(pre, torch.full((3, 4), 0.5), rtol=0, atol=1e-5)
    torch.testing.assert_close(post, torch.ones(3, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(mix, torch.full((3, 4, 4), 0.25), rtol=0, atol=1e-5)
    assert layer.ffn_hc.scale.tolist() == [1.0, 1.0, 1.0]
    assert not layer.self_attn.sinks.any()


def hidden_of(config: V4Config, tokens_BS: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (*tokens_BS.shape, config.hc_mult, config.hidden_size)
    return torch.randn(shape, generator=generator)


def test_memory_is_read_in_front_of_attention() -> None:
    engram = EngramConfig(
        layer_ids=(1,), table_sizes=(50, 60), n_embed_per_ngram=8, n_head_per_ngram=2
    )
    config = tiny_v4(engram=engram.model_dump())
    model = random_model(config)
    tokens_BS = random_tokens(2, 12, config=config)
    first, with_memory = model.model.layers[:2]
    assert isinstance(first, HyperLayer) and isinstance(with_memory, HyperLayer)
    assert first.engram is None
    assert with_memory.engram is not None
    x_BSND = hidden_of(config, tokens_BS)
    weights = {k: v for k, v in with_memory.state_dict().items() if not k.startswith("engram.")}
    plain = HyperLayer(tiny_v4(), 1, HIGH, LocalDispatcher(8)).eval()
    plain.load_state_dict(weights)
    after = with_memory.engram(x_BSND, Whole(tokens_BS))
    assert not torch.allclose(after, x_BSND, atol=1e-3)
    expected, _ = plain(after, Whole(tokens_BS))
    torch.testing.assert_close(with_memory(x_BSND, Whole(tokens_BS))[0], expected)


def test_the_mtp_layer_joins_each_stream_with_the_next_embedding() -> None:
    model = random_model(TINY_V4)
    layer = model.model.layers[-1]
    assert isinstance(layer, HyperMtpLayer)
    tokens_BS = random_tokens(2, 20, config=TINY_V4)
    hidden = hidden_of(TINY_V4, tokens_BS)
    following = model.model.embed_tokens(tokens_BS.roll(-1, 1))

    def norm(x: Tensor, by: RMSNorm) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * by.weight

    joined = [
        norm(following, layer.enorm) @ layer.e_proj.weight.T
        + norm(hidden[:, :, k], layer.hnorm) @ layer.h_proj.weight.T
        for k in range(4)
    ]
    block = HyperLayer(
        tiny_v4(num_hidden_layers=5, compress_ratios=(0, 4, 8, 4, 0)), 4, HIGH, LocalDispatcher(8)
    ).eval()
    missing, unexpected = block.load_state_dict(layer.state_dict(), strict=False)
    assert not missing
    own = {"enorm", "hnorm", "e_proj", "h_proj", "norm", "hc_head"}
    assert {name.split(".")[0] for name in unexpected} == own
    out = layer.hc_head(block(torch.stack(joined, dim=2), Whole(tokens_BS))[0])
    expected = norm(out, layer.norm)
    found, _ = layer.predict(hidden, following, Whole(tokens_BS))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_a_layer_of_any_kind_trains_every_parameter_that_the_language_loss_reaches(
    layer: int,
) -> None:
    model = random_model(tiny_v4(max_position_embeddings=64)).train()
    tokens_BS = random_tokens(2, 24, config=TINY_V4)
    block = model.model.layers[layer]
    out_BSND, _ = block(hidden_of(TINY_V4, tokens_BS), Whole(tokens_BS))
    out_BSND.square().mean().backward()
    silent = {n for n, p in block.named_parameters() if p.grad is None or not p.grad.any()}
    # Choosing passes no gradient: indexers learn from a loss of their own.
    assert silent == {n for n, _ in block.named_parameters() if "indexer" in n}
