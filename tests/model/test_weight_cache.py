import gc

import torch
from torch import nn

from model import weight_cache
from model.weight_cache import cached, cast, forget, keep


def test_a_cast_is_made_once_and_again_after_the_weights_have_changed() -> None:
    layer = nn.Linear(4, 3, bias=False)
    keep(layer)
    with torch.no_grad():
        first = cast(layer.weight, torch.bfloat16)
        assert cast(layer.weight, torch.bfloat16) is first
        layer.weight.add_(1)
        forget(layer)
        second = cast(layer.weight, torch.bfloat16)
    assert torch.equal(second, layer.weight.bfloat16())
    assert not torch.equal(first, second)


def test_nothing_is_kept_of_a_model_that_nobody_asked_to_keep() -> None:
    weight = nn.Parameter(torch.randn(4, 3))
    before = cast(weight, torch.bfloat16)
    with torch.no_grad():
        weight.add_(1)
    assert torch.equal(cast(weight, torch.bfloat16), weight.bfloat16())
    assert not torch.equal(cast(weight, torch.bfloat16), before)


def test_the_gradient_of_a_cast_weight_has_its_own_type_also_the_second_time() -> None:
    layer = nn.Linear(4, 3, bias=False)
    keep(layer)
    x = torch.randn(5, 4, dtype=torch.bfloat16)
    for times in (1, 2):
        nn.functional.linear(x, cast(layer.weight, torch.bfloat16)).sum().backward()
        wanted = x.float().sum(0).expand(3, 4) * times
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == torch.float32
        torch.testing.assert_close(layer.weight.grad, wanted, atol=0.05 * times, rtol=0.01)


def test_forms_are_told_apart_and_freed_with_their_weight() -> None:
    layers = [nn.Linear(4, 3, bias=False)]
    asked: list[str] = []
    keep(layers[0])

    def make(form: str) -> str:
        def made() -> str:
            asked.append(form)
            return form

        return cached(layers[0].weight, form, made)

    assert [make("rows"), make("columns"), make("rows")] == ["rows", "columns", "rows"]
    assert asked == ["rows", "columns"]
    held = len(weight_cache._kept)
    layers.clear()
    gc.collect()
    assert len(weight_cache._kept) == held - 1


def test_a_weight_that_has_the_type_is_itself() -> None:
    weight = nn.Parameter(torch.randn(2, 2))
    assert cast(weight, torch.float32) is weight


def test_weights_that_were_loaded_are_cast_again() -> None:
    layer, other = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
    keep(layer)
    cast(layer.weight, torch.bfloat16)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(cast(layer.weight, torch.bfloat16), other.weight.bfloat16())


def test_what_was_made_while_sampling_learns_afterwards() -> None:
    layer = nn.Linear(4, 3, bias=False)
    keep(layer)
    x = torch.randn(5, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.inference_mode():
        cast(layer.weight, torch.bfloat16)
    nn.functional.linear(x, cast(layer.weight, torch.bfloat16)).sum().backward()
    assert layer.weight.grad is not None
