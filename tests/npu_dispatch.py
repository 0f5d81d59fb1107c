"""What torch_npu says of a program for Ascend's NPUs, without an NPU.

torch_npu enters its kernels in torch's table of operations when it is imported, and wants the
libraries of CANN for that. Here they are empty: each function that torch_npu is linked to is there
and returns 0, but for the few of `npu_cann.c`, by which it finds a device. The table is the real
one, and so are the shapes and gradients that torch_npu gives its operations; nothing can be
computed.

    without_kernel(["aten::mm"])                   those that have no kernel on the NPU
    ask("tests.npu_step:train", "tiny")            what the function returns, through JSON

torch_npu is fetched by pip into a folder of its own below the temporary one, for no environment
that has it and not CANN can import torch any more. It does not say how good a kernel is, which
types and shapes it takes, or what falls back to the host inside it.
"""

import hashlib
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BODIES = ROOT / "tests" / "npu_cann.c"
RELEASE = "2.13.0"
FOLDER = Path(tempfile.gettempdir()) / f"ingot-tests-{os.getuid()}"
TORCH_NPU = FOLDER / f"torch-npu-{RELEASE}-{sys.implementation.cache_tag}"
LIBRARIES = ("acl_op_compiler", "acl_tdt_channel", "ascendcl", "ge_runner", "graph", "hccl")
OPENED = ("opapi", "hcomm")
"""Those that torch_npu opens when it is imported, besides those that it is linked to."""
FUNCTIONS = re.compile(r"(acl|Hccl|Msprof|rt[A-Z])\w*")
"""Names of CANN's functions."""
ASK = """
import json, sys, torch, torch_npu
has = torch._C._dispatch_has_kernel_for_dispatch_key

def takes(op):
    return [str(a.type) for a in op._schema.arguments if not a.is_out]

def writing(name):
    space, rest = name.split("::")
    base, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, space), base)
    op = getattr(packet, overload or "default")
    every = (getattr(packet, o) for o in packet.overloads())
    return [o.name() for o in every if takes(o) == takes(op) and o.name() != name]

def served(name):
    keys = "PrivateUse1", "CompositeExplicitAutograd", "CompositeImplicitAutograd"
    if any(has(name, key) for key in keys):
        return True
    # Made of the one that writes into a given tensor.
    made = has(name, "CompositeExplicitAutogradNonFunctional")
    return made and any(has(o, key) for o in writing(name) for key in keys)

print(json.dumps([name for name in json.loads(sys.stdin.read()) if not served(name)]))
"""
SECONDS = 300


@cache
def missing() -> str:
    """Why the table cannot be asked here; empty where it can. Fetches torch_npu the first time."""
    if not version("torch").startswith(f"{RELEASE.rpartition('.')[0]}."):
        return f"torch_npu {RELEASE} is for torch {RELEASE}, not {version('torch')}"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "torch_npu is fetched for Linux on x86_64 alone"
    if not all(map(shutil.which, ("gcc", "nm"))):
        return "no gcc and nm to make empty libraries of CANN"
    if not TORCH_NPU.exists() and (failure := _fetch()):
        return f"torch_npu {RELEASE} cannot be fetched: {failure}"
    return ""


def without_kernel(operations: Sequence[str]) -> list[str]:
    """Of operations such as `aten::add.Tensor`, those that would be computed on the host.

    An operation without a kernel of its own may be made of others, which then need theirs.
    """
    found: list[str] = _answer(["-c", ASK], json.dumps(list(operations)))
    return found


def ask(function: str, *arguments: Any) -> Any:
    """`module:function` of JSON arguments, in a process that has torch_npu; its JSON result."""
    return _answer(["-m", "tests.npu_dispatch", function, json.dumps(arguments)])


def _answer(command: Sequence[str], given: str = "") -> Any:
    """What Python's command prints last, which is JSON."""
    done = subprocess.run(
        [sys.executable, *command],
        input=given,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(map(str, (TORCH_NPU, ROOT))),
            "LD_LIBRARY_PATH": str(_libraries()),
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        },
        cwd=FOLDER,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def _fetch() -> str:
    """Unpack torch_npu into its folder; what went wrong, if anything."""
    _private(FOLDER)
    with tempfile.TemporaryDirectory(dir=FOLDER) as draft:
        command = ["pip", "install", "--quiet", "--no-deps", "--target", f"{draft}/it"]
        try:
            done = _run([sys.executable, "-m", *command, f"torch-npu=={RELEASE}"])
        except subprocess.TimeoutExpired:
            return f"pip was not done within {SECONDS} s"
        if done.returncode != 0:
            return (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        if not TORCH_NPU.exists():
            Path(draft, "it").rename(TORCH_NPU)
    return ""


@cache
def _libraries() -> Path:
    """A folder of libraries under CANN's names, in which every function that is looked for is."""
    wanted = set[str]()
    package = TORCH_NPU / "torch_npu"
    for library in (*package.glob("lib/*.so"), *package.glob("_C*.so")):
        listed = _run(["nm", "-D", "--undefined-only", str(library)])
        names = (line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines())
        wanted |= {name for name in names if FUNCTIONS.fullmatch(name)}
    # Weak ones give way to those of the same name that do something.
    empty = [
        f"__attribute__((weak)) long {name}(void) {{ return 0; }}\n" for name in sorted(wanted)
    ]
    made_of = hashlib.sha256("".join((*empty, BODIES.read_text())).encode()).hexdigest()
    folder = TORCH_NPU / f"cann-{made_of[:16]}"
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory(dir=FOLDER) as draft:
        made = Path(draft, "cann")
        made.mkdir()
        code, library = made / "empty.c", made / "all.so"
        code.write_text("".join(empty))
        compiled = ["gcc", "-shared", "-fPIC", "-w", "-o", str(library), str(code), str(BODIES)]
        done = _run(compiled)
        assert done.returncode == 0, done.stderr[-4000:]
        for name in (*LIBRARIES, *OPENED):
            (made / f"lib{name}.so").symlink_to(library.name)
        if not folder.exists():
            made.rename(folder)
    return folder


def _private(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} is somebody else's"


def _run(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)


def main() -> None:
    """Load torch_npu and call the function."""
    name, arguments = sys.argv[1:]
    importlib.import_module("torch_npu")
    module, _, function = name.partition(":")
    print(json.dumps(getattr(importlib.import_module(module), function)(*json.loads(arguments))))


if __name__ == "__main__":
    main()
