"""What Triton makes of the kernels where there is no GPU: read from machine code.

For Hopper, and for two older kinds: Ada (sm_89), which multiplies FP8 from registers, and Ampere
(sm_80), which multiplies it as bfloat16.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
REGISTERS = 65536 // 256
"""Of a thread, if a program of 256 threads is to fit a multiprocessor."""
BY_BLOCK = ["forward", "input_gradient", "experts_forward", "experts_input_gradient"]
"""Products with a matrix whose scales belong to blocks."""
ALONG_TOKENS = ["weight_gradient", "experts_weight_gradient"]
CASTS = [
    "cast_activations",
    "cast_gradients",
    "cast_weights",
    "cast_again_along_tokens",
    "cast_along_tokens",
    "cast_experts_again",
    "cast_experts_along_tokens",
    "uncast",
    "cast_to_e5m6",
    "uncast_e5m6",
]


def tools() -> Path | None:
    """Where Triton keeps what takes machine code apart; none where it is not there."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
    return folder if (folder / "nvdisasm").is_file() else None


pytestmark = [
    pytest.mark.skipif(tools() is None, reason="this Triton brings no nvdisasm"),
    pytest.mark.slow,
]

Table = dict[str, dict[str, Any]]


def compiled(capability: int, cache: Path) -> Table:
    """By kernel; compiled in a process in which Triton does not interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, "-m", "tests.hopper", str(capability)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    found: Table = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return compiled(90, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("product", [*BY_BLOCK, *ALONG_TOKENS])
def test_a_block_is_multiplied_without_a_load_behind_the_product(
    hopper: Table, product: str
) -> None:
    loop = hopper[product]["loop"]
    # 128 contracted values, 32 at a time; scales are there before the product ends.
    assert loop["products"] == 4
    assert loop["late_loads"] == 0


@pytest.mark.parametrize("product", [*BY_BLOCK, *ALONG_TOKENS])
def test_operands_go_from_shared_memory_to_the_tensor_cores(hopper: Table, product: str) -> None:
    """Experts' rows begin anywhere, and weights are read both ways; nothing is transposed here."""
    loop = hopper[product]["loop"]
    assert loop["by_descriptor"] == loop["products"]
    assert loop["byte_stores"] == loop["from_shared"] == 0


@pytest.mark.parametrize(
    ("products", "most"), [(BY_BLOCK, 190), (ALONG_TOKENS, 310)], ids=["by block", "along tokens"]
)
def test_a_block_takes_few_instructions(hopper: Table, products: list[str], most: int) -> None:
    """512 cycles of the tensor cores are to be filled; a scheduler has two warps to issue for."""
    assert max(hopper[product]["loop"]["instructions"] for product in products) <= most


def assert_nothing_spills(found: Table) -> None:
    assert set(found) == {*BY_BLOCK, *ALONG_TOKENS, *CASTS}
    assert {name: code["stack"] for name, code in found.items()} == dict.fromkeys(found, 0)
    assert max(code["registers"] for code in found.values()) < REGISTERS


def test_nothing_spills_on_hopper(hopper: Table) -> None:
    assert_nothing_spills(hopper)


@pytest.mark.parametrize("capability", [80, 89])
def test_nothing_spills_on_older_devices(capability: int, tmp_path: Path) -> None:
    assert_nothing_spills(compiled(capability, tmp_path))
