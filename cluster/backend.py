"""What computes: one table of CPUs, CUDA devices and Ascend NPUs.

| | `cpu` | `cuda` | `npu` |
|---|---|---|---|
| a worker's device | cpu | cuda:0, the one that Ray leaves visible | npu:0, likewise |
| computes in | float32, or bfloat16 if asked | bfloat16 | bfloat16 |
| parameters, gradients | float32 | float32 | float32 |
| collectives | gloo | nccl, gloo beside it | hccl, gloo beside it |
| Ray counts | CPU | GPU | NPU |

All that differs between devices is said here, and no other file of `cluster`, `stages` or
`pipeline` names one, its library or a variable of it. Collectives of numbers that the host holds,
as the sums that steps are controlled by, go over gloo on every device: it takes float64, and waits
for no device.
"""

import importlib.util
import math
import os
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cluster.autoload import AUTOLOAD, LIBRARY
from cluster.rates import Rates, measure
from configs.errors import MachineError
from configs.parallel import ClusterConfig, Compute, Device
from configs.train import Precision
from model.fp8.scheme import Numerics, settle


class Memory(NamedTuple):
    """Of this process, in bytes: on its device, or of the machine's where that is the CPU."""

    used: int
    peak: int


class Timeouts(NamedTuple):
    """Variables, in seconds, that bound a library's own waits."""

    execute: str
    """For one collective; the library counts in multiples of `step`."""
    connect: str
    step: int
    connect_least: int
    connect_most: int


