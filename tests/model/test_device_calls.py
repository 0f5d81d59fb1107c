"""What DeepSeek-V3's widths call on a CUDA device, forward and backward, with bfloat16 states.

On the device without values of `tests.fake_cuda`; each answer comes from a process of its own.
"""

from collections.abc import Mapping
from typing import Any

import pytest

from tests.fake_cuda import ask, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

MOE_CALLS = 300
"""At some 5 us a call on the host 1.5 ms, which a layer's products outlast with 4,096 tokens."""
IN_FLOAT32 = {
    "model/moe.py Gate.forward",
    # The path of `scaled_dot_product_attention` without a fused kernel, and the way back of both.
    "model/causal.py causal_attention",
    "autograd",
}


@pytest.fixture(scope="module")
def moe() -> dict[int, dict[str, Any]]:
    """Of an MoE layer, by its number of experts."""
    return {experts: ask("tests.fake_calls:calls_of_moe", experts) for experts in (32, 64)}


@pytest.fixture(scope="module")
def step() -> dict[str, Any]:
    """Of a dense layer, an MoE layer, the MTP layer, heads and losses."""
    found: dict[str, Any] = ask("tests.fake_calls:calls_of_step", 2)
    return found


def types(products: Mapping[str, int]) -> dict[str, set[str]]:
    """The places of products, by the types of what is multiplied."""
    places: dict[str, set[str]] = {}
    for product in products:
        factors, _, where = product.partition(" in ")
        places.setdefault(factors, set()).add(where)
    return places


def test_the_calls_of_an_moe_layer_do_not_grow_with_its_experts(
    moe: dict[int, dict[str, Any]],
) -> None:
    few, many = (sum(moe[experts]["calls"].values()) for experts in (32, 64))
    assert few == many <= MOE_CALLS, moe[64]["calls"]


def test_an_moe_layer_multiplies_in_its_states_type(moe: dict[int, dict[str, Any]]) -> None:
    found = types(moe[32]["products"])
    assert "model/moe.py Gate.forward" in found.pop("float32 x float32")
    assert set(found) == {"bfloat16 x bfloat16"}


def test_a_pass_of_the_loss_is_never_waited_for(step: dict[str, Any]) -> None:
    assert step["reads"] == 0, step["calls"]


def test_a_pass_of_the_loss_multiplies_equal_types(step: dict[str, Any]) -> None:
    """The head, too, is multiplied in the states' type; parameters' gradients are float32."""
    found = types(step["products"])
    assert found.pop("float32 x float32") <= IN_FLOAT32
    assert set(found) == {"bfloat16 x bfloat16"}
    assert any("model/loss.py" in place for place in found["bfloat16 x bfloat16"])
