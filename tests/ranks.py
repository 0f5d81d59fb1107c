"""Runs a function in real processes with a deadline: on several gloo ranks, or in one apart."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cluster.groups import join_group

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["ray.train.torch", "safetensors.torch", "pydantic", "tests.preloaded"]
)
"""Ranks are forked from one clean process that has done once what takes seconds."""


def on_ranks(
    world: int,
    folder: Path,
    function: Callable[..., Any],
    *arguments: Any,
    seconds: float = 120,
    collective_seconds: float = 60,
) -> list[Any]:
    """`function(*arguments)` on each rank of a process group; the results, in rank order.

    The function must be importable; a result holds tensors, numbers, strings, lists and dicts.
    Fails the test with the traceback of the first rank that failed, or with the numbers of the
    ranks that were not done in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = [
        _CONTEXT.Process(
            target=_rank, args=(rank, world, folder, collective_seconds, function, arguments)
        )
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    _await(ranks, folder, seconds)
    return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in range(world)]


def apart(folder: Path, function: Callable[..., Any], *arguments: Any, seconds: float = 120) -> Any:
    """`function(*arguments)` in a process of its own, without a process group; its result.

    What holds for `on_ranks` holds here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    process = _CONTEXT.Process(target=_alone, args=(folder, function, arguments))
    process.start()
    _await([process], folder, seconds)
    return torch.load(folder / "result-0.pt", weights_only=True)


def _await(ranks: list[Any], folder: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    try:
        while any(process.is_alive() for process in ranks):
            if any(process.exitcode for process in ranks) or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    for rank in failed:
        error = folder / f"error-{rank}.txt"
        told = error.read_text() if error.exists() else f"exit code {ranks[rank].exitcode}"
        pytest.fail(f"rank {rank} of {len(ranks)} failed: {told}")
    if late:
        pytest.fail(f"ranks {late} of {len(ranks)} were not done within {seconds:g} s")


def _rank(
    rank: int,
    world: int,
    folder: Path,
    collective_seconds: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with _telling(folder / f"error-{rank}.txt"):
        join_group(f"file://{folder.absolute()}/rendezvous", rank, world, collective_seconds)
        torch.save(function(*arguments), folder / f"result-{rank}.pt")
        dist.destroy_process_group()


def _alone(folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with _telling(folder / "error-0.txt"):
        torch.save(function(*arguments), folder / "result-0.pt")


@contextmanager
def _telling(error: Path) -> Iterator[None]:
    """Compute on one thread, and leave word of what fails."""
    torch.set_num_threads(1)
    try:
        yield
    except BaseException:
        error.write_text(traceback.format_exc())
        raise
