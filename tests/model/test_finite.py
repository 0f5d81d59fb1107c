"""The first part of a model that gives a value that is not finite."""

import math

import pytest
import torch
from torch import Tensor, nn

from configs.model import ModelConfig
from model.finite import in_backward_order, is_finite, watched
from model.passes import IndexerPhase, LayerReport
from model.transformer import Transformer
from tests.references import TINY, TINY_V4, TINY_V32, random_model, random_tokens


@pytest.mark.parametrize(
    ("config", "phase"),
    [
        (TINY, "off"),
        (TINY_V32, "off"),
        (TINY_V32, "dense"),
        (TINY_V32, "sparse"),
        (TINY_V4, "off"),
        (TINY_V4, "sparse"),
    ],
)
def test_nothing_is_found_in_a_sound_model(config: ModelConfig, phase: IndexerPhase) -> None:
    model = random_model(config).train()
    with watched(model) as seen:
        model.predict(random_tokens(2, 20, config=config), indexer=phase)
    assert seen.first is None
    assert set(seen.begun) == set(seen.ended)
    assert "model.layers.1.mlp.experts" in seen.begun


def test_hooks_are_gone_afterwards() -> None:
    model = random_model()
    with pytest.raises(RuntimeError, match="on purpose"), watched(model):
        raise RuntimeError("on purpose")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens",
        "model.layers.0.mlp",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.gate",
        "model.layers.1.mlp.experts",
        "model.layers.2.eh_proj",
        "model.norm",
    ],
)
def test_the_module_that_gave_it_is_named_and_not_those_that_passed_it_on(name: str) -> None:
    model = random_model().train()

    def spoil(module: nn.Module, given: object, made: object) -> object:
        first = made[1] if isinstance(made, tuple) else made
        assert isinstance(first, Tensor)
        spoilt = first.index_fill(-1, torch.tensor([0]), math.inf)
        return (made[0], spoilt, *made[2:]) if isinstance(made, tuple) else spoilt

    model.get_submodule(name).register_forward_hook(spoil)
    with watched(model) as seen:
        model.predict(random_tokens(2, 12))
    assert seen.first is not None
    assert seen.ended[seen.first] == name


@pytest.mark.parametrize("part", [slice(0, 4), slice(4, 8), slice(8, 24)])
def test_weights_of_streams_are_looked_at_where_they_are_made(part: slice) -> None:
    """Of reading, writing and mixing: the last two are used behind the sublayer."""
    model = random_model(TINY_V4).train()
    with torch.no_grad():
        model.get_parameter("model.layers.1.attn_hc.base")[part] = math.nan
    with watched(model) as seen:
        model.predict(random_tokens(2, 12, config=TINY_V4))
    assert seen.first is not None
    assert seen.ended[seen.first] == "model.layers.1.attn_hc"


@pytest.mark.parametrize(
    ("made", "finite"),
    [
        (torch.tensor([1.0, -2.0]), True),
        (torch.tensor([1.0, -math.inf]), False),
        (torch.tensor([1, 2]), True),
        ((torch.ones(2), [torch.tensor(math.nan)]), False),
        ({"a": torch.ones(1), "b": None}, True),
        ({"a": {"b": torch.tensor(math.inf)}}, False),
        (LayerReport("one", balance=torch.tensor(1.0)), True),
        (LayerReport("one", balance=torch.tensor(math.nan)), False),
        (None, True),
    ],
)
def test_all_numbers_of_a_nest_are_looked_at(made: object, finite: bool) -> None:
    assert is_finite(made) == finite


@pytest.mark.parametrize("config", [TINY, TINY_V32], ids=["v3", "v32"])
def test_the_order_of_gradients_is_that_in_which_autograd_completes_them(
    config: ModelConfig,
) -> None:
    """Beside autograd's own: for modules that are called; parts of one that are multiplied
    together have no order of their own."""
    model = Transformer(config).initialize(0)
    done: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: done.append(name))
    with watched(model) as seen:
        predicted = model.predict(random_tokens(2, 12, config=config))
        assert predicted.after_next_BSV is not None
        loss = predicted.next_BSV.square().sum() + predicted.after_next_BSV.square().sum()
    loss.backward()
    owners = {name: name.rpartition(".")[0] for name in done}
    called = [name for name in done if owners[name] in seen.begun or name == "lm_head.weight"]
    assert len(called) > 20
    found = in_backward_order(sorted(called), seen.begun)
    # Both norms of a latent bottleneck may come in either order, as their branches do not meet.
    layers = [".".join(name.split(".")[:4]) for name in found]
    expected = [".".join(name.split(".")[:4]) for name in called]
    assert found[0] == "lm_head.weight"
    assert found[-1] == "model.embed_tokens.weight"
    assert layers == expected
