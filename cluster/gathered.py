"""Brings what workers print on other machines into the driver's folder, while they run.

One reader on each machine that does not see the driver's files tells what was appended to the
workers' own files there. So the last words of a worker that aborts are known as long as its
machine lives, and `ingot logs` shows all workers alike.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.output import Output, log_files
from cluster.supply import Supply

LOOK_SECONDS = 2.0
_ANSWER_SECONDS = 30.0
_PART_BYTES = 1 << 20
_active: dict[Output, "_Gatherer"] = {}


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
    """On the driver: asks the readers now and then."""

    def __init__(self, output: Output, supply: Supply) -> None:
        self._output, self._supply = output, supply
        self._readers: dict[str, tuple[str, Any]] = {}
        """By node of Ray: the address of its machine, and the reader there."""
        self._known: dict[str, dict[int, int]] = {}
        """By address, which a machine keeps when its Ray is started anew: bytes of each worker."""
        self._busy = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="gathered")
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self.look()
        for _, reader in self._readers.values() if ray.is_initialized() else ():
            ray.kill(reader, no_restart=True)

    def look(self) -> None:
        with self._busy:
            if not ray.is_initialized():
                return  # Closed by an interrupt, and the workers with it.
            self._meet()
            asked = [
                (address, reader.news.remote(self._known.setdefault(address, {})))
                for address, reader in self._readers.values()
            ]
            for address, ref in asked:
                try:
                    self._keep(address, ray.get(ref, timeout=_ANSWER_SECONDS))
                except (RayError, TimeoutError, OSError):
                    continue  # It may be gone; nothing depends on these words.

    def _keep(self, address: str, news: Mapping[int, tuple[int, bytes]]) -> None:
        for rank, (end, part) in news.items():
            path = self._output.path(rank)
            path.parent.mkdir(exist_ok=True)
            with path.open("ab") as file:
                file.write(part)
            self._known[address][rank] = end

    def _work(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            self.look()

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
