"""Compiles the Triton kernels for a GPU on a machine without one, and reads what was made.

    python -m tests.hopper [CAPABILITY]        prints JSON: kernel -> `Code` as a dict; 90 is Hopper

Triton is told of a GPU that is not there, its launches only compile, and tensors lie on `meta`. The
machine code is taken apart by the tools that come with Triton. It tells what the hardware is asked
to do, and not how fast it does it.
"""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from model.fp8 import triton as backend_module
from model.fp8.groups import Groups
from model.fp8.quantized import ACTIVATION, ALONG_TOKENS, BLOCK

HOPPER = 90
ROWS, WIDE, NARROW = 4096, 7168, 2048
"""Tokens, and the widths of DeepSeek-V3's model and of its experts."""
EXPERTS = 32


@dataclass(frozen=True)
class Code:
    """What a kernel asks of the hardware."""

    registers: int
    stack: int
    """Bytes that a thread spills."""
    loop: "Loop | None"
    """None of casts, which have no tensor cores' instructions."""


@dataclass(frozen=True)
class Loop:
    """What a product's loop over blocks of 128 contracted values has in machine code."""

    instructions: int
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


def read(cubin: bytes, tools: Path) -> Code:
    """Of one compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run([str(tools / "cuobjdump"), "--dump-resource-usage", file.name])
        code = _run([str(tools / "nvdisasm"), "-c", file.name])
    return Code(
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        stack=int(re.findall(r"STACK:(\d+)", usage)[0]),
        loop=_read_loop(code.splitlines()) if "QGMMA" in code else None,
    )


def _read_loop(lines: Sequence[str]) -> Loop:
    loop = _loop(lines)
    wait = max(i for i, line in enumerate(loop) if "WARPGROUP.DEPBAR" in line)
    products = [line for line in loop if "QGMMA" in line]
    return Loop(
        instructions=sum(re.search(r"/\*[0-9a-f]{4,}\*/", line) is not None for line in loop),
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

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def build(capability: int = HOPPER) -> dict[str, Any]:
    """The casts and products of a Linear and of experts at widths of DeepSeek-V3, compiled."""
    made: list[Any] = []
    compile_only = JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **settings: Any) -> Any:
        made.append(compile_only(self, *arguments, grid=grid, warmup=True, **settings))
        return made[-1]

    triton.runtime.driver.set_active(_Absent(capability))
    JITFunction.run = run
    torch.cuda.get_device_capability = lambda device=None: divmod(capability, 10)
    backend_module._launching = lambda x: contextlib.nullcontext()
    found: dict[str, Any] = {}

    def named(name: str, call: Callable[[], Any]) -> Any:
        """What `call` gives; the one kernel that it launches goes by this name."""
        result = call()
        (found[name],) = made
        made.clear()
        return result

    backend = backend_module.Triton(torch.bfloat16)
    x = torch.empty(ROWS, WIDE, dtype=torch.bfloat16, device="meta")
    dy = torch.empty(ROWS, NARROW, dtype=torch.bfloat16, device="meta")
    w = torch.empty(NARROW, WIDE, device="meta")
    x8, dy8 = (
        named(name, partial(backend.quantize, t, ACTIVATION))
        for name, t in (("cast_activations", x), ("cast_gradients", dy))
    )
    w8 = named("cast_weights", lambda: backend.quantize(w, BLOCK, by_column=True))
    named("forward", lambda: backend.matmul(x8, w8.T))
    named("input_gradient", lambda: backend.matmul(dy8, w8))
    x_tokens, dy_tokens = (
        named(name, partial(backend.quantize, t, ALONG_TOKENS))
        for name, t in (("cast_again_along_tokens", x8), ("cast_along_tokens", dy))
    )
    named("weight_gradient", lambda: backend.matmul(dy_tokens.T, x_tokens))
    # The host does not know how many rows an expert has.
    groups = Groups(torch.empty(EXPERTS, dtype=torch.int64, device="meta"), ROWS)
    experts8 = backend.quantize(w.expand(EXPERTS, -1, -1), BLOCK, by_column=True)
    made.clear()
    named("experts_forward", lambda: backend.grouped_matmul(x8, experts8.T, groups))
    named("experts_input_gradient", lambda: backend.grouped_matmul(dy8, experts8, groups))
    x_tokens, dy_tokens = (
        named(name, partial(backend.quantize, t, ALONG_TOKENS, groups=groups))
        for name, t in (("cast_experts_again", x8), ("cast_experts_along_tokens", dy))
    )
    named("experts_weight_gradient", lambda: backend.grouped_outer(dy_tokens, x_tokens, groups))
    named("uncast", lambda: backend.dequantize(x8))
    twelve = named("cast_to_e5m6", lambda: backend.quantize_e5m6(x))
    named("uncast_e5m6", lambda: backend.dequantize_e5m6(twelve))
    return found


if __name__ == "__main__":
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    kernels = build(*map(int, sys.argv[1:2]))
    print(
        json.dumps({name: asdict(read(one.asm["cubin"], tools)) for name, one in kernels.items()})
    )
