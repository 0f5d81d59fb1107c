"""What Triton makes of the products for Hopper, where there is no GPU: read from machine code."""

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


def tools() -> Path | None:
    """Where Triton keeps what takes machine code apart; none where it is not there."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
    return folder if (folder / "nvdisasm").is_file() else None


pytestmark = pytest.mark.skipif(tools() is None, reason="this Triton brings no nvdisasm")


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By product; compiled in a process in which Triton does not interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.hopper"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("product", ["forward", "input_gradient", "weight_gradient"])
def test_a_block_is_multiplied_without_spills_and_without_a_load_behind_the_product(
    loops: dict[str, dict[str, Any]], product: str
) -> None:
    loop = loops[product]
    assert loop["stack"] == 0
    assert loop["registers"] <= REGISTERS
    # 128 contracted values, 32 at a time; scales are there before the product ends.
    assert loop["products"] == loop["by_descriptor"] == 4
    assert loop["late_loads"] == 0


@pytest.mark.parametrize("product", ["forward", "weight_gradient"])
def test_operands_go_from_shared_memory_to_the_tensor_cores(
    loops: dict[str, dict[str, Any]], product: str
) -> None:
    """Not so the input gradient's weights, which are transposed byte by byte."""
    assert loops[product]["byte_stores"] == loops[product]["from_shared"] == 0
