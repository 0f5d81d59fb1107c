"""Routed experts on CPUs in one call of C: each thread takes whole experts.

A product for each expert costs a CPU more than its arithmetic: torch starts its threads for every
small product, and they share one expert's few rows. In `experts.c` threads take whole experts, and
what passes between an expert's products stays in a core's cache. Every sum has an order of its
own, whatever the number of threads.

Axes: R rows, N visits of a row to an expert, D width, I inner width, J = 2 I gate and up side by
side, E experts.
"""

import ctypes
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.compiled import compiled
from model.dispatch import ByRow, Dispatched

_GIVEN = "x", "gates", "gate_up", "down", "rows", "counts"
_SOURCE = Path(__file__).with_name("experts.c")


class _Call(ctypes.Structure):
    """What `experts.c` is told; its `Call`, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("experts", "width", "inner", "limited", "threads")),
        ("limit", ctypes.c_double),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("x", "gates", "gate_up", "down", "rows", "counts", "order", "saved", "y"),
                *("dy", "d_x", "d_gates", "d_gate_up", "d_down", "scratch", "parallel"),
            )
        ),
    )


class Kernels:
    """The functions of `experts.c`, and torch's own threads to run them."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.forward, self.backward = library.ingot_experts_forward, library.ingot_experts_backward
        self.scratch = library.ingot_experts_scratch
        library.ingot_experts_wide.restype = self.scratch.restype = ctypes.c_int64
        self.scratch.argtypes = [ctypes.c_int64] * 3
        for function in (self.forward, self.backward):
            function.argtypes, function.restype = [ctypes.POINTER(_Call)], None
        self.wide: int = library.ingot_experts_wide()
        self.parallel = _parallel()

    def run(
        self,
        function: Any,
        given: Sequence[Tensor | None],
        results: Mapping[str, Tensor | None],
        limit: float | None,
    ) -> None:
        """Call `function` with (x, gates, gate_up, down, rows, counts) and named results."""
        tensors = {**dict(zip(_GIVEN, given, strict=True)), **results}
        gate_up, counts_E = tensors["gate_up"], tensors["counts"]
        assert gate_up is not None and counts_E is not None
        experts, inner, width = len(gate_up), gate_up.shape[1] // 2, gate_up.shape[2]
        threads = min(torch.get_num_threads(), experts)
        room = self.scratch(width, inner, "dy" in results)
        tensors["order"] = counts_E.argsort(descending=True)
        tensors["scratch"] = torch.empty(threads * room)
        call = _Call(
            experts=experts,
            width=width,
            inner=inner,
            limited=limit is not None,
            threads=threads,
            limit=limit or 0.0,
            parallel=self.parallel,
            **{name: None if one is None else one.data_ptr() for name, one in tensors.items()},
        )
        function(call)

    def panels(self, counts: Sequence[int]) -> int:
        """How many panels hold so many visits by expert."""
        return sum(-(-count // self.wide) for count in counts)


def _parallel() -> int | None:
    """GOMP_parallel of the OpenMP that torch has loaded; None where it has another.

    Threads of torch's that wait for work keep their cores busy for milliseconds, in which threads
    of somebody else would wait for a core.
    """
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except AttributeError:
        return None


@lru_cache(1)
def kernels() -> tuple[Kernels | None, str]:
    """(what serves experts on this CPU, "compiled by cc"), or None and why torch must."""
    library, why = compiled(_SOURCE)
    if library is None:
        return None, f"eager: {why}"
    return Kernels(library), f"compiled by {why}"


def serves(sent: Dispatched, gate_up_EJD: Tensor, down_EDI: Tensor) -> bool:
    """Whether `experts` can: on a CPU, in float32, and with no fewer experts than threads."""
    gates = [] if sent.gates_N is None else [sent.gates_N]
    tensors = [sent.x_RD, gate_up_EJD, down_EDI, *gates]
    return (
        all(one.dtype == torch.float32 and one.device.type == "cpu" for one in tensors)
        and len(gate_up_EJD) >= torch.get_num_threads()
        and kernels()[0] is not None
    )


def swiglu(
    sent: Dispatched,
    gate_up_EJD: Float[Tensor, "E J D"],
    down_EDI: Float[Tensor, "E D I"],
    limit: float | None,
) -> Float[Tensor, "R D"]:
    """Each row's sum of its visits' SwiGLU, by gate; for what `serves` says."""
    y_RD: Tensor = _Experts.apply(
        sent.x_RD, sent.gates_N, gate_up_EJD, down_EDI, sent, limit, torch.is_grad_enabled()
    )
    return y_RD


class _Experts(torch.autograd.Function):
    """Keeps its input and the products of gate and up; the rest is made again."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        gates_N: Tensor | None,
        gate_up: Tensor,
        down: Tensor,
        sent: Dispatched,
        limit: float | None,
        learning: bool,
    ) -> Tensor:
        made, rows_N, counts_E = _made(), sent.rows_N, sent.counts_E
        panels = made.panels(counts_E.tolist()) if learning else 0
        saved = x_RD.new_empty(panels, gate_up.shape[1], made.wide)
        y_ND = x_RD.new_empty(len(rows_N), x_RD.shape[1])
        given = [_contiguous(one) for one in (x_RD, gates_N, gate_up, down, rows_N, counts_E)]
        results = {"saved": saved if learning else None, "y": y_ND}
        made.run(made.forward, given, results, limit)
        by_row = sent.by_row()
        ctx.save_for_backward(*given, saved, by_row.rows_N, by_row.visit_N, by_row.begin_R)
        ctx.limit = limit
        return by_row.sum(y_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *given, saved, rows_N, visit_N, begin_R = ctx.saved_tensors
        x_RD, gates_N, gate_up, down = given[:4]
        results = {
            "saved": saved,
            "dy": grads[0].contiguous(),
            "d_x": x_RD.new_empty(len(rows_N), x_RD.shape[1]),
            "d_gates": None if gates_N is None else torch.empty_like(gates_N),
            "d_gate_up": torch.empty_like(gate_up),
            "d_down": torch.empty_like(down),
        }
        made = _made()
        made.run(made.backward, given, results, ctx.limit)
        d_x = ByRow(rows_N, visit_N, begin_R).sum(results["d_x"])
        return d_x, results["d_gates"], results["d_gate_up"], results["d_down"], None, None, None


def _made() -> Kernels:
    made, why = kernels()
    assert made is not None, why
    return made


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
