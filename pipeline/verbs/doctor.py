"""`ingot doctor`: what this machine has and lacks, with the fix for each."""

import argparse
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from configs.errors import ConfigError
from configs.parallel import ClusterConfig, StoreConfig, TrackingConfig
from pipeline.devices import devices
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
    yield from devices()
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


def _package(name: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", "install ingot again: pip install .", needed=True)


def _port(what: str, port: int, fix: str) -> Finding:
    free = is_free(port)
    return Finding(what, f"{port} is {'free' if free else 'taken'}", None if free else fix)
