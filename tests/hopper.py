"""Compiles the Triton products for Hopper on a machine without a GPU, and reads what was made.

    python -m tests.hopper        prints a JSON table: product -> `Loop` as a dict

Triton is told of a GPU that is not there, its launches only compile, and tensors lie on `meta`. The
machine code is taken apart by the tools that come with Triton. It tells what the hardware is asked
to do, and not how fast it does it.
"""

import contextlib
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from model.fp8 import triton as backend_module
from model.fp8.quantized import ACTIVATION, ALONG_TOKENS, BLOCK

CAPABILITY = 90
ROWS, WIDE, NARROW = 4096, 7168, 2048
"""Tokens, and the widths of DeepSeek-V3's model and of its experts."""


@dataclass(frozen=True)
class Loop:
    """What a product's loop over blocks of 128 contracted values has in machine code."""

    registers: int
    stack: int
    """Bytes that a thread spills."""
    products: int
    """Instructions of the tensor cores."""
    by_descriptor: int
    """Those that read both operands from shared memory."""
    byte_stores: int
    """Stores of single bytes to shared memory, as a transposition needs."""
    from_shared: int
    """Loads of operands from shared memory into registers."""
    late_loads: int
    """Loads from global memory into registers between the wait for a product and the loop's end."""


def read(cubin: bytes, tools: Path) -> Loop:
    """Of one compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run([str(tools / "cuobjdump"), "--dump-resource-usage", file.name])
        code = _run([str(tools / "nvdisasm"), "-c", file.name])
    loop = _loop(code.splitlines())
    wait = max(i for i, line in enumerate(loop) if "WARPGROUP.DEPBAR" in line)
    products = [line for line in loop if "QGMMA" in line]
    return Loop(
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        stack=int(re.findall(r"STACK:(\d+)", usage)[0]),
        products=len(products),
        by_descriptor=sum(re.search(r"E4M3 R\d+, gdesc", line) is not None for line in products),
        byte_stores=sum("STS.U8" in line for line in loop),
        from_shared=sum(re.search(r"\bLDSM|\bLDS\b(?! RZ)", line) is not None for line in loop),
        late_loads=sum(re.search(r"\bLDG\.", line) is not None for line in loop[wait:]),
    )


def _loop(lines: Sequence[str]) -> list[str]:
    """The innermost loop around the tensor cores' instructions."""
    found = [i for i, line in enumerate(lines) if "QGMMA" in line]
    labels = [i for i in range(found[0]) if re.match(r"\s*\.L_x_\d+:", lines[i])]
    name = lines[labels[-1]].strip().rstrip(":")
    (end, *_) = (i for i in range(found[-1], len(lines)) if "BRA" in lines[i] and name in lines[i])
    return list(lines[labels[-1] : end])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


class _Absent:
    """A driver of a GPU that is not there."""

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def build() -> dict[str, Any]:
    """Each of the three products at a width of DeepSeek-V3, compiled."""
    made: list[Any] = []
    compile_only = JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **settings: Any) -> Any:
        made.append(compile_only(self, *arguments, grid=grid, warmup=True, **settings))
        return made[-1]

    triton.runtime.driver.set_active(_Absent())
    JITFunction.run = run
    torch.cuda.get_device_capability = lambda device=None: divmod(CAPABILITY, 10)
    backend_module._launching = lambda x: contextlib.nullcontext()
    backend = backend_module.Triton(torch.bfloat16)
    x = torch.empty(ROWS, WIDE, dtype=torch.bfloat16, device="meta")
    grad = torch.empty(ROWS, NARROW, dtype=torch.bfloat16, device="meta")
    weight = backend.quantize(torch.empty(NARROW, WIDE, device="meta"), BLOCK)
    backend.matmul(backend.quantize(x, ACTIVATION), weight.T)
    backend.matmul(backend.quantize(grad, ACTIVATION), weight)
    backend.grouped_outer(
        backend.quantize(grad, ALONG_TOKENS), backend.quantize(x, ALONG_TOKENS), [ROWS]
    )
    # In the order in which they were called; casts are others.
    products = [one for one in made if one.name in ("multiply", "outer")]
    return dict(zip(("forward", "input_gradient", "weight_gradient"), products, strict=True))


if __name__ == "__main__":
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = {name: asdict(read(one.asm["cubin"], tools)) for name, one in build().items()}
    print(json.dumps(found))
