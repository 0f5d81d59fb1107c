"""Which operations have a kernel on Ascend's NPUs, asked of torch_npu itself, without an NPU.

torch_npu enters its kernels in torch's table of operations when it is imported, and wants the
libraries of CANN for that. Here they are empty: each function that torch_npu looks for is there and
returns 0. The table is the real one; nothing can be computed.

torch_npu is fetched by pip into a folder of its own below the temporary one, for no environment
that has it and not CANN can import torch any more. It does not say how good a kernel is, which
types and shapes it takes, or what falls back to the host inside it.
"""

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

ROOT = Path(__file__).parents[1]
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
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        input=json.dumps(list(operations)),
        env=os.environ
        | {
            "PYTHONPATH": str(TORCH_NPU),
            "LD_LIBRARY_PATH": str(_libraries()),
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        },
        cwd=FOLDER,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


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


def _libraries() -> Path:
    """A folder of libraries under CANN's names, in which every function that is looked for is."""
    folder = TORCH_NPU / "cann"
    if folder.exists():
        return folder
    wanted = set[str]()
    package = TORCH_NPU / "torch_npu"
    for library in (*package.glob("lib/*.so"), *package.glob("_C*.so")):
        listed = _run(["nm", "-D", "--undefined-only", str(library)])
        names = (line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines())
        wanted |= {name for name in names if FUNCTIONS.fullmatch(name)}
    with tempfile.TemporaryDirectory(dir=FOLDER) as draft:
        made = Path(draft, "cann")
        made.mkdir()
        code = made / "empty.c"
        code.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in sorted(wanted)))
        empty = ["gcc", "-shared", "-fPIC", "-w", "-o", str(made / "empty.so"), str(code)]
        done = _run(empty)
        assert done.returncode == 0, done.stderr[-4000:]
        for name in (*LIBRARIES, *OPENED):
            (made / f"lib{name}.so").symlink_to("empty.so")
        if not folder.exists():
            made.rename(folder)
    return folder


def _private(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} is somebody else's"


def _run(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
