"""Routed experts on CPUs, in one call of C: each thread takes whole experts.

Expert by expert, torch starts all its threads for every small product, and what passes between
products leaves the cores' caches. In `experts_cpu.c` a thread takes an expert from its rows to
their results, or from their gradients to its weights'. No sum depends on how many threads there
are. The twin is `model.swiglu.grouped_swiglu`, which also serves other types, and all where no C
compiler is.

Operands of products are float32 or bfloat16; sums and all between products are float32. In
bfloat16, processors with AVX512_BF16 multiply two terms at once (`vdpbf16ps`); others widen them
to float32, for which nobody would choose it.

Axes: R rows, N visits of a row to an expert, D width, I inner width, J = 2 I gate and up side by
side, E experts, P panels of V visits, as many as a processor's vectors hold.
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
from model.dispatch import Dispatched
from model.rows import ByRow
from model.swiglu import grouped_swiglu
from model.weight_gradients import is_left

SOURCE = Path(__file__).with_name("experts_cpu.c")
FLAGS = {torch.float32: ("-O2",), torch.bfloat16: ("-O2", "-DBFLOAT16")}
"""What the compiler is told, by the type of operands."""
_GIVEN = "x", "gates", "gate_up", "down", "rows", "counts"
_RESULTS = "saved", "y", "dy", "d_x", "d_gates", "d_gate_up", "d_down"


class _Call(ctypes.Structure):
    """What the functions are told: `Call` of `experts_cpu.c`, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("experts", "width", "inner", "limited", "threads")),
        ("limit", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in (*_GIVEN, *_RESULTS)),
        *((name, ctypes.c_void_p) for name in ("order", "scratch", "parallel")),
    )


