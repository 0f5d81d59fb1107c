"""vllm-ascend's integer arithmetic in torch: what an NPU computes of a stored variant.

| scheme | computed |
|---|---|
| W8A8 | q = round(x / input_scale + input_offset) in -128 .. 127; \
y = (q w^T + quant_bias) deq_scale |
| W8A8_DYNAMIC | s = absmax(token) / 127; q = round(x / s); y = (q w^T) weight_scale s |
| W4A8_DYNAMIC | the same, of weights of four bits |

Products of integers are exact, as the NPU's int32 are. All else is float32, where a server has
bfloat16. `emulate` puts this arithmetic into a model in place of its own, and `prove` holds the
product with each stored weight to that of the numbers it stands for.

Axes: T tokens, C inputs, R outputs, N visits of rows to experts.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from configs.errors import ExportError
from configs.seed import derive
from model.dispatch import Dispatched
from model.fp8.linear import Linear
from model.layers import SwiGLU
from model.moe import RoutedExperts
from model.swiglu import activation
from model.transformer import Transformer
from model.weights.config import table_of
from stages.export.ascend import Integers
from stages.export.schemes import INT8_MAX, Dynamic4, Scheme, Static8
from stages.export.tensors import TensorFolder

_COLUMNS = 2**24 // (128 * INT8_MAX)
"""Of so many products of integers every sum is exact in float32."""
_PROOF_TOKENS = 16
_SLACK = 2.0**-18
"""The few float32 operations around the integers, as a share of what was added up."""


class Product(nn.Module):
    """x [*B, C] -> y [*B, R] by what is stored of one weight."""

    weight: Tensor
    input_scale: Tensor
    input_offset: Tensor
    quant_bias: Tensor
    deq_scale: Tensor
    weight_scale: Tensor

    def __init__(self, form: Integers, stored: TensorFolder, name: str) -> None:
        """`name` is that of a source tensor that `form` quantises."""
        super().__init__()
        scheme = form.scheme(name)
        assert scheme is not None
        weight, *beside = (stored.read(part) for part in form.parts(name))
        if isinstance(scheme, Dynamic4):
            ones, none = torch.ones_like(beside[0]), torch.zeros_like(beside[1])
            weight = scheme.decode([weight, ones, none, none])
        self.static = isinstance(scheme, Static8)
        self.register_buffer("weight", weight.float(), persistent=False)
        for leaf, tensor in zip(scheme.beside, beside, strict=True):
            self.register_buffer(leaf, tensor, persistent=False)

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B R"]:
        """As the NPU computes it."""
        if not self.static:
            q, scale = quantize_tokens(x)
            return (self._sums(q) * self.weight_scale.flatten() * scale).to(x.dtype)
        reciprocal = (1 / self.input_scale.bfloat16()).float()
        q = (x.float() * reciprocal + self.input_offset).round().clamp(-128, 127)
        return ((self._sums(q) + self.quant_bias) * self.deq_scale).to(x.dtype)

    def _sums(self, q: Float[Tensor, "*B C"]) -> Tensor:
        """q w^T in int32."""
        columns = zip(q.split(_COLUMNS, -1), self.weight.split(_COLUMNS, -1), strict=True)
        return torch.stack([(one @ w.T).to(torch.int32) for one, w in columns]).sum(
            0, dtype=torch.int32
        )


class IntegerLinear(Linear):
    """A Linear by integers."""

    def __init__(self, product: Product) -> None:
        """Of a product already read."""
        nn.Module.__init__(self)
        self.product, self.scheme = product, None

    def multiply(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B R"]:
        """The product."""
        y: Tensor = self.product(x)
        return y


class IntegerSwiGLU(SwiGLU):
    """down(silu(gate(x)) * up(x)) by integers; what is between the products is not."""

    def __init__(self, gate: Product, up: Product, down: Product, limit: float | None) -> None:
        """Of products already read."""
        nn.Module.__init__(self)
        self.gate, self.up, self.down, self.limit = gate, up, down, limit

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B C"]:
        """Apply to each last-dim vector."""
        y: Tensor = self.down(activation(self.gate(x), self.up(x), self.limit))
        return y


class IntegerExperts(RoutedExperts):
    """Routed experts by integers, one after the other."""

    def __init__(self, experts: list[IntegerSwiGLU], local: tuple[int, ...]) -> None:
        """Those that live here, in the order of `local`."""
        nn.Module.__init__(self)
        self.each = nn.ModuleList(experts)
        self.local, self.scheme, self.limit = local, None, experts[0].limit

    def forward(self, sent: Dispatched) -> Float[Tensor, "R C"]:
        """Each row's sum of what its visits give."""
        visits = sent.x_RD.index_select(0, sent.rows_N).split(sent.counts_E.tolist())
        y_ND = torch.cat([expert(x) for expert, x in zip(self.each, visits, strict=True)])
        return sent.collect(y_ND)


