"""Gradients of the router and of the MTP layer against finite differences in float64.

Each loss is smooth where it is probed: choices among experts are discrete, so probes stay smaller
than the gap between the last expert taken and the first one left.
"""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from configs.model import ModelConfig
from model.moe import Gate
from model.transformer import Transformer
from tests.references import TINY_V4, random_model, random_tokens, tiny

STEP = 1e-6
"""Central differences err by about STEP^2 times a third derivative, and by 1e-16 / STEP."""


def assert_gradient(
    loss: Callable[[], Tensor], leaves: Mapping[str, Tensor], *, directions: int
) -> None:
    """Slopes of `loss` along random directions of each leaf."""
    grads = torch.autograd.grad(loss(), list(leaves.values()))
    generator = torch.Generator().manual_seed(5)
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        start = leaf.detach().clone()
        for _ in range(directions):
            direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    leaf.copy_(start + sign * STEP * direction)
                    values.append(float(loss()))
            with torch.no_grad():
                leaf.copy_(start)
            measured = (values[0] - values[1]) / (2 * STEP)
            expected = float((grad * direction).sum())
            assert measured == pytest.approx(expected, rel=1e-5, abs=1e-8), name


CONFIGS = [
    tiny(),
    tiny(n_group=1, topk_group=1, norm_topk_prob=False, num_experts_per_tok=3),
    TINY_V4,
]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_gates_gradient_is_its_slope(config: ModelConfig) -> None:
    gate = Gate(config).double()
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(gate.weight, std=0.3, generator=generator)
    x_TD = torch.randn(6, config.hidden_size, generator=generator, dtype=torch.float64)
    x_TD.requires_grad_()
    taste_TK = torch.randn(6, config.num_experts_per_tok, generator=generator, dtype=torch.float64)

    def loss() -> Tensor:
        experts_TK, gates_TK, scores_TE = gate(x_TD)
        # Sorted by expert: the order of the chosen is free.
        order_TK = experts_TK.argsort(1)
        total: Tensor = (gates_TK.gather(1, order_TK) * taste_TK).sum() + scores_TE.square().sum()
        return total

    assert_gradient(loss, {"weight": gate.weight, "x": x_TD}, directions=8)


def mtp_loss(model: Transformer, tokens_BS: Tensor) -> Tensor:
    after = model.predict(tokens_BS).after_next_BSV
    assert after is not None
    return F.cross_entropy(after[:, :-2].flatten(0, 1), tokens_BS[:, 2:].flatten())


@pytest.mark.parametrize("config", [tiny(), TINY_V4], ids=["v3", "v4"])
def test_the_mtp_layers_gradient_is_its_slope(config: ModelConfig) -> None:
    model, tokens_BS = random_model(config).double(), random_tokens(1, 10, config=config)
    named = dict(model.named_parameters())
    prefix = f"model.layers.{config.num_hidden_layers}."
    leaves = {n: p for n, p in named.items() if n.startswith(prefix) and ".experts." not in n}
    assert len(leaves) > 10
    # The trunk and the shared embedding and head learn from this loss too.
    leaves |= {n: named[n] for n in ("model.embed_tokens.weight", "lm_head.weight")}
    leaves["trunk"] = next(p for n, p in named.items() if ".layers.0." in n and p.dim() == 2)
    assert_gradient(lambda: mtp_loss(model, tokens_BS), leaves, directions=1)
