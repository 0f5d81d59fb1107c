"""The FP8 backends: one interface of casts and products, four implementations, the choice of one.

| backend | runs on | quantises by | multiplies by |
|---|---|---|---|
| `reference` | any device | torch's float8 casts | float64 products; it defines the numbers |
| `cpu` | CPUs | loops in C, or eager torch | float32 products of E4M3 values |
| `cublas` | CUDA, sm_90 | Triton kernels | torch's block-scaled `scaled_mm`; experts by Triton |
| `triton` | CUDA, sm_90 on | Triton kernels | Triton kernels |

A device without FP8 has none of them, and a model there stays in high precision. The functions at
the end of this file are the interface for code outside of training, as readers of checkpoints.

Axes: R rows, C columns, P stacked matrices, M K N rows, contraction and columns of a product,
E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from configs.errors import MachineError
from configs.train import Fp8Backend
from model.fp8.cpu import cpu_backend
from model.fp8.cublas import Cublas
from model.fp8.cublas import lacking as cublas_lacks
from model.fp8.groups import Groups
from model.fp8.quantized import ACTIVATION, Quantized, Quantizer, Tile
from model.fp8.reference import Reference

HOPPER = (9, 0)
"""Compute capability from which Ingot's FP8 products run on tensor cores."""


@runtime_checkable
class Backend(Quantizer, Protocol):
    """Casts and products on one kind of device.

    Products contract E4M3 operands whose tiles are 128 long in the contracted dim, and add up in
    float32. They come in float32 or in the backend's output dtype, which its own docstring names.
    """

    name: str
    """As `cluster.fp8_backend` has it."""

    def matmul(self, a: Quantized, b: Quantized) -> Tensor:
        """a @ b: [M, K] @ [K, N] to [M, N]."""

    def grouped_matmul(self, a: Quantized, b: Quantized, groups: Groups) -> Tensor:
        """Each expert's rows of `a` [R, K] times its matrix of `b` [E, K, N]: [R, N].

        Rows are sorted by expert. DataError unless there are E groups.
        """

    def grouped_outer(self, a: Quantized, b: Quantized, groups: Groups) -> Tensor:
        """Each expert's rows of `a` [R, M], transposed, times its rows of `b` [R, N].

        float32 [E, M, N]; zeros for an expert without rows. Both operands have tiles along rows
        that start anew with each expert: they were quantised with the same groups.
        """


_make_triton: Callable[[], Backend] | None = None
try:
    from model.fp8.triton import Triton

    _make_triton = partial(Triton, torch.bfloat16)
except ModuleNotFoundError as error:
    # torch depends on Triton where there can be a CUDA device, and not elsewhere.
    if error.name != "triton":
        raise


_DEVICES = {"cpu": "CPUs", "cublas": "CUDA devices", "triton": "CUDA devices"}
"""Where the backends run that do not run everywhere."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend of a device, and why it is that one."""

    backend: Backend | None
    """None where the device has no FP8."""
    reason: str
    """In words, for logs and `ingot doctor`."""


@lru_cache
def choose(device: torch.device, wanted: Fp8Backend = "auto") -> Choice:
    """The backend for tensors on `device`; MachineError if the one `wanted` cannot run there.

    "auto" takes the quickest that can, and none on a device without FP8, which is no error.
    """
    if wanted == "reference":
        return Choice(Reference(), "asked for: the slow twin")
    if device.type == "cpu" and wanted in ("auto", "cpu"):
        backend, form = cpu_backend()
        return Choice(backend, form)
    if device.type == "cuda":
        return _on_cuda(device, wanted)
    if wanted == "auto":
        return Choice(None, f"{device.type} devices have no FP8 here")
    raise _unable(device, wanted, f"it is for {_DEVICES[wanted]}")


