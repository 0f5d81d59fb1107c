"""Part 1: the card, its clocks, and what of torch's and Triton's is there."""

import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata

import torch
from torch.nn import functional as F

from model.fp8.backends import choose
from model.fp8.cublas import lacking
from tests.bench.gpu.rows import SKIPPED, Row, attempted
from tests.bench.gpu.setting import Setting, best_rate

_ASKED = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.limit",
    "temperature.gpu",
    "memory.total",
)
_SMI_SECONDS = 10
COPY_BYTES = 2**31


def rows(setting: Setting) -> Iterator[Row]:
    """Facts first, then what is there, then the two rates that others are held against."""
    yield from attempted(setting, "card", "torch", _card)
    yield from attempted(setting, "card", "nvidia-smi", _clocks)
    yield Row("versions", "python", platform.python_version())
    yield Row("versions", "torch", torch.__version__, note=f"CUDA {torch.version.cuda}")
    yield from attempted(setting, "versions", "cuDNN, triton", _versions)
    for name, there in products().items():
        yield Row(name, "torch", "there" if there else "absent")
    yield Row("block-scaled products", "cuBLAS", lacking(setting.device) or "there")
    choice = choose(setting.device)
    name = "none" if choice.backend is None else choice.backend.name
    yield Row("FP8", "auto", name, note=choice.reason)
    yield from attempted(setting, "square product", "bf16", _multiplying)
    yield from attempted(setting, "copy", "bf16", _copying)


def products() -> dict[str, bool]:
    """Which of torch's products this version has."""
    overloads = getattr(torch.ops.aten, "_scaled_mm_v2", None)
    return {
        "F.scaled_mm": hasattr(F, "scaled_mm"),
        "F.grouped_mm": hasattr(F, "grouped_mm"),
        "aten._scaled_mm_v2.out": overloads is not None and "out" in overloads.overloads(),
    }


def _card(setting: Setting) -> Iterator[Row]:
    if not setting.on_cuda:
        yield Row("card", "torch", f"{SKIPPED}the device is {setting.device}")
        return
    found = torch.cuda.get_device_properties(setting.device)
    size = found.total_memory / 2**30
    more = {"GiB": size, "multiprocessors": float(found.multi_processor_count)}
    yield Row("card", "torch", found.name, note=f"sm_{found.major}{found.minor}", more=more)


def _clocks(setting: Setting) -> Iterator[Row]:
    if not setting.on_cuda:
        yield Row("card", "nvidia-smi", f"{SKIPPED}the device is {setting.device}")
        return
    told = subprocess.run(
        ["nvidia-smi", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=_SMI_SECONDS,
        check=True,
    ).stdout.splitlines()
    for name, value in zip(_ASKED, told[0].split(","), strict=True):
        yield Row(name, "nvidia-smi", value.strip())


def _versions(setting: Setting) -> Iterator[Row]:
    yield Row("versions", "cuDNN", str(torch.backends.cudnn.version()))
    yield Row("versions", "triton", metadata.version("triton"))


def _multiplying(setting: Setting) -> Iterator[Row]:
    yield Row("square product, best", "bf16", best_rate(setting) / 1e12, "TFLOP/s")


def _copying(setting: Setting) -> Iterator[Row]:
    source = torch.ones(setting.pick(COPY_BYTES, 2**12) // 2, device=setting.device).bfloat16()
    target = torch.empty_like(source)
    seconds = setting.seconds(lambda: target.copy_(source))
    moved = 2 * source.numel() * source.element_size()
    yield Row("copy, read and written", "bf16", moved / seconds / 1e9, "GB/s")
