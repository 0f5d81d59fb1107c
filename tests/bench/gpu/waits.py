"""Where the host waits for the device, as CUDA itself tells or refuses."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch

from tests.bench.gpu.rows import ROOT
from tests.bench.gpu.setting import Setting

Mode = Literal["default", "warn", "error"]
MESSAGE = "called a synchronizing CUDA operation"
"""Begins what CUDA says of a wait."""


@contextmanager
def mode(setting: Setting, name: Mode) -> Iterator[None]:
    """What CUDA does where the host waits, until the end of the block; elsewhere nothing."""
    if not setting.on_cuda:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(name)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def counted(setting: Setting) -> Iterator[Counter[str]]:
    """Waits by `file:line`; the counter is filled at the end of the block."""
    found: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with mode(setting, "warn"):
            yield found
    found.update(_place(one) for one in told if MESSAGE in str(one.message))


@contextmanager
def refused(setting: Setting, *allowed: tuple[Any, str]) -> Iterator[None]:
    """A wait raises, but within the functions that are `allowed`: owners and names."""
    with ExitStack() as stack:
        for owner, name in allowed:
            lifted = _lifted(setting, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, lifted))
        stack.enter_context(mode(setting, "error"))
        yield


def _lifted(setting: Setting, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def waiting(*arguments: Any, **options: Any) -> Any:
        with mode(setting, "default"):
            return function(*arguments, **options)

    return waiting


def _place(told: warnings.WarningMessage) -> str:
    path = Path(told.filename)
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    return f"{name}:{told.lineno}"
