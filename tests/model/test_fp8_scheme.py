"""Which parts of a model are FP8, as the config says; and why tiles are as small as they are."""

import re
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from configs.engram import EngramConfig
from configs.errors import MachineError
from configs.model import ModelConfig
from configs.train import Fp8Config
from model.fp8 import scheme as scheme_module
from model.fp8.backends import Choice
from model.fp8.fp4 import from_fp4, to_fp4
from model.fp8.groups import Groups
from model.fp8.linear import Linear
from model.fp8.reference import Reference
from model.fp8.scheme import Fp8, Numerics, Part, settle
from model.loss import UNSCORED, cross_entropy
from model.moe import Gate
from model.passes import IndexerPhase
from model.transformer import Transformer
from tests.references import (
    TINY,
    TINY_V4,
    TINY_V32,
    flushed_share,
    fp8_products,
    random_model,
    random_tokens,
    relative_gap,
    tiny,
    tiny_v4,
)

MEMORY = EngramConfig(
    layer_ids=(0, 1), table_sizes=(50, 61), n_embed_per_ngram=12, n_head_per_ngram=3, pad_id=5
)
MODELS: dict[str, ModelConfig] = {
    "v3": TINY,
    "v3-without-latent-queries": tiny(q_lora_rank=None),
    "v32": TINY_V32,
    "v4": TINY_V4,
    "v3-engram": tiny(engram=MEMORY),
    "v4-engram": tiny_v4(engram=MEMORY),
}
MEMBERS: dict[Part, str] = {
    "attention": r"self_attn\.((q|q_a|q_b|kv|kv_b|o|o_a|o_b)_proj|kv_a_proj_with_mqa)",
    "indexer": r".*\.indexer\.(wq_b|wk|q_b_proj)",
    "dense_ffn": r"mlp\.(gate|up|down)_proj",
    "shared_experts": r"mlp\.shared_experts\.(gate|up|down)_proj",
    "routed_experts": r"mlp\.experts",
    "gate": r"mlp\.gate",
    "head": r"lm_head",
    "mtp_projection": r"(eh|e|h)_proj",
    "compressor": r"self_attn\.compressor\.(indexer\.)?(kv|gate)_proj",
    "engram": r"engram\.(key|value)_proj",
}
"""Names of a part's modules, below their layer."""
ABSENT: dict[str, set[Part]] = {
    "v3": {"indexer", "compressor", "engram"},
    "v3-without-latent-queries": {"indexer", "compressor", "engram"},
    "v32": {"compressor", "engram"},
    "v4": {"dense_ffn", "engram"},
    "v3-engram": {"indexer", "compressor"},
    "v4-engram": {"dense_ffn"},
}
BY_DEFAULT: set[Part] = {"attention", "indexer", "dense_ffn", "shared_experts", "routed_experts"}


def members(model: Transformer, part: Part) -> set[str]:
    names = [name for name, _ in model.named_modules()]
    return {
        name
        for name in names
        if re.fullmatch(MEMBERS[part], re.sub(r"^model\.layers\.\d+\.", "", name))
    }


def in_fp8(model: Transformer) -> dict[str, Fp8]:
    """The modules that compute in FP8, with their schemes."""
    schemes = ((name, getattr(m, "scheme", None)) for name, m in model.named_modules())
    return {name: scheme for name, scheme in schemes if scheme is not None}


def moved(part: Part, config: Fp8Config) -> Fp8Config:
    other = "high" if getattr(config, part) == "fp8" else "fp8"
    return Fp8Config.model_validate(config.model_dump() | {part: other})


EVERYTHING = Fp8Config.model_validate(dict.fromkeys(get_args(Part), "fp8"))


def test_the_table_has_every_part() -> None:
    assert set(MEMBERS) == set(get_args(Part))
    assert set(get_args(Part)) <= set(Fp8Config.model_fields)


