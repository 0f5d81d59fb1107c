"""A device that is not there: tensors that say `npu:0` and compute on the host.

torch lets a program define a device (`PrivateUse1`). Here a tensor of that device is a wrapper
around one of the host; each operation is unwrapped, shown to a `Ledger`, done by the host's kernels
and wrapped again. Autograd, modules, optimisers and process groups take it for an accelerator.

It shows which tensors lie where, what the host waits for, and that values are the CPU's. It shows
nothing of speed, of an accelerator's rounding, or of work that overlaps: each operation is done
when it is asked for. It costs some 100 us an operation.

A process that has it cannot be rid of it, so a test runs what needs it in one of its own
(`tests.ranks.apart`), where `with device() as ledger:` opens it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ledger import Ledger, aten, host_of, on_device

try:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as _setup
except ImportError:
    MISSING = f"torch {torch.__version__} lets no Python program define a device"
else:
    MISSING = ""
"""Why there is no stand-in, for `pytest.mark.skipif`."""

NPU = "npu:0"
ModuleT = TypeVar("ModuleT", bound=nn.Module)
_ledgers: list[Ledger] = []
"""That of the device while it is open."""


class Standin(Tensor):
    """A tensor of the device, whose values are in `host`."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> "Standin":
        """A view of the same memory, without a gradient."""
        tensor: Standin = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(NPU),
        )
        tensor.host = host
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        """Values, for which the host waits."""
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The host's, by which a writer of files sees which tensors share memory."""
        return self.host.untyped_storage()

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"{NPU} {self.host!r}"


class _Device(TorchDispatchMode):
    """Sees what makes tensors from nothing, too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Module:
    """What `torch.npu` says of the device; moments in time and streams mean nothing here."""

    is_initialized = is_available = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    set_device = staticmethod(lambda device: None)
    manual_seed_all = staticmethod(lambda seed: None)
    manual_seed = staticmethod(lambda seed: None)
    memory_allocated = max_memory_allocated = staticmethod(lambda device=None: 0)
    reset_peak_memory_stats = empty_cache = staticmethod(lambda device=None: None)
    get_device_name = staticmethod(lambda device=None: "stand-in")
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))

    @staticmethod
    def synchronize(device: object = None) -> None:
        """Wait for the device."""
        for ledger in _ledgers:
            ledger.note("sync", "synchronize")


@cache
def _register() -> None:
    _setup("npu", _Module())


@contextmanager
def device() -> Iterator[Ledger]:
    """Let this process have the device `npu:0`; what is to be said of its use."""
    _register()
    ledger = Ledger()
    make, make_as = torch.tensor, torch.as_tensor

    def tensor(data: Any, *, device: Any = None, requires_grad: bool = False, **other: Any) -> Any:
        made = make(data, **other, device="cpu" if _is_npu(device) else device)
        return (made.to(device) if _is_npu(device) else made).requires_grad_(requires_grad)

    def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Any:
        if isinstance(data, Tensor) or not _is_npu(device):
            return make_as(data, dtype=dtype, device=device)
        return make_as(data, dtype=dtype).to(device)

    with ExitStack() as stack:
        # These make what they return past every mode.
        stack.enter_context(patch.object(torch, "tensor", tensor))
        stack.enter_context(patch.object(torch, "as_tensor", as_tensor))
        # A tensor made in it has no count of changes, which a view of a wrapper asks for.
        stack.enter_context(patch.object(torch, "inference_mode", _without_gradients))
        stack.enter_context(_Device())
        _ledgers.append(ledger)
        stack.callback(_ledgers.remove, ledger)
        yield ledger


def mode() -> TorchDispatchMode:
    """What lets another thread of a process with the device make tensors of it."""
    return _Device()


def to_device(tensor: Tensor) -> Tensor:
    """A copy on the device that no ledger notes, such as a test's own input."""
    return Standin(tensor.detach().clone())


def move(module: ModuleT) -> ModuleT:
    """Copy every parameter and buffer to the device, in place; the module.

    `Module.to` would write into parameters, which cannot change what they are.
    """
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not on_device(parameter):
                moved = nn.Parameter(to_device(parameter), requires_grad=parameter.requires_grad)
                part._parameters[name] = moved
        for name, buffer in part._buffers.items():
            if buffer is not None and not on_device(buffer):
                part._buffers[name] = to_device(buffer)
    return module


def on_host(tensor: Tensor) -> Tensor:
    """A copy of its values that no ledger notes, for a test to look at."""
    host: Tensor = host_of(tensor).detach().clone()
    return host


def _without_gradients(mode: bool = True) -> Any:
    return torch.set_grad_enabled(not mode)


def _is_npu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "npu"


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation: judged, done by the host, and its results put where they belong."""
    ledger = _ledgers[-1] if _ledgers else Ledger()
    tensors: list[Tensor] = []

    def bare(tensor: Tensor) -> Any:
        tensors.append(tensor)
        return host_of(tensor)

    host_args = _each(args, bare)
    host_kwargs = {name: _each(value, bare) for name, value in kwargs.items()}
    touches, asked = any(map(on_device, tensors)), kwargs.get("device")
    if func.overloadpacket is aten._pin_memory:
        return ledger.pin(args[0])
    if func.overloadpacket is aten.is_pinned:
        return ledger.is_pinned(host_of(args[0]))
    here = touches if asked is None else _is_npu(asked)
    if not touches and not here:
        return func(*args, **kwargs)
    ledger.judge(func, args, kwargs, tensors)
    if asked is not None:
        host_kwargs["device"] = "cpu"
    result = func(*host_args, **host_kwargs)
    if written := [args[w] if isinstance(w, int) else kwargs[w] for w in _written(func)]:
        if torch.Tag.inplace_view in func.tags:
            # The wrapper takes the same shape; it has no memory to be touched.
            with no_dispatch():
                func(*args, **kwargs)
        for argument in written:
            _check_shape(func, argument)
        return written[0] if len(written) == 1 else tuple(written)

    def wrapped(tensor: Tensor) -> Tensor:
        ledger.made(func, tensor)
        return Standin(tensor)

    return _each(result, wrapped) if here else result


def _each(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """`value` with its tensors changed; operations hold them in lists and tuples alone."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_each(one, change) for one in value)
    return value


@cache
def _written(func: Any) -> tuple[int | str, ...]:
    """The arguments that an operation writes to and returns, by place or by name."""
    found: list[int | str] = []
    for returned in func._schema.returns:
        if returned.alias_info is None or not returned.alias_info.is_write:
            continue
        for number, argument in enumerate(func._schema.arguments):
            same = argument.alias_info is not None and (
                argument.alias_info.before_set & returned.alias_info.before_set
            )
            if same:
                found.append(argument.name if argument.kwarg_only else number)
    return tuple(found)


def _check_shape(func: Any, argument: Any) -> None:
    """A wrapper cannot follow its host's tensor to another shape."""
    host = host_of(argument)
    if isinstance(argument, Standin):
        assert (host.shape, host.stride()) == (argument.shape, argument.stride()), (
            f"{func} changed the shape of its output, which the stand-in cannot"
        )
