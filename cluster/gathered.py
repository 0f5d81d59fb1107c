"""Brings what workers print on other machines into the driver's folder, while they run.

One reader on each machine that does not see the driver's files tells what was appended to the
workers' own files there. So the last words of a worker that aborts are known as long as its
machine lives, and `ingot logs` shows all workers alike.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.head import is_lost
from cluster.output import Output, log_files
from cluster.supply import Supply

LOOK_SECONDS = 2.0
_ANSWER_SECONDS, _TURN_SECONDS = 30.0, 0.5
_PART_BYTES = 1 << 20
_MOST_LOOKS = 16
_active: dict[Output, "_Gatherer"] = {}
_known: dict[Output, dict[str, dict[int, int]]] = {}
"""Bytes of each worker that the driver has, by the address of its machine, which stays the same
when Ray or a group of workers is started anew."""


@contextmanager
def gathered(output: Output, supply: Supply) -> Iterator[None]:
    """Keep the driver's files of these workers up to date; nothing where none can be elsewhere."""
    if not supply.is_spread:
        yield
        return
    gatherer = _active[output] = _Gatherer(output, supply)
    try:
        yield
    finally:
        del _active[output]
        gatherer.stop()


def bring_up_to_date(output: Output) -> None:
    """Have all that was printed until now, as far as machines answer."""
    if gatherer := _active.get(output):
        gatherer.look()


def _is_reachable() -> bool:
    return ray.is_initialized() and not is_lost()


class _Reader:
    """On another machine: reads what the workers of one role append to their files."""

    def __init__(self, output: Output, supply: Supply) -> None:
        self._output, self._supply = output, supply

    def news(self, known: Mapping[int, int]) -> dict[int, tuple[int, bytes]]:
        """What each worker printed beyond the bytes that are `known`, and how many those are then;
        nothing if the driver sees it by itself."""
        found: dict[int, tuple[int, bytes]] = {}
        if not self._supply.is_far:
            return found
        for (role, rank), path in log_files(Path(self._output.folder)).items():
            if role == self._output.role:
                with path.open("rb") as file:
                    begin = known.get(rank, 0)
                    # Shorter than what is known: the disk is a new one.
                    file.seek(begin if begin <= path.stat().st_size else 0)
                    if part := file.read(_PART_BYTES):
                        found[rank] = file.tell(), part
        return found


class _Gatherer:
    """On the driver: a thread asks the readers now and then, and whenever it is told to.

    It alone calls Ray, which may not answer for a minute where a machine is lost.
    """

    def __init__(self, output: Output, supply: Supply) -> None:
        self._output, self._supply = output, supply
        self._readers: dict[str, tuple[str, Any]] = {}
        """By node of Ray: the address of its machine, and the reader there."""
        self._known = _known.setdefault(output, {})
        self._wake, self._stopping = threading.Event(), False
        self._turn = threading.Condition()
        self._begun = self._done = 0
        """Looks, all counted."""
        self._thread = threading.Thread(target=self._work, daemon=True, name="gathered")
        self._thread.start()

    def stop(self) -> None:
        """Look a last time, and end the readers."""
        self._stopping = True
        self.look()

    def look(self) -> None:
        """Have what was printed until now, if machines answer in time. Nothing depends on these
        words, and so no fault of who tells them may hide another."""
        deadline = time.monotonic() + _ANSWER_SECONDS
        with self._turn:
            wanted = self._begun + 1
        self._wake.set()
        while self._thread.is_alive() and not is_lost() and time.monotonic() < deadline:
            with self._turn:
                if self._turn.wait_for(lambda: self._done >= wanted, _TURN_SECONDS):
                    return

    def _work(self) -> None:
        while True:
            self._wake.wait(LOOK_SECONDS)
            self._wake.clear()
            is_last = self._stopping
            with self._turn:
                self._begun += 1
            with suppress(Exception):
                for _ in range(_MOST_LOOKS):
                    if not self._look():
                        break
            if is_last:
                with suppress(Exception):
                    for _, reader in self._readers.values() if _is_reachable() else ():
                        ray.kill(reader, no_restart=True)
            with self._turn:
                self._done = self._begun
                self._turn.notify_all()
            if is_last:
                return

    def _look(self) -> bool:
        """Whether there may be more of what was asked for."""
        is_cut = False
        if not _is_reachable():
            return False  # Closed by an interrupt, and the workers with it, or gone.
        self._meet()
        asked = [
            (address, reader.news.remote(self._known.setdefault(address, {})))
            for address, reader in self._readers.values()
        ]
        for address, ref in asked:
            try:
                news = ray.get(ref, timeout=_ANSWER_SECONDS)
            except (RayError, TimeoutError):
                continue  # Its machine may be gone.
            self._keep(address, news)
            is_cut |= any(len(part) == _PART_BYTES for _, part in news.values())
        return is_cut

    def _keep(self, address: str, news: Mapping[int, tuple[int, bytes]]) -> None:
        for rank, (end, part) in news.items():
            path = self._output.path(rank)
            path.parent.mkdir(exist_ok=True)
            with path.open("ab") as file:
                file.write(part)
            self._known[address][rank] = end

    def _meet(self) -> None:
        """Have a reader on every other machine; machines come and go."""
        own = ray.get_runtime_context().get_node_id()
        alive = {one["NodeID"]: one["NodeManagerAddress"] for one in ray.nodes() if one["Alive"]}
        for node in alive.keys() - self._readers.keys() - {own}:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            remote: Any = ray.remote(_Reader).options(num_cpus=0, scheduling_strategy=there)
            self._readers[node] = alive[node], remote.remote(self._output, self._supply)
        for node in self._readers.keys() - alive.keys():
            del self._readers[node]