@dataclass(frozen=True, slots=True)
class Found:
    """What this process sees of one kind of device."""

    count: int = 0
    name: str = ""
    """Of the first."""
    too_old: str | None = None
    """Why it cannot compute in bfloat16."""
    fault: str | None = None
    """Why there is none, and what to do."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One row of the table."""

    name: str
    device: str
    """A worker's own."""
    compute: torch.dtype | None
    """What states and products are computed in; None is that of the weights."""
    group: str
    """What a process group is made of."""
    resource: str
    """What Ray calls such a device."""
    visible_env: str | None
    """Lists the devices that a process sees."""
    look: Callable[[], Found]
    env: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Variables of every worker."""
    sockets: tuple[str, ...] = ("GLOO_SOCKET_IFNAME",)
    """Name the network of collectives."""
    timeouts: Timeouts | None = None
    lost: tuple[str, ...] = ()
    """What errors say once the device, or this process's way to it, cannot be used any more."""
    signs: tuple[str, ...] = ()
    """Files that are there where such a device is, whether or not it can be used."""
    has_graphs: bool = False
    """Whether a sequence of launches can be recorded and replayed."""
    has_float64: bool = True
    deterministic: bool = False
    """Whether torch must be told to take the operations that repeat bit for bit."""
    master: torch.dtype = torch.float32
    """Of parameters and gradients."""

    @property
    def is_host(self) -> bool:
        """Whether tensors of a device and of its host are the same."""
        return self.resource == "CPU"

    @property
    def has_signs(self) -> bool:
        """Whether such a device is on this machine, for all that its driver shows."""
        return any(Path(sign).exists() for sign in self.signs)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return self.compute or self.master

    @property
    def dtype_name(self) -> str:
        """The same for records, as `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def module(self) -> Any:
        """torch's own for the device: `synchronize`, `Stream`, `Event` and others."""
        return torch.get_device_module(self.device)

    def numerics(self, wanted: Precision | Numerics) -> Numerics:
        """`wanted`, with the type of states and products that this device computes in."""
        numerics = wanted if isinstance(wanted, Numerics) else Numerics(wanted)
        return replace(numerics, compute=numerics.compute or self.compute)

    def place(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch on the device: copied from pinned memory, so that the host waits for nothing."""
        if self.is_host:
            return dict(batch)
        return {
            name: self.pinned(tensor).to(self.device, non_blocking=True)
            for name, tensor in batch.items()
        }

    def pinned(self, tensor: Tensor) -> Tensor:
        """The tensor in memory that the device reads by itself."""
        its_own = self.is_host or tensor.device.type != "cpu" or tensor.is_pinned()
        return tensor if its_own else tensor.pin_memory()

    def begin(self, seed: int) -> None:
        """Set up this process's use of its device; MachineError if it cannot be used."""
        # On all devices, as they come to be used.
        torch.manual_seed(seed)
        require(self)
        if self.is_host:
            return
        self.module.set_device(torch.device(self.device).index)
        if self.deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
            # It would write into all memory that is asked for without values. torch sets it by a
            # property of the module, which types do not show.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    def memory(self) -> Memory:
        """What this process uses now, and at most until now."""
        if self.is_host:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return Memory(_occupied(peak), peak)
        return Memory(self.module.memory_allocated(), self.module.max_memory_allocated())

    def rates(self) -> Rates:
        """How quickly this process multiplies and moves bytes; measured once, in a moment."""
        return _measured(self.device, self.dtype)

    def card(self) -> str:
        """What this process's device calls itself; `cpu` for CPUs."""
        return self.name if self.is_host else str(self.module.get_device_name())

    def facts(self) -> dict[str, str]:
        """What records say of it."""
        return {"device": self.card(), "compute": self.dtype_name}

    def asked(self, share: float) -> dict[str, Any]:
        """Options of an actor that reserves so much of a device."""
        match self.resource:
            case "CPU":
                return {}
            case "GPU":
                return {"num_gpus": share}
            case other:
                return {"resources": {other: share}}

    def bundle(self, share: float) -> dict[str, float]:
        """The same beside CPUs, in a bundle of resources."""
        return {} if self.is_host else {self.resource: share}


def _occupied(peak: int) -> int:
    """Bytes of main memory that this process has now; its peak where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak
    return pages * resource.getpagesize()


@lru_cache
def _measured(device: str, dtype: torch.dtype) -> Rates:
    return measure(torch.device(device), dtype)


def _look_at_cpu() -> Found:
    return Found(count=1, name="cpu")


_UNITS = "avx512_bf16", "amx_bf16"
"""Flags of processors that multiply bfloat16 faster than float32."""


@lru_cache
def cpu_flags() -> frozenset[str]:
    """What this machine's processor can do, by the system's names; nothing where it tells none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def has_units() -> bool:
    """Whether this machine's processor has units for bfloat16."""
    return not cpu_flags().isdisjoint(_UNITS)


def _look_at_cuda() -> Found:
    if torch.version.cuda is None and torch.version.hip is None:
        version = torch.__version__
        return Found(fault=f"torch {version} is built without CUDA; install its build with CUDA")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return Found(fault=_why_no_cuda())
    name, (major, minor) = torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)
    old = None
    if major < 8:
        old = f"{name} (sm_{major}{minor}) is too old for bfloat16, which cards have from sm_80 on"
    return Found(count, name, old)


def _why_no_cuda() -> str:
    """What CUDA itself says when it is asked to begin, with the remedy."""
    try:
        torch.cuda.init()
        why = ""
    except (RuntimeError, AssertionError) as error:
        why = str(error)
    return no_cuda(why, str(torch.version.cuda), os.environ.get("CUDA_VISIBLE_DEVICES"))


def no_cuda(why: str, version: str, listed: str | None) -> str:
    """Why there is no CUDA device, and what to do, from what CUDA said (`why`), the version that
    torch is built for, and the devices that the user lists."""
    if "too old" in why:
        return (
            f"the NVIDIA driver is too old for a torch built for CUDA {version}; update the "
            "driver, or install a torch built for an older CUDA"
        )
    if "no NVIDIA driver" in why:
        return "no NVIDIA driver is found; install one, and see that nvidia-smi lists the card"
    if any(one in why for one in ("unknown error", "initialization error", "mismatch")):
        first = " ".join(why.split(". ")[0].split(" - ")[0].split())
        return (
            f"CUDA does not begin ({first}), for driver and libraries do not fit each other; "
            "restart the machine if the driver was updated, or install both anew"
        )
    if listed is not None:
        return f"CUDA_VISIBLE_DEVICES = {listed!r} leaves no CUDA device; correct it, or unset it"
    return "no CUDA device is found; see that nvidia-smi lists the card"


