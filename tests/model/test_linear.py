"""The Linear seam: three FP8 GEMMs as the paper writes them, and plain ones beside."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from configs.train import Precision
from model.fp8.backends import quantize
from model.fp8.linear import Linear, together
from model.fp8.quantized import Quantized, Saved
from model.fp8.scheme import Fp8, Numerics
from tests.memory import saved_tensors
from tests.references import fp8_products

SHAPES = [(1, 16, 16), (40, 128, 256), (200, 130, 48), (129, 300, 129)]
"""(tokens, inputs, outputs); most of them ragged."""


def linear(
    inputs: int, outputs: int, precision: Precision, seed: int = 0, *, saves_e5m6: bool = False
) -> Linear:
    scheme = Numerics(precision).of("attention", saves_e5m6=saves_e5m6)
    made = Linear(inputs, outputs, scheme)
    torch.nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(seed))
    return made


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_contracts_quantised_operands_in_all_three_gemms(shape: tuple[int, int, int]) -> None:
    tokens, inputs, outputs = shape
    layer = linear(inputs, outputs, "fp8")
    x, dy = random(tokens, inputs).requires_grad_(), random(tokens, outputs, seed=2)
    y = layer(x)
    y.backward(dy)
    expected = fp8_products(x.detach(), layer.weight.detach(), dy)
    for found, reference in zip((y.detach(), x.grad, layer.weight.grad), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-4)
    # Not the unquantised product: the test above could not fail otherwise.
    assert float((y.detach() - x.detach() @ layer.weight.detach().T).abs().max()) > 1e-2


@pytest.mark.parametrize("shape", SHAPES)
def test_after_attention_the_weights_gradient_comes_from_twelve_bits(
    shape: tuple[int, int, int],
) -> None:
    tokens, inputs, outputs = shape
    layer = linear(inputs, outputs, "fp8", saves_e5m6=True)
    x, dy = random(tokens, inputs).requires_grad_(), random(tokens, outputs, seed=2)
    y = layer(x)
    y.backward(dy)
    known = x.detach(), layer.weight.detach(), dy
    expected = fp8_products(*known, saves_e5m6=True)
    for found, reference in zip((y.detach(), x.grad, layer.weight.grad), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-4)
    from_eight_bits = fp8_products(*known)[2]
    assert layer.weight.grad is not None
    assert float((layer.weight.grad - from_eight_bits).abs().max()) > 1e-3


def test_the_forward_product_sums_scaled_blocks_of_integers() -> None:
    """C[m, n] = sum over blocks k of s_A[m, k] s_B[n / 128, k] (A8 B8^T over the block alone)."""
    layer = linear(300, 200, "fp8")
    x = random(9, 300)
    a, b = quantize(x, (1, 128)), quantize(layer.weight.detach(), (128, 128))
    expected = torch.zeros(9, 200, dtype=torch.float64)
    for k in range(3):
        inside = slice(k * 128, (k + 1) * 128)
        product = a.values[:, inside].double() @ b.values[:, inside].double().T
        scale_N = b.scales[:, k].double().repeat_interleave(128)[:200]
        expected += product * a.scales[:, k, None].double() * scale_N
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp8", "high"])
def test_together_is_each_linear_alone(precision: Precision) -> None:
    layers = [linear(130, outputs, precision, seed=outputs) for outputs in (24, 200)]
    x = random(2, 70, 130)
    dy = [random(2, 70, outputs, seed=outputs) for outputs in (24, 200)]
    shared = x.clone().requires_grad_()
    outputs = together(shared, *layers)
    torch.autograd.backward(outputs, dy)
    grads = [layer.weight.grad for layer in layers]
    dx = torch.zeros_like(x)
    for layer, y, one_dy, grad in zip(layers, outputs, dy, grads, strict=True):
        layer.weight.grad = None
        alone = x.clone().requires_grad_()
        expected = layer(alone)
        expected.backward(one_dy)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        torch.testing.assert_close(grad, layer.weight.grad, rtol=0, atol=0)
        assert alone.grad is not None
        dx += alone.grad
    torch.testing.assert_close(shared.grad, dx)


def test_an_output_that_nobody_uses_costs_its_linear_no_gradient() -> None:
    used, unused = linear(16, 8, "fp8"), linear(16, 8, "fp8")
    together(random(3, 16), used, unused)[0].sum().backward()
    assert unused.weight.grad is not None
    assert not unused.weight.grad.any()
    assert used.weight.grad is not None
    assert used.weight.grad.any()


def saved_by(action: Callable[[], object]) -> list[Tensor]:
    """What is saved for a backward pass by `action`."""
    with saved_tensors() as saved:
        action()
    return saved


def test_a_byte_a_value_is_saved_for_the_backward_pass() -> None:
    layers = [linear(300, outputs, "fp8") for outputs in (40, 200)]
    x = random(50, 300).requires_grad_()
    saved = saved_by(lambda: together(x, *layers))
    sizes = sorted((t.element_size(), t.numel()) for t in saved)
    values = [(1, 40 * 300), (1, 50 * 300), (1, 200 * 300)]
    scales = [(4, 3), (4, 2 * 3), (4, 50 * 3)]
    assert sizes == sorted(values + scales)
    exact = saved_by(lambda: together(x, linear(300, 40, "high")))
    assert all(t.element_size() == 4 for t in exact)


def test_twelve_bits_a_value_are_saved_after_attention() -> None:
    layer = linear(304, 40, "fp8", saves_e5m6=True)
    x = random(50, 304).requires_grad_()
    words, x_scales, weight, weight_scales = saved_by(lambda: layer(x))
    assert words.nbytes * 2 == 50 * 304 * 3
    assert (x_scales.numel(), weight.nbytes, weight_scales.numel()) == (50 * 3, 40 * 304, 3)
    mantissa, _ = torch.frexp(x_scales)
    assert bool((mantissa == 0.5).all())


@pytest.mark.parametrize("saves_e5m6", [False, True])
def test_where_nothing_learns_nothing_is_saved(
    monkeypatch: pytest.MonkeyPatch, saves_e5m6: bool
) -> None:
    layer, x = linear(304, 40, "fp8", saves_e5m6=saves_e5m6), random(50, 304)
    input_to_save, written = Fp8.input_to_save, list[int]()

    def counted(self: Fp8, x: Tensor, x8: Quantized) -> Saved:
        written.append(1)
        return input_to_save(self, x, x8)

    monkeypatch.setattr(Fp8, "input_to_save", counted)

    def silently() -> Tensor:
        with torch.no_grad():
            y: Tensor = layer(x)
        return y

    assert saved_by(silently) == []
    assert written == []
    assert torch.equal(silently(), layer(x))
    assert written == [1]


def test_an_input_that_learns_nothing_costs_no_product() -> None:
    layer = linear(48, 40, "fp8")
    assert layer.scheme is not None
    seen = layer.scheme.recorder

    def roles(x: Tensor) -> set[str]:
        seen.start(counting=True)
        layer(x).backward(random(9, 40, seed=2))
        seen.stop()
        return {role.removeprefix("attention_") for role in seen.tallies}

    always = {"activations", "weights", "activations_along_tokens", "gradients_along_tokens"}
    assert roles(random(9, 48)) == always
    assert roles(random(9, 48).requires_grad_()) == always | {"gradients"}


def test_a_weight_that_is_held_still_costs_no_gradient() -> None:
    still, learning = linear(48, 40, "fp8"), linear(48, 24, "fp8")
    learning.scheme = still.scheme
    still.weight.requires_grad_(False)
    assert still.scheme is not None
    seen = still.scheme.recorder
    seen.start(counting=True)
    x = random(9, 48).requires_grad_()
    first, second = together(x, still, learning)
    (first.sum() + second.sum()).backward()
    assert still.weight.grad is None
    assert learning.weight.grad is not None
    assert seen.tallies["attention_gradients"].nonzero == 9 * (40 + 24)
    assert seen.tallies["attention_gradients_along_tokens"].nonzero == 9 * 24


def test_linears_of_different_schemes_share_no_quantisation() -> None:
    with pytest.raises(AssertionError, match="one quantisation serves one scheme"):
        together(random(9, 48), linear(48, 40, "fp8"), linear(48, 40, "high"))
    # Who is told, and what it has seen, is no part of how products are computed.
    seen, fresh = linear(48, 40, "fp8"), linear(48, 40, "fp8")
    assert seen.scheme is not None
    seen.scheme.recorder.start(counting=True)
    together(random(9, 48), seen)
    seen.scheme.recorder.stop()
    assert seen.scheme == fresh.scheme


def test_high_precision_is_the_plain_product() -> None:
    layer = linear(48, 40, "high")
    x, dy = random(3, 5, 48).requires_grad_(), random(3, 5, 40, seed=2)
    y = layer(x)
    y.backward(dy)
    assert torch.equal(y, F.linear(x, layer.weight))
    flat_dy, flat_x = dy.double().flatten(0, 1), x.detach().double().flatten(0, 1)
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad.double(), flat_dy.T @ flat_x, rtol=1e-5, atol=1e-5)
    dx = (dy.double() @ layer.weight.detach().double()).float()
    torch.testing.assert_close(x.grad, dx, rtol=1e-5, atol=1e-5)


def test_no_tokens_make_no_output_and_no_gradient() -> None:
    layer = linear(16, 8, "fp8")
    y = layer(torch.zeros(0, 16))
    y.sum().backward()
    assert y.shape == (0, 8)
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()
