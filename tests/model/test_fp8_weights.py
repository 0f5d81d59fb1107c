"""Weights are quantised once between two changes, and nothing is computed from what is stale."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from configs.train import Fp8Config
from model.compressed import GroupedLinear
from model.dispatch import Dispatched
from model.fp8 import scheme as scheme_module
from model.fp8.experts import fp8_grouped_swiglu, fp8_swiglu
from model.fp8.groups import Groups
from model.fp8.linear import Linear, together
from model.fp8.quantized import BLOCK, Quantized, Tile
from model.fp8.recorder import Recorder
from model.fp8.reference import Reference
from model.fp8.scheme import Fp8
from model.weight_cache import forget, keep

WIDTH = 40
COUNTS = [3, 0, 5]


class Counting(Reference):
    """The slow twin, which says how often it quantised weights and in how many layouts."""

    reads_columns = True

    def __init__(self) -> None:
        self.weights: list[bool] = []

    def quantize(
        self,
        x: Tensor | Quantized,
        tile: Tile,
        *,
        power_of_two: bool = False,
        groups: Groups | None = None,
        saved: bool = True,
        multiplied: bool = True,
        by_column: bool = False,
    ) -> Quantized:
        if tile == BLOCK:
            self.weights.append(by_column)
        return super().quantize(x, tile, power_of_two=power_of_two, groups=groups)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    counting = Counting()
    monkeypatch.setattr(scheme_module, "backend_for", lambda device, wanted: counting)
    yield counting


class Layer(nn.Module):
    """Weights of some shapes, and what is computed of them."""

    def __init__(
        self, shapes: list[tuple[int, ...]], compute: Callable[..., Tensor], operands: int
    ) -> None:
        super().__init__()
        for number, shape in enumerate(shapes):
            draws = torch.randn(shape, generator=torch.Generator().manual_seed(number))
            self.register_parameter(f"weight_{number}", nn.Parameter(draws))
        self.compute, self.operands = compute, operands

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, *self.parameters())


def layer(kind: str, recorder: Recorder | None = None) -> Layer:
    """A layer of a kind; `operands` is into how many operands its weights are quantised."""
    scheme = Fp8("routed_experts", recorder=recorder or Recorder())

    def linears(x: Tensor, *weights: Tensor) -> Tensor:
        made = []
        for weight in weights:
            made.append(Linear(WIDTH, len(weight), scheme))
            made[-1].weight = weight  # type: ignore[assignment]
        return torch.cat(together(x, *made), -1)

    def dense(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return fp8_swiglu(x, gate, up, down, None, scheme)

    def experts(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        sent = Dispatched(x, torch.arange(len(x)), torch.tensor(COUNTS), None)
        return fp8_grouped_swiglu(sent, gate_up, down, None, scheme)

    def heads(x: Tensor, weight: Tensor) -> Tensor:
        made = GroupedLinear(WIDTH // 2, 16, 2, scheme)
        made.weight = weight  # type: ignore[assignment]
        y: Tensor = made(x.view(1, len(x), 2, WIDTH // 2))
        return y[0]

    # Gate and up are one operand where no block would straddle the two.
    kinds: dict[str, tuple[list[tuple[int, ...]], Callable[..., Tensor], int]] = {
        "linears": ([(24, WIDTH), (130, WIDTH)], linears, 2),
        "dense, one operand": ([(128, WIDTH), (128, WIDTH), (WIDTH, 128)], dense, 2),
        "dense, two operands": ([(96, WIDTH), (96, WIDTH), (WIDTH, 96)], dense, 3),
        "experts, one operand": ([(3, 256, WIDTH), (3, WIDTH, 128)], experts, 2),
        "experts, two operands": ([(3, 192, WIDTH), (3, WIDTH, 96)], experts, 3),
        "heads": ([(32, WIDTH // 2)], heads, 1),
    }
    return Layer(*kinds[kind])


every_kind = pytest.mark.parametrize(
    "kind",
    [
        "linears",
        "dense, one operand",
        "dense, two operands",
        "experts, one operand",
        "experts, two operands",
        "heads",
    ],
)


def pass_through(made: Layer) -> list[Tensor]:
    """An output and the gradients of a pass."""
    x = torch.randn(sum(COUNTS), WIDTH, generator=torch.Generator().manual_seed(9))
    x.requires_grad_()
    y = made(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(8))
    return [y.detach(), *torch.autograd.grad(y, [x, *made.parameters()], dy)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@every_kind
def test_a_kept_weight_is_quantised_once_until_it_changes(kind: str, backend: Counting) -> None:
    made = layer(kind)
    expected = pass_through(made)
    assert len(backend.weights) == made.operands
    pass_through(made)
    assert len(backend.weights) == 2 * made.operands, "nobody asked for it to be kept"
    keep(made)
    backend.weights.clear()
    for _ in range(3):
        assert_same(pass_through(made), expected)
    # Two layouts, for the input gradient.
    assert backend.weights == [True] * made.operands
    forget(made)
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(1.5)
    changed = pass_through(made)
    assert backend.weights == [True] * 2 * made.operands
    assert not torch.equal(changed[0], expected[0])
    twin = layer(kind)
    twin.load_state_dict(made.state_dict())
    assert_same(changed, pass_through(twin))


@every_kind
def test_where_nothing_learns_codes_have_one_layout(kind: str, backend: Counting) -> None:
    made = layer(kind)
    keep(made)
    with torch.no_grad():
        for _ in range(2):
            made(torch.ones(sum(COUNTS), WIDTH))
    assert backend.weights == [False] * made.operands


@pytest.mark.parametrize("number", range(3))
@pytest.mark.usefixtures("backend")
def test_a_change_of_one_of_the_weights_of_an_operand_is_seen(number: int) -> None:
    made = layer("dense, one operand")
    keep(made)
    before = pass_through(made)
    weight = list(made.parameters())[number]
    alone = nn.Module()
    alone.register_parameter("weight", weight)
    with torch.no_grad():
        weight.mul_(-1.5)
    forget(alone)
    after = pass_through(made)
    assert not torch.equal(before[0], after[0])
    twin = layer("dense, one operand")
    twin.load_state_dict(made.state_dict())
    assert_same(after, pass_through(twin))


@every_kind
def test_a_recorder_hears_of_kept_weights_as_of_others(kind: str) -> None:
    heard = []
    for keeping in (False, True):
        recorder = Recorder()
        made = layer(kind, recorder)
        if keeping:
            keep(made)
            pass_through(made)
        recorder.start(counting=True)
        for _ in range(2):
            pass_through(made)
        heard.append((recorder.tallies, [role for role, _ in recorder._scales]))
    assert heard[0] == heard[1]
    weights = heard[1][0]["routed_experts_weights"]
    assert weights.nonzero == 2 * sum(weight.numel() for weight in made.parameters())


def test_a_kept_weight_that_is_not_finite_is_found_again() -> None:
    recorder = Recorder()
    made = layer("linears", recorder)
    with torch.no_grad():
        next(made.parameters())[3, 3] = torch.inf
    keep(made)
    for _ in range(2):
        recorder.start(counting=False)
        pass_through(made)
        place = recorder.first_not_finite()
        assert place is not None
        assert recorder.role(place) == "routed_experts_weights"


@pytest.mark.parametrize("config", [Fp8Config(), Fp8Config(fp4_experts=True)], ids=["fp8", "fp4"])
@pytest.mark.usefixtures("backend")
def test_what_is_saved_of_a_weight_is_what_the_input_gradient_reads(config: Fp8Config) -> None:
    scheme = Fp8("routed_experts", config)
    weight = torch.randn(2, 130, 200, generator=torch.Generator().manual_seed(0))
    q = scheme.weights(weight)
    if not config.fp4_experts:
        assert q.by_column is None, "the slow twin has one layout"
        return
    assert q.by_column is not None
    assert q.by_column.mT.is_contiguous()
    assert torch.equal(q.by_column.float(), q.values.float())
    saved = q.layout(*q.tensors)
    assert torch.equal(saved.values.float(), q.values.float())
    assert saved.contracted(-2).stride(-2) == 1
    assert q.T.contracted(-2).stride(-2) == 1
