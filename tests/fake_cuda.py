"""A CUDA device without memory, for torch built for CPUs: shapes, types and calls at full width.

Under torch's `FakeTensorMode` tensors have a shape, a type and a device, but no values, so that
layers of DeepSeek-V3's widths run forward and backward in seconds. torch built for CPUs ends the
process at the first gradient of such a tensor, unless `fake_cuda.cpp` speaks for the device. That
must be loaded before torch is, so functions run in a process of their own:

    ask("tests.fake_calls:calls_of_moe", 32)       what the function returns, through JSON

It shows what is called, in which shapes and types. It shows no values, no speed, and no memory that
kernels would need; `scaled_dot_product_attention` takes the path of plain products.
"""

import ctypes
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCE = Path(__file__).with_suffix(".cpp")
COMPILE_SECONDS = 180


def missing() -> str:
    """Why there is no such device here, for `pytest.mark.skipif`; empty where there is."""
    if sys.platform != "linux":
        return "what speaks for the device is compiled for Linux alone"
    if shutil.which("g++") is None:
        return "no g++ to compile what speaks for the device"
    if (_torch() / "lib" / "libtorch_cuda.so").exists():
        return "torch is built for CUDA and has a device of its own"
    return ""


def ask(function: str, *arguments: Any, seconds: float = 240) -> Any:
    """`module:function` of JSON arguments, in a process that has the device; its JSON result."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fake_cuda", str(shim()), function, json.dumps(arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, f"{function} ended with {done.returncode}:\n{done.stderr[-4000:]}"
    return json.loads(done.stdout.splitlines()[-1])


@cache
def shim() -> Path:
    """The library that speaks for the device, compiled when it is first needed."""
    made_of = f"{version('torch')} {sysconfig.get_platform()} {SOURCE.read_text()}"
    name = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"ingot-tests-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} is somebody else's"
    library = folder / f"fake_cuda-{name}.so"
    if not library.exists():
        # Several processes may do this at once: each compiles a file of its own.
        draft = folder / f"{os.getpid()}.so"
        include = _torch() / "include"
        _compile(["-I", str(include), "-I", str(include / "torch/csrc/api/include")], draft)
        draft.replace(library)
    return library


def _compile(includes: list[str], library: Path) -> None:
    command = ["g++", "-std=c++20", "-O0", "-w", "-shared", "-fPIC", *includes, str(SOURCE)]
    done = subprocess.run(
        [*command, "-o", str(library)], capture_output=True, text=True, timeout=COMPILE_SECONDS
    )
    assert done.returncode == 0, done.stderr[-4000:]


def _torch() -> Path:
    found = find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def main() -> None:
    """Load what speaks for the device, then torch, and call the function."""
    library, function, arguments = sys.argv[1:]
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    module, _, name = function.partition(":")
    print(json.dumps(getattr(importlib.import_module(module), name)(*json.loads(arguments))))


if __name__ == "__main__":
    main()
