"""Batches in the order of their steps, the next one made while a device computes."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from cluster.backend import Backend
from cluster.trainer import Batch


def batches(
    make: Callable[[int], Batch], steps: Sequence[int], backend: Backend
) -> Iterator[Batch]:
    """`make(step)` for each of `steps`; on devices one step ahead, in memory that they read.

    What is made is a function of the step alone, so that who reads ahead changes nothing. On CPUs
    it would take from the step that is computed what it saves the next.
    """
    if backend.is_host:
        yield from map(make, steps)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as reader:

        def read(step: int) -> Batch:
            return {name: backend.pinned(tensor) for name, tensor in make(step).items()}

        coming = [reader.submit(read, step) for step in steps[:1]]
        for place in range(len(steps)):
            batch = coming.pop().result()
            coming += [reader.submit(read, step) for step in steps[place + 1 : place + 2]]
            yield batch
