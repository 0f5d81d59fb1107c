"""Weight gradients that are left for later are those that would have been made at once."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from configs.train import Precision
from model import weight_gradients
from model.fp8.linear import Linear
from model.fp8.scheme import Numerics
from model.moe import RoutedExperts
from model.transformer import Transformer
from model.weight_cache import cast, keep
from model.weight_gradients import Left, later
from tests.layouts import MODELS, Layout, loss, rows

ONE = Layout()


def built(name: str, numerics: Precision | Numerics, *, exact: bool) -> Transformer:
    model = Transformer(MODELS[name][0], precision=numerics).initialize(0).train()
    keep(model)
    return model.double() if exact else model


def went_back(model: Transformer, name: str) -> None:
    """One forward and one backward pass of the family's loss."""
    batch, asked = rows(1, ONE, 0), loss(name)
    value, _ = asked(model.predictions(asked.reads(batch)), batch, asked.counts(batch))
    value.backward()


def grads(model: Transformer) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


NUMERICS = {
    "float64": ("high", True),
    "fp8": ("fp8", False),
    "bfloat16": (Numerics(compute=torch.bfloat16), False),
}


@pytest.mark.parametrize("kind", NUMERICS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_left_is_made_by_the_flush(name: str, kind: str) -> None:
    numerics, exact = NUMERICS[kind]
    plain = built(name, numerics, exact=exact)  # type: ignore[arg-type]
    if kind == "bfloat16":
        # Not by the C that makes all gradients in one call, whose sums are its own.
        with later() as left:
            went_back(plain, name)
            left.flush()
    else:
        went_back(plain, name)
    wanted = grads(plain)
    model = built(name, numerics, exact=exact)  # type: ignore[arg-type]
    with later() as left:
        went_back(model, name)
    early = grads(model)
    products = {
        f"{module_name}.{leaf}"
        for module_name, module in model.named_modules()
        if isinstance(module, Linear | RoutedExperts)
        for leaf, _ in module.named_parameters(recurse=False)
    }
    # The head's is made with the loss; a grouped projection in high precision is no Linear's.
    made_early = {one for one in products & early.keys() if "lm_head" not in one}
    assert not {one for one in made_early if "o_a_proj" not in one}, made_early
    assert wanted.keys() - early.keys() >= {one for one in products if "experts" in one}
    left.flush()
    assert not left.waiting
    found = grads(model)
    assert found.keys() == wanted.keys()
    for parameter, tensor in wanted.items():
        assert torch.equal(found[parameter], tensor), parameter


def test_gradients_of_several_passes_add_up() -> None:
    model = built("v3", "high", exact=True)
    with later() as left:
        went_back(model, "v3")
        went_back(model, "v3")
    left.flush()
    twice = grads(model)
    model.zero_grad()
    went_back(model, "v3")
    for name, once in grads(model).items():
        torch.testing.assert_close(twice[name], 2 * once, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("held", [True, False])
def test_nothing_is_left_unasked(held: bool) -> None:
    model = built("v3", "high", exact=True)
    with later() if held else nullcontext(Left()) as left:
        assert weight_gradients.is_left() == held
        went_back(model, "v3")
        assert bool(left.waiting) == held
    assert not weight_gradients.is_left()


def test_a_copy_knows_its_weight() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 2))
    with later() as left:
        copy = cast(weight, torch.bfloat16)
        assert weight_gradients.gradients([copy], lambda: [torch.ones(3, 2)]) == [None]
    left.flush()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones(3, 2))


@pytest.mark.parametrize("kind", ["float64", "fp8"])
def test_what_does_not_learn_is_not_left(kind: str) -> None:
    numerics, exact = NUMERICS[kind]
    model = built("v3", numerics, exact=exact)  # type: ignore[arg-type]
    frozen = [model.get_parameter("model.layers.1.mlp.experts.down_proj")]
    frozen += list(model.get_submodule("model.layers.0.mlp").parameters())
    for weight in frozen:
        weight.requires_grad_(False)
    with later() as left:
        went_back(model, "v3")
    left.flush()
    assert not any(weight.grad is not None for weight in frozen)
    assert model.get_parameter("model.layers.1.mlp.experts.gate_up_proj").grad is not None
