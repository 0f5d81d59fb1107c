"""AdamW against its formula, moments through a round trip, the schedule at its corners."""

import math

import pytest
import torch
from torch import Tensor, nn

from configs.engram import EngramConfig
from configs.errors import ArtifactError, ConfigError
from configs.train import OptimConfig
from model import optim
from model.engram import MemoryTable
from model.optim import adamw, moments, restore_moments, warmup_cosine
from model.transformer import Transformer
from tests.references import tiny_v4

CONFIG = OptimConfig(
    learning_rate=0.1,
    beta1=0.8,
    beta2=0.9,
    epsilon=1e-3,
    weight_decay=0.5,
    moments="float32",
)


def toy(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.ModuleDict({"matrix": nn.Linear(3, 4, bias=False), "norm": nn.RMSNorm(3)})


def walk(model: nn.Module, optimizer: torch.optim.AdamW, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        optimizer.step()


def test_matrices_decay_and_vectors_do_not() -> None:
    model = toy()
    before = [p.detach().double() for p in model.parameters()]
    walk(model, adamw(model, CONFIG), range(3))
    for parameter, start, decay in zip(model.parameters(), before, (0.5, 0.0), strict=True):
        first, second = torch.zeros_like(start), torch.zeros_like(start)
        grads = torch.zeros(3, *start.shape, dtype=torch.float64)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                g = torch.randn(p.shape, generator=generator)
                if p is parameter:
                    grads[step] = g.double()
        for step in range(3):
            first = 0.8 * first + 0.2 * grads[step]
            second = 0.9 * second + 0.1 * grads[step].square()
            root = (second / (1 - 0.9 ** (step + 1))).sqrt() + 1e-3
            start = start * (1 - 0.1 * decay) - 0.1 * first / (1 - 0.8 ** (step + 1)) / root
        torch.testing.assert_close(parameter.detach().double(), start, rtol=1e-5, atol=1e-6)


def test_a_table_learns_faster_and_does_not_decay() -> None:
    config = CONFIG.model_copy(update={"epsilon": 1e-12, "table_rate_factor": 3.0})
    model = nn.ModuleDict({"table": MemoryTable(4, 3, on_host=False), "matrix": nn.Linear(3, 4)})
    optimizer = adamw(model, config)
    before = {name: p.detach().fill_(1.0).clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    optimizer.step()
    moved = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    # The first step of Adam is the rate, whatever the gradient; half a rate decays from 1.
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx({"model": 0.1, "table": 0.3}[group["rate_group"]])
    expected = {"table.weight": 0.3, "matrix.weight": 0.1 + 0.1 * 0.5, "matrix.bias": 0.1}
    for name, step in expected.items():
        torch.testing.assert_close(moved[name], torch.full_like(moved[name], step))


def test_what_begins_at_a_constant_does_not_decay_whatever_its_shape() -> None:
    memory = EngramConfig(
        layer_ids=(1,), table_sizes=(40, 40), n_embed_per_ngram=8, n_head_per_ngram=2
    )
    model = Transformer(tiny_v4(engram=memory))
    decay = {
        id(parameter): group["weight_decay"]
        for group in adamw(model, CONFIG).param_groups
        for parameter in group["params"]
    }
    named = dict(model.named_parameters())
    assert decay.keys() == {id(parameter) for parameter in named.values()}
    spared = {n for n, p in named.items() if p.dim() > 1 and decay[id(p)] == 0.0}
    leaves = ("position_bias", "short_conv.weight", "engram.table.weight")
    assert spared == {name for name in named if name.endswith(leaves)}
    assert len({leaf for leaf in leaves for name in spared if name.endswith(leaf)}) == 3
    assert decay[id(named["model.layers.0.attn_hc.fn"])] == CONFIG.weight_decay
    assert not any(decay[id(p)] for p in named.values() if p.dim() < 2)


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_moments_that_are_put_back_continue_the_same_walk(kind: str) -> None:
    config = CONFIG.model_copy(update={"moments": kind})
    whole, resumed = toy(), toy()
    optimizer = adamw(whole, config)
    walk(whole, optimizer, range(5))
    first = adamw(resumed, config)
    walk(resumed, first, range(2))
    kept = moments(first, resumed.named_parameters())
    assert sorted(kept) == sorted(
        f"{moment}/{name}"
        for moment in ("exp_avg", "exp_avg_sq", "updates")
        for name, _ in resumed.named_parameters()
    )
    second = adamw(resumed, config)
    before = {name: tensor.clone() for name, tensor in kept.items()}
    restore_moments(second, resumed.named_parameters(), kept)
    walk(resumed, second, range(2, 5))
    # What was put back is the optimiser's own from then on.
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_moments_without_their_number_of_updates_are_refused() -> None:
    model = toy()
    optimizer = adamw(model, CONFIG)
    walk(model, optimizer, range(1))
    kept = moments(optimizer, model.named_parameters())
    older = {name: tensor for name, tensor in kept.items() if not name.startswith("updates/")}
    with pytest.raises(ArtifactError, match=r"moments of .* begin the training again"):
        restore_moments(optimizer, model.named_parameters(), older)


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (1, 0.25),
        (4, 1.0),
        (5, 1.0),
        (60, 1.0),
        (61, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 40))),
        (80, 0.1 + 0.9 * 0.5),
        (70, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))),
        (100, 0.1),
    ],
)
def test_the_rate_climbs_stays_and_falls(step: int, factor: float) -> None:
    found = warmup_cosine(step, steps=100, warmup_steps=4, decay_share=0.4, final_share=0.1)
    assert found == pytest.approx(factor)


