"""The stand-in device itself: what its ledger notes, and what works on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests import standin
from tests.ledger import MixedDevices
from tests.ranks import apart, on_ranks

pytestmark = pytest.mark.skipif(bool(standin.MISSING), reason=standin.MISSING)


def noted(do: Callable[[Tensor, Tensor], object]) -> list[str]:
    """What the ledger has of `do(a 3 x 4 matrix of the device, the same on the host)`."""
    host = torch.arange(12.0).view(3, 4) / 7
    with standin.device() as ledger:
        do(standin.to_device(host), host)
    return [f"{note.kind} {note.op}" for note in ledger.notes]


def refused(do: Callable[[Tensor, Tensor], object]) -> list[str]:
    with pytest.raises(MixedDevices):
        noted(do)
    return ["refused"]


def repeated(x: Tensor) -> Tensor:
    return standin.to_device(torch.tensor([0, 0, 1]))


def judged() -> dict[str, list[str]]:
    """Of each operation, what is noted."""
    npu = standin.NPU
    with standin.device():
        rows, each = standin.to_device(torch.tensor([0, 0, 1])), standin.to_device(torch.arange(3))
        ones = standin.to_device(torch.ones(3, 4))
    return {
        "item": noted(lambda x, _: x[0, 0].item()),
        "tolist": noted(lambda x, _: x.tolist()),
        "to the host": noted(lambda x, _: x.cpu()),
        "into the host's": noted(lambda x, host: host.clone().copy_(x)),
        "nonzero": noted(lambda x, _: x.nonzero()),
        "bincount": noted(lambda x, _: torch.bincount(rows, minlength=4)),
        "read by a mask": noted(lambda x, _: x[x > 1]),
        "write through a mask": noted(lambda x, _: x.__setitem__(x > 1, 0.0)),
        "fill through a mask": noted(lambda x, _: x.masked_fill_(x > 1, 0.0)),
        "repeat without a size": noted(lambda x, _: each.repeat_interleave(rows)),
        "repeat with a size": noted(lambda x, _: each.repeat_interleave(rows, output_size=1)),
        "from a list": noted(lambda x, _: torch.tensor([1.0, 2.0], device=npu)),
        "from the host": noted(lambda x, host: host.to(npu)),
        "from pinned memory, waiting": noted(lambda x, host: host.pin_memory().to(npu)),
        "from pinned memory": noted(
            lambda x, host: host.pin_memory()[:2].to(npu, non_blocking=True)
        ),
        "not waiting for pageable memory": noted(lambda x, host: host.to(npu, non_blocking=True)),
        "made on the device": noted(lambda x, _: torch.zeros(3, device=npu) + x[:, 0]),
        "a number of the host": noted(lambda x, _: x * torch.tensor(2.0)),
        "a vector of the host": refused(lambda x, host: x * host),
        "a number of the host stacked": refused(
            lambda x, host: torch.stack([x[0, 0], torch.tensor(1.0)])
        ),
        "an index of the host": noted(lambda x, _: x[torch.tensor([0, 1])]),
        "drawn by the host": refused(
            lambda x, _: torch.rand(3, device=npu, generator=torch.Generator())
        ),
        "add fractions at an index": noted(lambda x, _: x.index_add_(0, rows, x.clone())),
        "add fractions once": noted(lambda x, _: x.index_add_(0, each, x.clone())),
        "add whole numbers": noted(lambda x, _: x.index_add_(0, rows, ones)),
        "scatter fractions": noted(
            lambda x, _: x.scatter_add_(0, rows.view(3, 1).expand(3, 4), x.clone())
        ),
        "put fractions": noted(lambda x, _: x.index_put_((rows,), x.clone(), accumulate=True)),
        "in double": noted(lambda x, _: x.double()),
    }


EXPECTED = {
    "item": ["sync _local_scalar_dense.default"],
    "tolist": ["sync _to_copy.default"],
    "to the host": ["sync _to_copy.default"],
    "into the host's": ["sync copy_.default"],
    "nonzero": ["sync nonzero.default"],
    "bincount": ["sync bincount.default"],
    "read by a mask": ["sync index.Tensor"],
    "write through a mask": ["sync index_put_.default"],
    "fill through a mask": [],
    "repeat without a size": ["sync repeat_interleave.Tensor"],
    "repeat with a size": [],
    "from a list": ["upload _to_copy.default"],
    "from the host": ["upload _to_copy.default"],
    "from pinned memory, waiting": ["upload _to_copy.default"],
    "from pinned memory": [],
    "not waiting for pageable memory": ["upload _to_copy.default"],
    "made on the device": [],
    "a number of the host": [],
    "a vector of the host": ["refused"],
    "a number of the host stacked": ["refused"],
    "an index of the host": ["upload index.Tensor"],
    "drawn by the host": ["refused"],
    "add fractions at an index": ["atomics index_add_.default"],
    "add fractions once": [],
    "add whole numbers": [],
    "scatter fractions": ["atomics scatter_add_.default"],
    "put fractions": ["atomics index_put_.default"],
    "in double": ["float64 _to_copy.default"],
}


def test_the_ledger_notes_what_an_accelerator_waits_for_or_refuses(tmp_path: Path) -> None:
    found: dict[str, Any] = apart(tmp_path, judged)
    assert found == EXPECTED


def summed() -> dict[str, Any]:
    """Collectives and a gradient on this rank's tensors of the device."""
    rank = dist.get_rank()
    with standin.device():
        mine = standin.to_device(torch.full((4,), float(rank + 1)))
        every = mine.clone()
        dist.all_reduce(every)
        swapped = torch.empty_like(mine)
        dist.all_to_all_single(swapped, mine, [2, 2], [2, 2])
        first = mine.clone()
        dist.broadcast(first, src=1)
        linear = standin.move(nn.Linear(4, 1, bias=False))
        linear(every).sum().backward()
        grad = linear.weight.grad
        assert grad is not None
        assert {str(x.device) for x in (every, swapped, first, grad)} == {standin.NPU}
        return {
            "all_reduce": every.tolist(),
            "all_to_all": swapped.tolist(),
            "broadcast": first.tolist(),
            "gradient": grad.tolist(),
        }


def test_ranks_exchange_tensors_of_the_device(tmp_path: Path) -> None:
    common = {"all_reduce": [3.0] * 4, "broadcast": [2.0] * 4, "gradient": [[3.0] * 4]}
    expected = [common | {"all_to_all": [1.0, 1.0, 2.0, 2.0]}] * 2
    assert on_ranks(2, tmp_path, summed) == expected
