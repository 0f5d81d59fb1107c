"""What a model does on torch_npu's own device: shapes, types and gradients; no values are there.

Each function runs where torch_npu is loaded (`tests.npu_dispatch.ask`), under torch's
`FakeTensorMode`: a call passes torch_npu's derivatives and its inference of shapes, and ends there.
No kernel of an NPU is asked, so what those refuse beyond shapes is not seen.

Axes: B rows, H heads, S tokens, Q query and key width, V value width.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.backend import NPU
from cluster.models import build_model
from cluster.trainer import Trainer
from configs.reading import load_recipe
from model.decode import SHORTEST_REACH, Session
from model.documents import attend_in_documents
from model.fp8.scheme import Numerics
from model.moe import MoE
from model.passes import Whole
from tests.devices import LOSS, ROWS, TOKENS
from tests.fake_calls import aten, fake_device

FOUND = 16
"""The number that every read finds: one, of any kind, with which a step can go on."""


class Kernels(TorchDispatchMode):
    """Counts torch_npu's own operations, and pins memory, which means nothing without values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = Counter[str]()
        """By operation, the shapes that it is given, and the axis that groups divide."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket is aten._pin_memory:
            return torch.empty_like(args[0])
        if func.namespace == "npu":
            name = func._schema.name.removeprefix("npu::")
            grouped = f" by axis {kwargs['group_type']}" if "group_type" in kwargs else ""
            self.calls[f"{name} {_shapes(args)}{grouped}"] += 1
        return func(*args, **kwargs)


@contextmanager
def npu() -> Iterator[Kernels]:
    """Tensors made within have no values; those that the host reads are 0."""
    NPU.begin(0)
    with fake_device(FOUND), patch.object(FakeTensor, "numpy", _zeros), Kernels() as kernels:
        yield kernels


def train(recipe: str, compute: str) -> dict[str, Any]:
    """A step of the recipe's model, computed in such a type, as a worker on an NPU takes it.

    `device`: its name; `parameters`: how many there are; `faults`: those whose gradient is missing,
    elsewhere, or of another shape or type; `calls`: of torch_npu's own operations; `layers` and
    `moe_layers`: how many there are, MTP's among them; `told`: names of what the step returns.
    """
    asked = load_recipe(recipe)
    assert asked.pretrain is not None
    with npu() as kernels:
        with torch.device(NPU.device):
            numerics = Numerics(compute=getattr(torch, compute))
            model, computing = build_model(asked.model, precision=numerics, backend=NPU)
        pretrain = asked.pretrain
        trainer = Trainer(
            model.train(), computing, optim=pretrain.optim, balance=pretrain.balance, backend=NPU
        )
        batch = {"tokens": torch.empty(ROWS, TOKENS, dtype=torch.int64)}
        trainer.forward_backward(batch, LOSS)
        parameters = dict(model.named_parameters())
        faults = {name: _told(p.grad) for name, p in parameters.items() if not _fits(p)}
        told = trainer.optim_step(1e-3)
    return {
        "device": NPU.card(),
        "parameters": len(parameters),
        "faults": faults,
        "calls": kernels.calls,
        "layers": len(model.model.layers),
        "moe_layers": len(model.moe_layers()),
        "told": sorted(told),
    }


def decode(recipe: str) -> dict[str, Any]:
    """Two rows read and continued by a step: `logits`, their shape, type and device; `calls`;
    `moe_layers`: how many of the layers have experts, that of MTP left out."""
    with npu() as kernels, torch.no_grad():
        with torch.device(NPU.device):
            model, _ = build_model(load_recipe(recipe).model, precision="high", backend=NPU)
        session = Session(model.eval(), rows=ROWS, tokens=2 * SHORTEST_REACH)
        session.join([[7] * FOUND] * ROWS)
        logits_BV = session.step(torch.empty(ROWS, dtype=torch.int64))
    main = model.model.layers[: model.config.depth]
    return {
        "logits": _told(logits_BV),
        "calls": kernels.calls,
        "moe_layers": sum(isinstance(one, MoE) for one in main.modules()),
    }


def attend(heads: int, width: int, width_of_values: int) -> dict[str, Any]:
    """Attention in documents, of which each row is one, forward and backward.

    `out` and the gradients `q`, `k`, `v`: shapes, types and devices; `calls`.
    """
    with npu() as kernels:
        q, k, v = (
            torch.empty(
                ROWS, heads, TOKENS, size, dtype=NPU.dtype, device=NPU.device, requires_grad=True
            )
            for size in (width, width, width_of_values)
        )
        tokens_BS = torch.empty(ROWS, TOKENS, dtype=torch.int64, device=NPU.device)
        out_BSHV = attend_in_documents(q, k, v, Whole(tokens_BS), scale=width**-0.5)
        out_BSHV.backward(torch.empty_like(out_BSHV))
        gradients = {name: _told(x.grad) for name, x in (("q", q), ("k", k), ("v", v))}
    return {"out": _told(out_BSHV), **gradients, "calls": kernels.calls}


def _fits(parameter: Tensor) -> bool:
    return parameter.grad is not None and _told(parameter.grad) == _told(parameter)


def _told(x: Tensor | None) -> str:
    return "none" if x is None else f"{x.dtype}{list(x.shape)} on {x.device.type}"


def _shapes(arguments: Any) -> str:
    """Of the tensors among arguments, also in lists."""
    flat = (x for one in arguments for x in (one if isinstance(one, list | tuple) else [one]))
    return " ".join(str(list(x.shape)) for x in flat if isinstance(x, Tensor))


def _zeros(tensor: Tensor) -> NDArray[Any]:
    kinds: dict[torch.dtype, Any] = {torch.int64: np.int64, torch.float64: np.float64}
    return np.zeros(tuple(tensor.shape), dtype=kinds[tensor.dtype])