def emulate(model: Transformer, form: Integers, stored: TensorFolder) -> None:
    """Let `model`, whose weights are those of `stored`, multiply as an NPU does."""
    # By name alone: modules that were replaced are not kept.
    for name in [name for name, _ in model.named_modules() if name]:
        path, _, leaf = name.rpartition(".")
        try:
            parent, module = model.get_submodule(path), model.get_submodule(name)
        except AttributeError:
            continue  # what a module that was replaced had inside is gone with it
        replaced = _integers(model, form, stored, name, module)
        if replaced is not None:
            setattr(parent, leaf, replaced)


def prove(source: TensorFolder, stored: TensorFolder, form: Integers, *, seed: int) -> int:
    """The number of weights whose product by integers is that of the numbers they stand for.

    Each is multiplied with a few tokens that integers hold without rounding, and compared with a
    product in float64 of what `form` decodes. ExportError names the first weight that is further
    off than float32's last places. That what is decoded is the source is proved apart.
    """
    names = [name for name in source.names if form.scheme(name) is not None]
    for name in names:
        scheme, w_RC = form.scheme(name), form.decode(name, stored.read).double()
        assert scheme is not None
        x_TC = _exact_tokens(scheme, w_RC.shape[1], derive(seed, "export", "emulator", name))
        found_TR = Product(form, stored, name)(x_TC).double()
        missed_TR = (found_TR - x_TC.double() @ w_RC.T).abs()
        wrong_R = (missed_TR > _SLACK * (x_TC.double().abs() @ w_RC.abs().T) + 1e-30).any(0)
        if wrong_R.any():
            raise ExportError(
                f"{form.variant}: tensor {name}: output {int(wrong_R.nonzero()[0])} of the product "
                "that an NPU computes with it and the tensors beside it is not that of the weights "
                "which they stand for; export again"
            )
        if isinstance(scheme, Dynamic4):
            _check_bias(stored, form, name, scheme)
    return len(names)


def quantize_tokens(x: Float[Tensor, "*B C"]) -> tuple[Tensor, Float[Tensor, "*B 1"]]:
    """(whole numbers within -127 .. 127 as float32, the scale of each token)."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / INT8_MAX
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (x / scale).round(), scale


def _exact_tokens(scheme: Scheme, columns: int, seed: int) -> Float[Tensor, "T C"]:
    """Activations that the scheme quantises to drawn integers, and back without an error."""
    generator = torch.Generator().manual_seed(seed)
    q_TC = torch.randint(-128, 128, (_PROOF_TOKENS, columns), generator=generator).float()
    if isinstance(scheme, Static8):
        scale, offset = scheme.of_inputs()
        return (q_TC - offset) * scale
    q_TC = q_TC.clamp_min(-INT8_MAX)
    q_TC[:, 0] = INT8_MAX
    return q_TC / 2**10


def _check_bias(stored: TensorFolder, form: Integers, name: str, scheme: Dynamic4) -> None:
    """ExportError unless `scale_bias` is 8 times the sum of what the stored weights stand for."""
    weight_RC = form.decode(name, stored.read).double()
    bias = stored.read(form.parts(name)[-1]).double()
    summed = 8 * weight_RC.unflatten(1, (scheme.chunks, -1)).sum(-1)
    if (bias - summed).abs().gt(8 * _SLACK * weight_RC.abs().sum(1, keepdim=True)).any():
        raise ExportError(
            f"{form.variant}: tensor {form.parts(name)[-1]} is not 8 times the sum of its "
            "weights, which the NPU takes it to be; export again"
        )


def _integers(
    model: Transformer, form: Integers, stored: TensorFolder, name: str, module: nn.Module
) -> nn.Module | None:
    """What stands in for a module; none if it stays as it is."""

    def products(tensor: str) -> Iterator[Product | None]:
        for part in table_of(model.config).parts(model.config, tensor):
            known = form.scheme(part.name) is not None
            yield Product(form, stored, part.name) if known else None

    match module:
        case RoutedExperts():
            inner = [one for one in products(f"{name}.gate_up_proj") if one is not None]
            down = [one for one in products(f"{name}.down_proj") if one is not None]
            if not down:
                return None
            experts = [
                IntegerSwiGLU(inner[2 * at], inner[2 * at + 1], one, module.limit)
                for at, one in enumerate(down)
            ]
            return IntegerExperts(experts, module.local)
        case SwiGLU():
            leaves = ("gate_proj", "up_proj", "down_proj")
            found = [*(one for leaf in leaves for one in products(f"{name}.{leaf}.weight"))]
            gate, up, down_ = found
            if gate is None or up is None or down_ is None:
                return None
            return IntegerSwiGLU(gate, up, down_, module.limit)
        case Linear():
            (one,) = products(f"{name}.weight")
            return None if one is None else IntegerLinear(one)
    return None