def test_the_peak_is_reached_at_the_end_of_warm_up_also_where_all_the_rest_decays() -> None:
    found = [
        warmup_cosine(s, steps=10, warmup_steps=4, decay_share=1.0, final_share=0.0)
        for s in (2, 4, 5)
    ]
    assert found == pytest.approx([0.5, 1.0, 0.5])


def test_a_schedule_without_warm_up_or_decay_is_flat() -> None:
    flat = [
        warmup_cosine(s, steps=9, warmup_steps=0, decay_share=0.0, final_share=0.1)
        for s in range(1, 10)
    ]
    assert flat == [1.0] * 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_too_narrow_for_a_step_are_refused(dtype: torch.dtype) -> None:
    """A step of a thousandth is below half of bfloat16's last bit: two hundred would move none."""
    assert torch.equal(torch.ones((), dtype=torch.bfloat16) - 1e-3, torch.tensor(1.0).bfloat16())
    model = toy()
    model.get_submodule("norm").to(dtype)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ConfigError, match=rf"^norm.weight is {kind}, .*\.float\(\)"):
        adamw(model, CONFIG)


def test_moments_are_cast_a_few_at_a_time_and_none_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    narrow = CONFIG.model_copy(update={"moments": "bfloat16"})

    def trained(values: int) -> list[Tensor]:
        monkeypatch.setattr(optim, "CAST_VALUES", values)
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.fill_(number + 1.0)
        optimizer = adamw(model, narrow)
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    for few, all_at_once in zip(trained(10), trained(2**24), strict=True):
        assert torch.equal(few, all_at_once)


def test_moments_rest_in_bfloat16_and_are_rounded_to_nearest_after_each_step() -> None:
    narrow = CONFIG.model_copy(update={"moments": "bfloat16"})
    matrix = nn.Linear(3, 4, bias=False)
    model, weight = nn.ModuleDict({"matrix": matrix}), matrix.weight
    optimizer = adamw(model, narrow)
    expected, first, second = weight.detach().double(), torch.zeros(4, 3), torch.zeros(4, 3)
    for step in range(1, 4):
        slope = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        weight.grad = slope.clone()
        optimizer.step()
        wide_first = 0.8 * first.double() + 0.2 * slope.double()
        wide_second = 0.9 * second.double() + 0.1 * slope.double().square()
        root = (wide_second / (1 - 0.9**step)).sqrt() + 1e-3
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * wide_first / (1 - 0.8**step) / root
        first, second = wide_first.bfloat16().float(), wide_second.bfloat16().float()
        state = optimizer.state[weight]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        # Float32 sums may fall to the other side of a tie: one step of 8 bits at most.
        torch.testing.assert_close(state["exp_avg"].float(), first, rtol=2**-7, atol=0)
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_restored_moments_rest_in_their_type(kind: str) -> None:
    model = toy()
    optimizer = adamw(model, CONFIG.model_copy(update={"moments": kind}))
    walk(model, optimizer, range(2))
    kept = {n: t.clone() for n, t in moments(optimizer, model.named_parameters()).items()}
    assert {t.dtype for n, t in kept.items() if n.startswith("exp_avg")} == {getattr(torch, kind)}
    other = adamw(model, CONFIG.model_copy(update={"moments": kind}))
    restore_moments(other, model.named_parameters(), kept)
    found = moments(other, model.named_parameters())
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())
    assert {t.dtype for n, t in found.items() if n.startswith("exp_avg")} == {getattr(torch, kind)}
