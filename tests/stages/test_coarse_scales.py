"""Scales that are too coarse are caught by the parity report, on trainings that need fine ones.

A feed-forward language model (Bengio et al., 2003) of real text, whose first Linear reads tokens of
very different size, or learns from losses of very different weight. The Linear's tiles are all that
stands between the two: no norm comes before it, as one does in a Transformer, whose activations
would have to grow apart by themselves over far more steps than a test has.

Axes: R rows, C tokens of context, D width, V vocabulary.
"""

import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.parity import ParityConfig
from configs.train import Fp8Config, OptimConfig
from model.fp8.linear import Linear
from model.fp8.scheme import HIGH, Numerics
from model.optim import adamw
from stages.loss_parity.gaps import Findings, Pair, compare

ROWS, CONTEXT, WIDTH, BYTES = 256, 3, 256, 128
STEPS, RATE = 200, 2e-3
SPREAD = 1e5
SEEDS = (0, 1)
TILES = Numerics("fp8")
COARSE = {
    "tensor": Numerics("fp8", Fp8Config(scaling="tensor")),
    "block": Numerics("fp8", Fp8Config(gradient_scaling="block")),
}

pytestmark = pytest.mark.slow

Data = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""Of the number of each row: which of two vocabularies it is written in, its size, its weight."""


def loud_documents(row_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every other run of 128 rows has activations of 1e5 times the others' size.

    A tile of 1 x 128 or 128 x 1 never meets both.
    """
    loud_R = row_R // 128 % 2
    return loud_R, torch.where(loud_R == 1, SPREAD, 1.0), torch.ones(len(row_R))


def faint_tokens(row_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every other row has gradients of 1e-5 times the others' size.

    A block of 128 x 128 always meets both. Embeddings of the faint rows' own learn from nothing
    else, and AdamW does not mind how small a gradient is, as long as it is there.
    """
    faint_R = row_R % 2
    return faint_R, torch.ones(len(row_R)), torch.where(faint_R == 1, 1 / SPREAD, 1.0)


class FeedForward(nn.Module):
    """The next byte of the last three."""

    def __init__(self, numerics: Numerics) -> None:
        super().__init__()
        scheme = numerics.of("dense_ffn")
        self.embedding = nn.Embedding(2 * BYTES, WIDTH)
        self.inner = Linear(CONTEXT * WIDTH, WIDTH, scheme)
        self.outer = Linear(WIDTH, BYTES, scheme)
        nn.init.normal_(self.embedding.weight)
        for linear in (self.inner, self.outer):
            nn.init.normal_(linear.weight, std=linear.weight.shape[1] ** -0.5)

    def forward(self, context_RC: Tensor, size_R: Tensor) -> Tensor:
        x_RI = self.embedding(context_RC).flatten(1) * size_R.unsqueeze(1)
        logits_RV: Tensor = self.outer(F.silu(F.rms_norm(self.inner(x_RI), (WIDTH,))))
        return logits_RV


@pytest.fixture(scope="module")
def text() -> Tensor:
    """Python's own reference, byte by byte."""
    source = Path(pydoc_data.topics.__file__).read_bytes()
    return torch.frombuffer(bytearray(source), dtype=torch.uint8).long() % BYTES


def losses(text: Tensor, data: Data, numerics: Numerics, seed: int) -> list[float]:
    """Mean loss of each step's rows, every row counting alike."""
    torch.manual_seed(seed)
    model = FeedForward(numerics)
    optimizer = adamw(model, OptimConfig(weight_decay=0.0, epsilon=1e-20))
    second_R, size_R, weight_R = data(torch.arange(ROWS))
    generator = torch.Generator().manual_seed(seed)
    curve = []
    for step in range(STEPS):
        rate = RATE * min(1, (step + 1) / 20) * max(0.05, 1 - step / STEPS)
        for group in optimizer.param_groups:
            group["lr"] = rate
        first_R = torch.randint(len(text) - CONTEXT, (ROWS,), generator=generator)
        context_RC = torch.stack([text[first_R + i] for i in range(CONTEXT)], 1)
        logits_RV = model(context_RC + BYTES * second_R.unsqueeze(1), size_R)
        loss_R = F.cross_entropy(logits_RV, text[first_R + CONTEXT], reduction="none")
        optimizer.zero_grad()
        (loss_R * weight_R).mean().backward()
        optimizer.step()
        curve.append(float(loss_R.detach().mean()))
    return curve


@pytest.mark.parametrize(
    ("data", "kind"), [(loud_documents, "tensor"), (faint_tokens, "block")], ids=["loud", "faint"]
)
def test_coarse_scales_are_caught_where_tiles_are_in_parity(
    text: Tensor, data: Data, kind: str
) -> None:
    high = {seed: losses(text, data, HIGH, seed) for seed in SEEDS}

    def found(numerics: Numerics) -> Findings:
        pairs = {s: Pair(fp8=losses(text, data, numerics, s), high=high[s]) for s in SEEDS}
        return compare(pairs, ParityConfig(seeds=SEEDS))

    tiles, coarse = found(TILES), found(COARSE[kind])
    print(f"{data.__name__}: tiles {tiles.gaps}, {kind} {coarse.gaps}")
    assert tiles.within
    assert not coarse.within
    # Not by chance: every seed learned less, by more than four times what is allowed.
    assert min(coarse.gaps) > 4 * coarse.asked.limit
