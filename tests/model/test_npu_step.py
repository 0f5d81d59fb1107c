"""Whether torch_npu takes what a model asks of it: a training step, a step of decoding, and the
attention of DeepSeek-V3's widths, with its own shapes and derivatives and without an NPU.
"""

from functools import cache
from typing import Any

import pytest

from tests.devices import RECIPES, ROWS, TOKENS
from tests.npu_dispatch import ask, missing

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def torch_npu() -> None:
    if reason := missing():
        pytest.skip(reason)


def count(calls: dict[str, int], *named: str) -> int:
    """Calls of the operation that is named first, with the other words in what it was given."""
    first, *others = named
    return sum(
        times
        for call, times in calls.items()
        if call.split()[0] == first and all(other in call for other in others)
    )


@cache
def trained(recipe: str, compute: str) -> dict[str, Any]:
    found: dict[str, Any] = ask("tests.npu_step:train", recipe, compute)
    return found


# In float32 too: a gradient that gets lost is missed there alone, for a weight that is cast is
# given zeros then.
@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_training_step_gives_every_parameter_its_gradient(recipe: str, compute: str) -> None:
    found = trained(recipe, compute)
    assert found["device"] == "Ascend910B3"
    assert found["parameters"] > 50
    assert found["faults"] == {}
    assert {"expert_load", "grad_norm", "imbalance"} <= set(found["told"])
    # Up and down, and each of their gradients.
    moe_layers = found["moe_layers"]
    assert moe_layers >= 2
    assert count(found["calls"], "npu_grouped_matmul", "by axis 0") == 4 * moe_layers
    assert count(found["calls"], "npu_grouped_matmul", "by axis 2") == 2 * moe_layers


def test_a_training_step_attends_in_documents_by_the_kernel() -> None:
    found = trained("tiny", "bfloat16")
    assert count(found["calls"], "npu_fusion_attention") == found["layers"]
    assert count(found["calls"], "npu_fusion_attention_grad") == found["layers"]


def test_attention_takes_values_narrower_than_keys() -> None:
    heads, width, width_of_values = 4, 192, 128
    found = ask("tests.npu_step:attend", heads, width, width_of_values)
    assert found["out"] == told(ROWS, TOKENS, heads, width_of_values)
    assert found["q"] == found["k"] == told(ROWS, heads, TOKENS, width)
    assert found["v"] == told(ROWS, heads, TOKENS, width_of_values)
    given = f"[{ROWS * TOKENS}, {heads}, {width_of_values}]"
    assert count(found["calls"], "npu_fusion_attention", given) == 1
    assert count(found["calls"], "npu_fusion_attention_grad", given) == 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_of_decoding_gives_logits(recipe: str) -> None:
    found = ask("tests.npu_step:decode", recipe)
    assert found["logits"] == f"torch.float32[{ROWS}, 1024] on npu"
    # Of the prompts, and of the step.
    assert count(found["calls"], "npu_grouped_matmul", "by axis 0") == 2 * 2 * found["moe_layers"]


def told(*shape: int) -> str:
    return f"torch.bfloat16{list(shape)} on npu"
