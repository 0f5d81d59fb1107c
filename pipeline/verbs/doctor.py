"""`ingot doctor`: what this machine has and lacks, with the fix for each."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from configs.errors import ConfigError
from configs.parallel import ClusterConfig, StoreConfig, TrackingConfig
from model.fp8.backends import choose
from pipeline.embedded import UI_PORT
from pipeline.machine import Finding, surroundings
from pipeline.places import sqlite_path, tracking_uri
from pipeline.provenance import ingot_version
from pipeline.verbs.ui import is_free

RAY_DASHBOARD_PORT = 8265
_PACKAGES = ("ray", "mlflow", "pyarrow", "safetensors", "tokenizers")
_MIN_MEMORY_BYTES = 6_000_000_000


def doctor(args: argparse.Namespace) -> int:
    """Print every finding with its fix. Exit 1 if something is lacking that the line needs."""
    found = list(examine())
    width = max(len(one.what) for one in found)
    for one in found:
        mark = "ok  " if one.fix is None else "LACK" if one.needed else "note"
        print(f"{mark}  {one.what:{width}}  {one.seen}")
        if one.fix is not None:
            print(f"      {'':{width}}  fix: {one.fix}")
    return 1 if any(one.fix and one.needed for one in found) else 0


def examine() -> Iterator[Finding]:
    """Look at everything that a run depends on."""
    yield Finding("ingot", ingot_version())
    yield Finding("python", platform.python_version())
    yield from _machine()
    yield from _accelerators()
    store = Path.cwd() / StoreConfig().url
    try:
        database = sqlite_path(tracking_uri(TrackingConfig(), store))
    except ConfigError as error:
        database = None
        yield Finding("MLflow", "its address is none", str(error), needed=True)
    yield from surroundings(ClusterConfig(), database, os.environ)
    for package in _PACKAGES:
        yield _package(package)
    yield _port("port of ingot ui", UI_PORT, "ingot ui --port N chooses another")
    yield _port("port of Ray's dashboard", RAY_DASHBOARD_PORT, "Ray then takes the next free one")


def _machine() -> Iterator[Finding]:
    cores, wanted = os.cpu_count() or 1, ClusterConfig().trainers
    few = None if cores >= wanted else f"expect a run {wanted / cores:.0f} times as long"
    yield Finding("cores", str(cores), few)
    memory = psutil.virtual_memory()
    seen = f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f} GB"
    low = f"free some: a local Ray and its workers take about {_MIN_MEMORY_BYTES / 1e9:.0f} GB"
    yield Finding("memory", seen, None if memory.available >= _MIN_MEMORY_BYTES else low)
    free, least = shutil.disk_usage(Path.cwd()).free, StoreConfig().min_free_bytes
    full = f"free some, or put store.url on a disk with {least:,} bytes"
    seen = f"{free / 1e9:.1f} GB free here"
    yield Finding("disk", seen, None if free >= least else full, needed=True)


def _accelerators() -> Iterator[Finding]:
    yield Finding("torch", torch.__version__)
    cuda = f"{torch.cuda.get_device_name()}, not used yet" if torch.cuda.is_available() else "none"
    yield Finding("CUDA", f"{cuda}; training runs on the CPU")
    yield from _fp8()
    npu = importlib.util.find_spec("torch_npu") is not None
    yield Finding("Ascend NPU", "torch_npu is installed" if npu else "none; export needs none")


def _fp8() -> Iterator[Finding]:
    """Who computes where a recipe says FP8, on each kind of device that is here."""
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for device in devices:
        choice = choose(torch.device(device))
        name = "none" if choice.backend is None else choice.backend.name
        slow = device == "cpu" and choice.reason.startswith("eager")
        fix = "install a C compiler, as gcc: quantising is then several times as fast"
        seen = f"backend {name}, {choice.reason}"
        if device == "cpu":
            seen += "; triton and cublas need a CUDA device"
        yield Finding(f"FP8 on {device}", seen, fix if slow else None)


def _package(name: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", "install ingot again: pip install .", needed=True)


def _port(what: str, port: int, fix: str) -> Finding:
    free = is_free(port)
    return Finding(what, f"{port} is {'free' if free else 'taken'}", None if free else fix)
