"""What parts of a model call on the device of `tests.fake_cuda`, at any width; no values are there.

Axes: T tokens, E experts, K choices.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from configs.reading import load_recipe
from model.dispatch import LocalDispatcher
from model.fp8.scheme import Numerics
from model.moe import MoE
from model.transformer import Transformer
from stages.pretrain.objective import PretrainLoss
from tests.ledger import place
from tests.losses import part_of
from tests.references import reading

DEVICE = "cuda"
aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten._grouped_mm}


class Answering(TorchDispatchMode):
    """Counts calls, and answers those whose results the host reads: values are nowhere else.

    Every number read is `number`; what `bincount` finds has `minlength` places, and `nonzero` finds
    one. Answers decide what the host does next, so `number` must suit what is run: the visits to
    each expert, say.
    """

    def __init__(self, number: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = number
        self.calls = Counter[str]()
        """By operation."""
        self.products = Counter[str]()
        """Matrix products, as `type x type in file function`."""
        self.reads = 0
        """Results that the host waits for."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten":
            self.calls[str(func).removeprefix("aten.")] += 1
        if func.overloadpacket in PRODUCTS:
            tensors = [x for x in args if isinstance(x, Tensor)]
            factors = tensors[:2] if func.overloadpacket is aten._grouped_mm else tensors[-2:]
            types = " x ".join(str(x.dtype).removeprefix("torch.") for x in factors)
            self.products[f"{types} in {place()}"] += 1
        match func.overloadpacket:
            case aten._local_scalar_dense:
                self.reads += 1
                return self.number if not args[0].dtype.is_floating_point else float(self.number)
            case aten.bincount:
                self.reads += 1
                return args[0].new_empty(args[2] if len(args) > 2 else kwargs["minlength"])
            case aten.nonzero:
                self.reads += 1
                return args[0].new_empty(1, args[0].dim(), dtype=torch.int64)
        return func(*args, **kwargs)


@contextmanager
def fake_device(number: int) -> Iterator[Answering]:
    """Tensors made within have no values; numbers read of them are `number`."""

    def tolist(tensor: Tensor) -> Any:
        """One copy to the host, as it is on a device."""
        answering.calls["_to_copy.default"] += 1
        answering.reads += 1
        if tensor.dim() == 0:
            return number
        return [number if tensor.dim() == 1 else tolist(row) for row in tensor]

    with (
        FakeTensorMode(),
        Answering(number) as answering,
        patch.object(FakeTensor, "tolist", tolist),
    ):
        yield answering


def calls_of(
    part: Callable[[], nn.Module], shape: tuple[int, ...], *, number: int, dtype: torch.dtype
) -> dict[str, Any]:
    """What one pass of a part calls, forward and backward: `calls` and `products` by name, `reads`.

    `part` makes the module; it is given one tensor of this shape and type, which needs a gradient,
    and a pass.
    AssertionError if no gradient reaches a parameter, or one of another type than its own.
    """
    with fake_device(number) as seen:
        with torch.device(DEVICE):
            module, x = part(), torch.empty(shape, dtype=dtype, requires_grad=True)
        seen.calls.clear()
        y, _ = module(x, reading(x))
        y.backward(torch.empty_like(y))
        assert x.grad is not None and x.grad.device.type == DEVICE
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, f"no gradient reaches {name}"
            assert parameter.grad.dtype == parameter.dtype, f"{name}: {parameter.grad.dtype}"
    return {"calls": seen.calls, "products": seen.products, "reads": seen.reads}


def calls_of_moe(experts: int, tokens: int = 4096) -> dict[str, Any]:
    """`calls_of` an MoE layer of DeepSeek-V3's widths, all of its `experts` on this device."""
    config = load_recipe("deepseek-v3").model.model_copy(
        update={"n_routed_experts": experts, "n_group": 1, "topk_group": 1}
    )
    numerics = Numerics(compute=torch.bfloat16)
    return calls_of(
        lambda: MoE(config, config.depth - 1, numerics, LocalDispatcher(experts)),
        (1, tokens, config.hidden_size),
        number=tokens * config.num_experts_per_tok // experts,
        dtype=torch.bfloat16,
    )


def calls_of_step(layers: int, tokens: int = 4096) -> dict[str, Any]:
    """What a pass of the pretraining loss calls, forward and backward, in bfloat16.

    The model is DeepSeek-V3 with this many layers, the first of them dense, 32 experts in each
    other one, and the MTP layer. Documents are not told apart: the kernel for them is compiled.
    """
    shape = {"num_hidden_layers": layers, "first_k_dense_replace": 1}
    routing = {"n_routed_experts": 32, "n_group": 1, "topk_group": 1}
    config = load_recipe("deepseek-v3").model.model_copy(update=shape | routing)
    loss = PretrainLoss(mtp_weight=0.3, balance_weight=1e-4, attend_across_documents=True)
    with fake_device(tokens * config.num_experts_per_tok // 32) as seen:
        with torch.device(DEVICE):
            model = Transformer(config, precision=Numerics(compute=torch.bfloat16))
            batch = {"tokens": torch.empty(1, tokens, dtype=torch.int64)}
        seen.calls.clear()
        totals = {"next": float(tokens), "after_next": float(tokens), "sequences": 1.0}
        value, _ = part_of(loss, model, batch, totals)
        value.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"no gradient reaches {name}"
            assert parameter.grad.dtype == torch.float32, f"{name}: {parameter.grad.dtype}"
    return {"calls": seen.calls, "products": seen.products, "reads": seen.reads}