@pytest.mark.parametrize("name", MODELS)
def test_by_default_parts_are_those_of_deepseek_v3(name: str) -> None:
    model = Transformer(MODELS[name], precision="fp8")
    expected = set().union(*(members(model, part) for part in BY_DEFAULT))
    assert set(in_fp8(model)) == expected
    for part in get_args(Part):
        assert bool(members(model, part)) == (part not in ABSENT[name]), part
        assert (part in MODELS[name].parts) == (part not in ABSENT[name]), part
    assert in_fp8(Transformer(MODELS[name])) == {}
    # A scalar for each head is no matrix product worth it.
    assert not any("weights_proj" in module for module in expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("part", get_args(Part))
def test_moving_a_part_moves_its_modules_and_no_others(part: Part, name: str) -> None:
    model = Transformer(MODELS[name], precision="fp8")
    config = moved(part, Fp8Config())
    other = Transformer(MODELS[name], precision=Numerics("fp8", config))
    before, after = set(in_fp8(model)), set(in_fp8(other))
    assert before ^ after == members(model, part)
    for module, scheme in in_fp8(other).items():
        assert module in members(other, scheme.part)
        # The Linear that reads attention's output saves it in 12 bits, and no other does.
        assert scheme.saves_e5m6 == bool(re.search(r"self_attn\.o(_a)?_proj$", module))
        assert scheme.config == config


@pytest.mark.parametrize("name", ["v3-engram", "v32", "v4-engram"])
def test_what_has_a_scheme_computes_by_it_and_everything_learns(name: str) -> None:
    """A recorder hears of every part, forward and backward."""
    numerics = Numerics("fp8", EVERYTHING)
    model = random_model(MODELS[name], precision=numerics).train()
    tokens = random_tokens(4, 24, config=MODELS[name])
    numerics.recorder.start(counting=True)
    phase: IndexerPhase = "off" if name.startswith("v3-") else "sparse"
    predicted = model.predict(tokens, indexer=phase)
    assert predicted.after_next_BSD is not None
    loss = predicted.indexer_loss if predicted.indexer_loss is not None else torch.zeros(())
    for states, ahead in ((predicted.next_BSD, 1), (predicted.after_next_BSD, 2)):
        loss = loss + cross_entropy(
            states[:, :-ahead].flatten(0, 1), predicted.head, tokens[:, ahead:].flatten()
        )
    loss.backward()
    heard = numerics.recorder.tallies
    for part in set(get_args(Part)) - ABSENT[name]:
        for kind in ("activations", "weights", "activations_along_tokens"):
            assert heard[f"{part}_{kind}"].nonzero > 0
        assert heard[f"{part}_gradients_along_tokens"].nonzero > 0
    assert not {role for role in heard if role.startswith(tuple(ABSENT[name]))}
    assert numerics.recorder.first_not_finite() is None
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert bool(parameter.grad.any()), parameter_name
        assert bool(parameter.grad.isfinite().all()), parameter_name


@pytest.mark.parametrize("field", ["embedding", "norms", "attention_operator", "loss"])
def test_what_is_no_matrix_product_has_no_fp8_form(field: str) -> None:
    with pytest.raises(ValidationError, match=rf"(?m)^{field}$"):
        Fp8Config.model_validate({field: "fp8"})
    assert getattr(Fp8Config.model_validate({field: "high"}), field) == "high"


# Head and gate


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_head_in_fp8_predicts_and_learns_from_quantised_products() -> None:
    head = Linear(40, 60, Numerics("fp8", EVERYTHING).of("head"))
    with torch.no_grad():
        head.weight.copy_(random(60, 40, seed=0))
    x = random(30, 40, seed=1).requires_grad_()
    targets = torch.arange(30) % 60
    targets[::4] = UNSCORED
    loss = cross_entropy(x, head, targets)
    d_x, d_w = torch.autograd.grad(loss, (x, head.weight))
    weight = head.weight.detach()
    logits = fp8_products(x.detach(), weight, torch.zeros(30, 60))[0].requires_grad_()
    expected = F.cross_entropy(logits, targets, reduction="sum", ignore_index=UNSCORED)
    expected.backward()
    assert logits.grad is not None
    _, dx, dw = fp8_products(x.detach(), weight, logits.grad)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    # A sum in another order may move a value by a step.
    assert relative_gap(d_x, dx) < 1e-6
    assert relative_gap(d_w, dw) < 1e-6
    exact = F.cross_entropy(x @ weight.T, targets, reduction="sum", ignore_index=UNSCORED)
    assert abs(float((loss - exact).detach())) > 1e-3
    exact_slopes = torch.autograd.grad(cross_entropy(x, high(head), targets), (x, head.weight))
    for found, unrounded in zip((d_x, d_w), exact_slopes, strict=True):
        assert relative_gap(found, unrounded) > 1e-5


def high(head: Linear) -> Linear:
    """The same weight without a scheme."""
    other = Linear(head.weight.shape[1], head.weight.shape[0])
    other.weight = head.weight
    return other


@pytest.mark.parametrize("config", [tiny(), tiny_v4()], ids=["v3", "v4"])
def test_a_gate_in_fp8_scores_by_quantised_products_and_learns(config: ModelConfig) -> None:
    gate = Gate(config, Numerics("fp8", EVERYTHING))
    with torch.no_grad():
        gate.weight.copy_(random(8, 32, seed=0))
    x = random(50, 32, seed=1).requires_grad_()
    experts, gates, scores = gate(x)
    logits = fp8_products(x.detach(), gate.weight.detach(), torch.zeros(50, 8))[0]
    logits.requires_grad_()
    expected = torch.sigmoid(logits) if config.family == "v3" else F.softplus(logits).sqrt()
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(experts, gate.choose(expected.detach(), None))
    weights = random(50, 2, seed=2)
    expected_gates = expected.gather(1, experts)
    expected_gates = expected_gates / expected_gates.sum(1, keepdim=True)
    (expected_gates * config.routed_scaling_factor * weights).sum().backward()
    assert logits.grad is not None
    _, dx, dw = fp8_products(x.detach(), gate.weight.detach(), logits.grad)
    d_x, d_w = torch.autograd.grad((gates * weights).sum(), (x, gate.weight))
    assert relative_gap(d_x, dx) < 1e-6
    assert relative_gap(d_w, dw) < 1e-6
    assert relative_gap(scores, Gate.forward(plain(gate), x)[2]) > 1e-7


def plain(gate: Gate) -> Gate:
    other = Gate(gate.config)
    other.weight = gate.weight
    return other


# Coarser scales


def linear(scheme: Fp8) -> Linear:
    layer = Linear(300, 256, scheme)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    return layer


def uneven(smaller: float) -> Tensor:
    """Gradients of which every second row is so much smaller."""
    dy = random(256, 256, seed=2)
    dy[1::2] *= smaller
    return dy


def gaps(scheme: Fp8, dy: Tensor) -> list[float]:
    """How far the input's gradient is from the exact one, in its large rows and its small ones."""
    layer, x = linear(scheme), random(256, 300, seed=1).requires_grad_()
    layer(x).backward(dy)
    exact = dy.double() @ layer.weight.detach().double()
    assert x.grad is not None
    return [relative_gap(x.grad[rows::2], exact[rows::2]) for rows in (0, 1)]


COARSE = {
    "block": Fp8("attention", Fp8Config(gradient_scaling="block")),
    "tensor": Fp8("attention", Fp8Config(scaling="tensor")),
}


@pytest.mark.parametrize("name", COARSE)
def test_small_rows_of_gradients_survive_tiles_of_their_own_alone(name: str) -> None:
    fine, coarse = Fp8("attention"), COARSE[name]
    for smaller in (1e-4, 1e-6):
        assert max(gaps(fine, uneven(smaller))) < 1e-3
        assert gaps(coarse, uneven(smaller))[0] < 1.2e-3
    # A ten thousandth of their neighbours, they lose their last bits; a millionth, everything.
    assert gaps(coarse, uneven(1e-4))[1] > 1.5e-3
    assert gaps(coarse, uneven(1e-6))[1] == 1
    flushed = []
    for scheme in (fine, coarse):
        dy = uneven(1e-4)
        backend = scheme.backend(dy.device)
        flushed.append(flushed_share(dy[1::2], backend.dequantize(scheme.gradients(dy))[1::2]))
    assert flushed[0] < 1e-3
    assert flushed[1] > 0.05


def test_a_tensor_has_one_scale_and_each_expert_its_own_along_tokens() -> None:
    scheme, x = COARSE["tensor"], random(300, 260, seed=3)
    assert scheme.activations(x).scales.shape == (1, 1)
    assert scheme.weights(random(3, 140, 260, seed=4)).scales.shape == (3, 1, 1)
    assert scheme.gradients(x).scales.shape == (1, 1)
    assert scheme.activations_along_tokens(x, Groups.of((100, 0, 200))).scales.shape == (2, 1)


def test_schemes_tile_as_the_paper_says() -> None:
    scheme, x = Fp8("attention"), random(300, 260, seed=3)
    assert scheme.activations(x).scales.shape == (300, 3)
    assert scheme.weights(x).scales.shape == (3, 3)
    assert scheme.gradients(x).scales.shape == (300, 3)
    assert scheme.gradients_along_tokens(x).scales.shape == (3, 260)
    assert scheme.gradients_along_tokens(x, Groups.of((100, 0, 200))).scales.shape == (1 + 2, 260)
    assert scheme.activations_along_tokens(scheme.activations(x)).scales.shape == (3, 260)
    block = COARSE["block"]
    assert block.gradients(x).scales.shape == block.gradients_along_tokens(x).scales.shape == (3, 3)
    assert block.gradients(x, Groups.of((100, 0, 200))).scales.shape == (1 + 2, 3)
    assert block.activations(x).scales.shape == (300, 3)


def test_settings_that_no_kernel_has_are_refused_before_the_first_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Kernels(Reference):
        name = "triton"

    device = torch.device("cpu")
    coarse = Fp8Config(scaling="tensor"), Fp8Config(gradient_scaling="block")
    for config in coarse:
        assert settle(Numerics("fp8", config), device)[0].precision == "fp8"
    monkeypatch.setattr(scheme_module, "choose", lambda *_: Choice(Kernels(), "own kernels"))
    assert settle(Numerics("fp8"), device)[0].precision == "fp8"
    for config, field in zip(coarse, ("scaling = ", "gradient_scaling = "), strict=True):
        with pytest.raises(MachineError, match=rf"fp8\.{field}.*fp8_backend = 'reference'"):
            settle(Numerics("fp8", config), device)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"routed_experts": "high"}, 'routed_experts = "high"'),
        ({"scaling": "tensor"}, 'scaling = "tensor"'),
    ],
)
def test_fp4_that_could_not_be_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=f"fp4_experts = true, but {told}"):
        Fp8Config(fp4_experts=True, **settings)


# FP4 experts in a model


def test_fp4_changes_routed_experts_and_nothing_else() -> None:
    config = Fp8Config(fp4_experts=True)
    model = random_model(tiny(), precision=Numerics("fp8", config))
    same = random_model(tiny(), precision="fp8")
    schemes = in_fp8(model)
    assert any(name.endswith("mlp.experts") for name in schemes)
    for name, scheme in schemes.items():
        weight = random(40, 64, seed=5)
        fp4, fp8 = scheme.weights(weight), in_fp8(same)[name].weights(weight)
        read = [scheme.backend(weight.device).dequantize(q) for q in (fp4, fp8)]
        rounded = from_fp4(*to_fp4(weight))
        if name.endswith("mlp.experts"):
            assert torch.equal(read[0], rounded)
            assert not torch.equal(read[1], rounded)
        else:
            assert torch.equal(*read)
