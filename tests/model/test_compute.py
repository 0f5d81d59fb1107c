"""float32 weights and gradients under states and products in bfloat16."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from configs.model import ModelConfig
from model.decode import sample
from model.drawing import Drawing
from model.fp8.scheme import Numerics
from model.loss import linear_cross_entropy
from model.passes import Caches
from model.transformer import Transformer
from model.weight_cache import forget, keep
from model.widening import add_wide_mm, wide_linear, wide_mm
from tests.model.test_engram import MEMORY
from tests.references import random_tokens, tiny, tiny_v4, tiny_v32

CONFIGS = {
    "v3": tiny(num_nextn_predict_layers=1),
    "v32": tiny_v32(),
    "v4": tiny_v4(),
    "engram": tiny(engram=MEMORY),
}
NARROW = Numerics(compute=torch.bfloat16)


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    chosen: ModelConfig = CONFIGS[request.param]
    return chosen


def model_of(config: ModelConfig, numerics: Numerics) -> Transformer:
    """Weights large enough that states are of size 1."""
    wide = config.model_copy(update={"initializer_range": 0.15})
    return Transformer(wide, precision=numerics).initialize(0).train()


def loss_of(model: Transformer) -> Tensor:
    tokens_BS = random_tokens(2, 24, config=model.config)
    predicted = model.predict(tokens_BS)
    loss = linear_cross_entropy(
        predicted.next_BSD[:, :-1].flatten(0, 1), model.lm_head.weight, tokens_BS[:, 1:].flatten()
    )
    if predicted.after_next_BSD is not None:
        loss = loss + predicted.after_next_BSD.float().square().sum()
    return loss / tokens_BS.numel()


def gap(found: Tensor, wanted: Tensor) -> float:
    """Of the largest value, as a share."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def test_gradients_are_float32_and_near_those_of_float32(config: ModelConfig) -> None:
    losses, gradients = [], []
    for numerics in (NARROW, Numerics()):
        model = model_of(config, numerics)
        loss = loss_of(model)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    narrow, wide = gradients
    assert narrow.keys() == wide.keys()
    assert all(grad.dtype == torch.float32 for grad in narrow.values())
    # A few layers, each of which rounds to 8 bits: 2^-9 a value, of which errors mostly cancel.
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    one, other = (torch.cat([g.flatten() for g in each.values()]) for each in (narrow, wide))
    assert float(one @ other) > 0.98 * float(one.norm() * other.norm())


class Products(TorchDispatchMode):
    """The types of each matrix product's operands."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[tuple[torch.dtype, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.seen.add(tuple(one.dtype for one in args if isinstance(one, Tensor)))
        return func(*args, **(kwargs or {}))


def test_no_product_is_of_two_types(config: ModelConfig) -> None:
    with Products() as products:
        loss_of(model_of(config, NARROW)).backward()
    assert (torch.bfloat16, torch.bfloat16) in products.seen
    assert all(len(set(types)) == 1 for types in products.seen)


def test_states_and_caches_are_narrow_and_logits_are_not(config: ModelConfig) -> None:
    model = model_of(config, NARROW).eval()
    tokens_BS = random_tokens(1, 8, config=config)
    with torch.no_grad():
        assert model.predict(tokens_BS).next_BSD.dtype == torch.bfloat16
        assert model(tokens_BS).dtype == torch.float32
    caches: Caches = model.new_caches(2, 16)
    kinds = {tensor.dtype for cache in caches.values() for tensor in cache.values()}
    assert kinds <= {torch.bfloat16, torch.int64}
    assert torch.bfloat16 in kinds


def test_decoding_reads_the_same_as_a_whole_pass(config: ModelConfig) -> None:
    model = model_of(config, NARROW).eval()
    prompt = random_tokens(1, 9, config=config)[0].tolist()
    (answer,) = sample(
        model, [prompt], max_new_tokens=6, drawing=Drawing(), stop_tokens=(), seeds=[0]
    )
    with torch.no_grad():
        logits_V = model(torch.tensor([prompt + answer.token_ids]))[0, len(prompt) - 1 : -1]
    table = logits_V.log_softmax(-1)
    for row, token, logprob in zip(table, answer.token_ids, answer.logprobs, strict=True):
        # Of two that are as near as rounding, either may come out ahead.
        assert float(row[token]) >= float(row.max()) - 0.05
        assert logprob == pytest.approx(float(row[token]), abs=0.05)


def test_weights_that_were_kept_are_cast_again_once_they_have_changed() -> None:
    model = model_of(CONFIGS["v3"], NARROW)
    keep(model)
    before = float(loss_of(model).detach())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    forget(model)
    fresh = model_of(CONFIGS["v3"], NARROW)
    fresh.load_state_dict(model.state_dict())
    assert float(loss_of(model).detach()) == float(loss_of(fresh).detach()) != before


@pytest.mark.parametrize("product", [wide_mm, lambda a, b: wide_linear(a, b.T)])
def test_products_of_narrow_values_are_float32(product: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(8, 8, generator=generator).bfloat16() for _ in range(2))
    found = product(a, b)
    assert found.dtype == torch.float32
    assert gap(found.double(), a.double() @ b.double()) < 2**-20


def test_a_wide_linear_has_the_gradients_of_a_product() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 8, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(6, 8, generator=generator).requires_grad_()
    slope = torch.randn(2, 5, 6, generator=generator)
    found = torch.autograd.grad(wide_linear(x, weight), (x, weight), slope)
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, weight)]
    wanted = torch.autograd.grad(exact[0] @ exact[1].T, exact, slope.double())
    assert [one.dtype for one in found] == [torch.bfloat16, torch.float32]
    for one, other in zip(found, wanted, strict=True):
        assert gap(one.double(), other) < 0.02


def test_sums_of_narrow_products_are_added_up_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(8, 8, generator=generator).bfloat16() for _ in range(2))
    total = torch.full((8, 8), 1000.0)
    add_wide_mm(total, a, b)
    assert gap(total.double() - 1000, a.double() @ b.double()) < 2**-12