def _on_cuda(device: torch.device, wanted: Fp8Backend) -> Choice:
    """cuBLAS where torch has its block-scaled product, else Triton's kernels."""
    no_fp8 = _no_fp8(device)
    no_triton = "triton is not installed" if _make_triton is None else no_fp8
    no_cublas = cublas_lacks(device)
    match wanted:
        case "triton" if no_triton is None:
            return Choice(_quantizer(), "asked for")
        case "cublas" if no_cublas is None:
            return Choice(_cublas(), f"asked for{_slowly()}")
        case "auto" if no_fp8 is not None:
            return Choice(None, no_fp8)
        case "auto" if no_cublas is None:
            return Choice(_cublas(), f"torch has its products here{_slowly()}")
        case "auto" if no_triton is None:
            return Choice(_quantizer(), f"own kernels; cuBLAS cannot: {no_cublas}")
        case "auto":
            return Choice(None, f"neither cuBLAS ({no_cublas}) nor Triton ({no_triton})")
        case "triton":
            raise _unable(device, wanted, str(no_triton))
        case "cublas":
            raise _unable(device, wanted, str(no_cublas))
        case _:
            raise _unable(device, wanted, f"it is for {_DEVICES[wanted]}")


def _no_fp8(device: torch.device) -> str | None:
    """Why a CUDA device has no FP8 products, or None if it has."""
    capability = torch.cuda.get_device_capability(device)
    if capability < HOPPER:
        name = torch.cuda.get_device_name(device)
        return f"{name} (sm_{capability[0]}{capability[1]}) has no FP8 products; sm_90 has"
    return None


def _quantizer() -> Backend:
    """The casts of CUDA devices: Triton's kernels, or plain torch where Triton is absent."""
    return Reference() if _make_triton is None else _make_triton()


def _cublas() -> Backend:
    """cuBLAS for matrices; Triton's kernels for experts, which find their rows on the device."""
    return Cublas(_quantizer(), grouped=None if _make_triton is None else _make_triton())


def _slowly() -> str:
    """What to add to a reason where casts are plain torch."""
    return "" if _make_triton else "; quantised slowly, by plain torch, for triton is not installed"


def _unable(device: torch.device, wanted: str, why: str) -> MachineError:
    return MachineError(
        f"cluster.fp8_backend = {wanted!r} cannot compute on {device}: {why}; choose 'auto'"
    )


def backend_for(device: torch.device, wanted: Fp8Backend = "auto") -> Backend:
    """The backend that `choose` names; MachineError where the device has no FP8."""
    choice = choose(device, wanted)
    if choice.backend is None:
        raise MachineError(f"FP8 on {device}: {choice.reason}; use precision = 'high'")
    return choice.backend


def quantize(
    x: Float[Tensor, "*P R C"], tile: Tile = ACTIVATION, power_of_two: bool = False
) -> Quantized:
    """`x` as E4M3: scale = amax / 448 of each tile, values = x / scale, to nearest, ties to even.

    Ragged edges behave as if padded with zeros. A tile whose scale would fall below 2^-126 gets
    zeros and scale 1; a tile with a value that is not finite is NaN throughout. `power_of_two`
    rounds the scale up to a power of two, as UE8M0 has them; up, so that nothing overflows.
    """
    return backend_for(x.device).quantize(x, tile, power_of_two=power_of_two)


def dequantize(q: Quantized) -> Float[Tensor, "*P R C"]:
    """values * scales, float32."""
    return backend_for(q.values.device).dequantize(q)


def matmul(a: Quantized, b: Quantized) -> Float[Tensor, "M N"]:
    """a @ b, summed in float32."""
    return backend_for(a.values.device).matmul(a, b)


def grouped_matmul(a: Quantized, b: Quantized, groups: Groups) -> Float[Tensor, "R N"]:
    """Rows of `a`, sorted by expert, times each expert's own matrix of `b` [E, K, N]."""
    return backend_for(a.values.device).grouped_matmul(a, b, groups)


def grouped_outer(a: Quantized, b: Quantized, groups: Groups) -> Float[Tensor, "E M N"]:
    """a^T b over each expert's rows alone, float32: the experts' weight gradients."""
    return backend_for(a.values.device).grouped_outer(a, b, groups)