def _look_at_npu() -> Found:
    if importlib.util.find_spec(LIBRARY) is None:
        return Found(
            fault=f"{LIBRARY} is not installed; install the one of this torch's version, and CANN"
        )
    module = getattr(torch, "npu", None)
    if module is None:
        return Found(
            fault=f"{LIBRARY} is installed and not loaded, for {AUTOLOAD} = "
            f"{os.environ.get(AUTOLOAD)!r}; unset it where CANN is set up"
        )
    count = int(module.device_count())
    if count == 0:
        return Found(
            fault=f"{LIBRARY} sees no NPU; see that npu-smi info lists it, and that "
            "ASCEND_RT_VISIBLE_DEVICES does not hide it"
        )
    name = str(module.get_device_name(0))
    old = None if module.is_bf16_supported() else f"{name} has no bfloat16, which 910B has"
    return Found(count, name, old)


_ALLOCATING = "expandable_segments:True"
"""Spares what differing sizes of batches would leave between blocks."""

CPU = Backend(
    name="cpu",
    device="cpu",
    compute=None,
    group="gloo",
    resource="CPU",
    visible_env=None,
    look=_look_at_cpu,
    # One arena that is never given back spares the allocator a page fault for each temporary:
    # measured 2 to 3 times on the quantiser.
    env={
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(16 * 1024**3),
        "MALLOC_TOP_PAD_": str(64 * 1024**2),
    },
)
CUDA = Backend(
    name="cuda",
    device="cuda:0",
    compute=torch.bfloat16,
    group="cpu:gloo,cuda:nccl",
    resource="GPU",
    visible_env="CUDA_VISIBLE_DEVICES",
    look=_look_at_cuda,
    env={
        "PYTORCH_ALLOC_CONF": _ALLOCATING,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        # Its watchdog ends a process whose collective is late, and says which one that was.
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
    },
    sockets=("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
    lost=("device-side assert", "has fallen off the bus", "uncorrectable ECC"),
    signs=("/dev/nvidia0", "/dev/nvidiactl", "/proc/driver/nvidia"),
    has_graphs=True,
)
NPU = Backend(
    name="npu",
    device="npu:0",
    compute=torch.bfloat16,
    group="cpu:gloo,npu:hccl",
    resource="NPU",
    visible_env="ASCEND_RT_VISIBLE_DEVICES",
    look=_look_at_npu,
    env={
        "PYTORCH_NPU_ALLOC_CONF": _ALLOCATING,
        "HCCL_DETERMINISTIC": "true",
        "TASK_QUEUE_ENABLE": "2",
        "CPU_AFFINITY_CONF": "1",
    },
    sockets=("GLOO_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME"),
    lost=("NPU function error",),
    signs=("/dev/davinci0", "/dev/davinci_manager"),
    timeouts=Timeouts("HCCL_EXEC_TIMEOUT", "HCCL_CONNECT_TIMEOUT", 68, 120, 7200),
    has_graphs=True,
    has_float64=False,
    deterministic=True,
)
BACKENDS: Mapping[str, Backend] = {one.name: one for one in (CPU, CUDA, NPU)}
ACCELERATORS = (CUDA, NPU)


def require(backend: Backend) -> None:
    """MachineError unless this process can compute on such a device, and in its type."""
    if backend.is_host:
        if backend.dtype == torch.bfloat16 and not has_units():
            raise MachineError(
                f"cluster.compute = 'bfloat16': this machine's CPU has neither {_UNITS[0]} nor "
                f"{_UNITS[1]}, and is slower in it than in float32; use 'auto'"
            )
        return
    found = backend.look()
    if fault := found.fault or found.too_old:
        raise MachineError(f"cluster.device = {backend.name!r}: {fault}; or use 'cpu'")


def seen() -> dict[str, float]:
    """The devices beside CPUs that this process sees and can compute on, by Ray's names."""
    found = {one.resource: one.look() for one in ACCELERATORS}
    return {name: float(one.count) for name, one in found.items() if one.count and not one.too_old}


def hidden(backend: Backend) -> dict[str, str]:
    """Variables that hide from a worker all devices but those of its backend."""
    others = [one.visible_env for one in ACCELERATORS if one.name != backend.name]
    return {variable: "" for variable in others if variable is not None}


def decide(wanted: Device, there: Mapping[str, float]) -> Backend:
    """The backend that workers use, of devices that are `there`, by Ray's names.

    MachineError if the one `wanted` is not there, or if "auto" finds two kinds.
    """
    if wanted == "auto":
        found = [one for one in ACCELERATORS if there.get(one.resource, 0) >= 1]
        if len(found) > 1:
            kinds = " and ".join(f"{there[one.resource]:g} {one.resource}s" for one in found)
            raise MachineError(
                f"cluster.device = 'auto': the cluster has {kinds}, which cannot work in one "
                f"group; set it to {' or '.join(repr(one.name) for one in found)}"
            )
        return found[0] if found else CPU
    backend = BACKENDS[wanted]
    if not backend.is_host and there.get(backend.resource, 0) < 1:
        raise MachineError(
            f"cluster.device = {wanted!r}: no {backend.resource} is there; set it to 'cpu', or "
            "name a cluster in cluster.address that has one"
        )
    return backend


def computing(backend: Backend, wanted: Compute) -> Backend:
    """The backend, computing in what is `wanted` of it."""
    if wanted == "auto":
        return backend
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    return replace(backend, compute=None if dtype == backend.master else dtype)


def foresee(wanted: Numerics, machines: ClusterConfig) -> None:
    """Refuse what workers could not compute before any is started.

    MachineError as of `decide`, `require` and `settle`. The devices and processors of a named
    cluster are seen by its workers alone, which say the same of them.
    """
    require_asked(machines)
    if machines.address is None or machines.device == "cpu":
        backend = computing(decide(machines.device, seen()), machines.compute)
        settle(backend.numerics(wanted), torch.device(backend.device))


def require_asked(machines: ClusterConfig) -> None:
    """MachineError unless this machine has the device, and the type, that its workers are to use.

    Nothing is said of a named cluster.
    """
    if machines.address is not None:
        return
    if machines.device != "auto":
        # What stands in the way of a device that is asked for says more than that none is there.
        require(computing(BACKENDS[machines.device], machines.compute))
    require(computing(decide(machines.device, seen()), machines.compute))


def fitted(machines: ClusterConfig) -> ClusterConfig:
    """`machines`, with no more trainers than this machine has devices for, unless their number was
    asked for: the default suits two cores, and a trainer takes a whole device."""
    if machines.address is not None or "trainers" in machines.model_fields_set:
        return machines
    there = seen()
    backend = decide(machines.device, there)
    if backend.is_host:
        return machines
    trainers = min(machines.trainers, int(there[backend.resource]))
    pp = math.gcd(machines.pp, trainers)
    ep = None if machines.ep is None else math.gcd(machines.ep, trainers // pp)
    return machines.model_copy(update={"trainers": trainers, "pp": pp, "ep": ep})


def own(wanted: Device) -> Backend:
    """What this process itself computes on: a device if it is to and sees one, else the CPU."""
    for one in ACCELERATORS:
        if wanted in ("auto", one.name):
            found = one.look()
            if found.count and not found.too_old:
                return one
    return CPU