class Kernels:
    """The functions of `experts_cpu.c` for operands of one type, and the threads they run on."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        number = ctypes.c_int64
        self._forward, self._backward = (
            library.ingot_experts_forward,
            library.ingot_experts_backward,
        )
        for function in (self._forward, self._backward):
            function.argtypes, function.restype = [ctypes.POINTER(_Call)], None
        self._scratch = library.ingot_experts_scratch
        self._scratch.argtypes, self._scratch.restype = [number] * 3, number
        library.ingot_experts_wide.restype = number
        self._wide: int = library.ingot_experts_wide()
        self._parallel = _parallel()

    def forward(
        self, given: Sequence[Tensor | None], limit: float | None, learning: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(each visit's result times its gate [N, D], gate and up [P, J, V] if `learning`).

        Given are x [R, D], gates [N] (float32) or None, gate_up [E, J, D], down [E, D, I], rows
        [N] and counts [E], all contiguous. What is kept for learning is float32.
        """
        x_RD, _, gate_up_EJD, _, rows_N, counts_E = given
        assert x_RD is not None and gate_up_EJD is not None
        assert rows_N is not None and counts_E is not None
        inner_PJV = None
        if learning:
            panels = sum(-(-count // self._wide) for count in counts_E.tolist())
            inner_PJV = torch.empty(panels, gate_up_EJD.shape[1], self._wide)
        y_ND = x_RD.new_empty(len(rows_N), x_RD.shape[1])
        self._run(self._forward, given, {"saved": inner_PJV, "y": y_ND}, limit)
        return y_ND, inner_PJV

    def backward(
        self,
        given: Sequence[Tensor | None],
        limit: float | None,
        inner_PJV: Tensor,
        dy_RD: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Gradients of each visit's row [N, D], of gates, of gate_up and of down; the last three
        are float32."""
        x_RD, gates_N, gate_up_EJD, down_EDI, rows_N, _ = given
        assert x_RD is not None and gate_up_EJD is not None
        assert down_EDI is not None and rows_N is not None
        d_x_ND = x_RD.new_empty(len(rows_N), x_RD.shape[1])
        d_gates_N = None if gates_N is None else torch.empty_like(gates_N)
        d_gate_up_EJD, d_down_EDI = torch.empty(gate_up_EJD.shape), torch.empty(down_EDI.shape)
        results = {
            "saved": inner_PJV,
            "dy": dy_RD,
            "d_x": d_x_ND,
            "d_gates": d_gates_N,
            "d_gate_up": d_gate_up_EJD,
            "d_down": d_down_EDI,
        }
        self._run(self._backward, given, results, limit)
        return d_x_ND, d_gates_N, d_gate_up_EJD, d_down_EDI

    def _run(
        self,
        function: Any,
        given: Sequence[Tensor | None],
        results: Mapping[str, Tensor | None],
        limit: float | None,
    ) -> None:
        tensors = {**dict(zip(_GIVEN, given, strict=True)), **results}
        gate_up_EJD, counts_E = tensors["gate_up"], tensors["counts"]
        assert gate_up_EJD is not None and counts_E is not None
        experts, twice, width = gate_up_EJD.shape
        threads = min(torch.get_num_threads(), experts)
        # Experts with most visits first, so that threads end at the same time.
        tensors["order"] = counts_E.argsort(descending=True)
        tensors["scratch"] = torch.empty(
            threads * self._scratch(width, twice // 2, "dy" in results)
        )
        call = _Call(
            experts=experts,
            width=width,
            inner=twice // 2,
            limited=limit is not None,
            threads=threads,
            limit=limit or 0.0,
            parallel=self._parallel,
            **{name: None if one is None else one.data_ptr() for name, one in tensors.items()},
        )
        function(call)


def _parallel() -> int | None:
    """GOMP_parallel of the OpenMP that torch has loaded; None where torch has another.

    Threads of torch's keep their cores busy for milliseconds while they wait for work; threads of
    anybody else would wait for a core so long.
    """
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except AttributeError:
        return None


@lru_cache
def cpu_kernels(dtype: torch.dtype = torch.float32) -> tuple[Kernels | None, str]:
    """(this process's kernels for `dtype`, "compiled by cc"), or (None, "eager: " and why).

    `dtype` is float32 or bfloat16.
    """
    library, why = compiled(SOURCE, *FLAGS[dtype])
    if library is None:
        return None, f"eager: {why}"
    made = Kernels(library, dtype)
    if not _agrees(made):
        return None, f"eager: what {why} made does not give the twin's results"
    return made, f"compiled by {why}"


def serves(sent: Dispatched, gate_up_EJD: Tensor, down_EDI: Tensor) -> bool:
    """Whether `swiglu_on_cpu` can, and has an expert for each thread."""
    dtype = sent.x_RD.dtype
    return (
        dtype in FLAGS
        # One call makes all gradients.
        and not is_left()
        and all(one.dtype == dtype for one in (gate_up_EJD, down_EDI))
        and (sent.gates_N is None or sent.gates_N.dtype in (dtype, torch.float32))
        and all(one.device.type == "cpu" for one in (sent.x_RD, gate_up_EJD, down_EDI))
        and len(gate_up_EJD) >= torch.get_num_threads()
        and (dtype == torch.float32 or not (gate_up_EJD.shape[2] % 2 or down_EDI.shape[2] % 2))
        and cpu_kernels(dtype)[0] is not None
    )


def swiglu_on_cpu(
    sent: Dispatched,
    gate_up_EJD: Float[Tensor, "E J D"],
    down_EDI: Float[Tensor, "E D I"],
    limit: float | None,
) -> Float[Tensor, "R D"]:
    """As `model.swiglu.grouped_swiglu`, of what `serves` says."""
    made, why = cpu_kernels(sent.x_RD.dtype)
    assert made is not None, why
    return _swiglu(made, sent, gate_up_EJD, down_EDI, limit)


def _swiglu(
    made: Kernels, sent: Dispatched, gate_up: Tensor, down: Tensor, limit: float | None
) -> Tensor:
    learning = torch.is_grad_enabled()
    y_RD: Tensor = _Experts.apply(
        sent.x_RD, sent.gates_N, gate_up, down, sent.counts_E, sent.by_row(), limit, learning, made
    )
    return y_RD


class _Experts(torch.autograd.Function):
    """Keeps the rows, and gate and up of each visit; the rest is made again."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        gates_N: Tensor | None,
        gate_up_EJD: Tensor,
        down_EDI: Tensor,
        counts_E: Tensor,
        by_row: ByRow,
        limit: float | None,
        learning: bool,
        made: Kernels,
    ) -> Tensor:
        gates = None if gates_N is None else gates_N.float()
        tensors = x_RD, gates, gate_up_EJD, down_EDI, by_row.rows_N, counts_E
        given = [None if one is None else one.contiguous() for one in tensors]
        y_ND, inner_PJV = made.forward(given, limit, learning)
        if learning:
            ctx.save_for_backward(*given, inner_PJV)
            ctx.by_row, ctx.limit, ctx.made = by_row, limit, made
        return by_row.sum(y_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *given, inner_PJV = ctx.saved_tensors
        dy_RD, by_row = grads[0].contiguous(), ctx.by_row
        d_x_ND, d_gates, *d_weights = ctx.made.backward(given, ctx.limit, inner_PJV, dy_RD)
        return by_row.sum(d_x_ND), d_gates, *d_weights, None, None, None, None, None


def _agrees(made: Kernels) -> bool:
    """Whether compiled kernels give the twin's results and gradients, in float64, to rounding.

    The first who asks may compute without gradients, or keep count of all that is saved for a
    backward pass; what is compared here has gradients and a backward pass of its own.
    """
    apart = torch.autograd.graph.saved_tensors_hooks(lambda one: one, lambda one: one)
    with torch.inference_mode(False), torch.enable_grad(), apart:
        return _compared(made)


def _compared(made: Kernels) -> bool:
    width, inner = (21, 13) if made.dtype == torch.float32 else (22, 14)
    counts_E = torch.tensor([0, 1, 150, 3])
    generator = torch.Generator().manual_seed(0)
    shapes = (7, width), (4, 2 * inner, width), (4, width, inner), (154,)
    leaves = [torch.randn(shape, generator=generator).to(made.dtype) for shape in shapes]
    dy_RD = torch.randn(7, width, generator=generator).to(made.dtype)
    rows_N = torch.randint(7, (154,), generator=generator)

    def run(dtype: torch.dtype) -> list[Tensor]:
        cast = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        x_RD, gate_up_EJD, down_EDI, gates_N = cast
        sent = Dispatched(x_RD, rows_N, counts_E, gates_N, None)
        if dtype == torch.float64:
            y_RD = grouped_swiglu(sent, gate_up_EJD, down_EDI, 0.7)
        else:
            y_RD = _swiglu(made, sent, gate_up_EJD, down_EDI, 0.7)
        return [y_RD.detach(), *torch.autograd.grad(y_RD, cast, dy_RD.to(dtype))]

    pairs = zip(run(made.dtype), run(torch.float64), strict=True)
    return all(_gap(found.double(), wanted) < LIMITS[made.dtype] for found, wanted in pairs)


LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of `_gap`: sums of float32 that round by 2^-24 of a term, and a few roundings by 2^-9 on end."""


def _gap(found: Tensor, wanted: Tensor) -> float:
    """The largest error, by the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())
