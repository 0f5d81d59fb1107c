"""Sparse attention against loops over queries, transformers' model, and itself by other ways."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from model import gathering, sparse
from model.decode import Session, sample
from model.drawing import Drawing
from model.fp8.scheme import HIGH
from model.passes import IndexerPhase, Whole
from model.sparse import SparseLatentAttention
from model.transformer import Transformer
from tests.memory import LargestTensor
from tests.model.transformers_twin import (
    TOLERANCE,
    continued_greedily,
    disagreement,
    transformers_twin,
)
from tests.references import (
    latent_attention,
    random_model,
    random_tokens,
    rotate_as_complex,
    tiny_v32,
)

Way = Literal["masked", "gathered"]
WAYS: tuple[Way, ...] = ("masked", "gathered")
LENGTH = 14
SEGMENTS_BS = torch.tensor([[0] * LENGTH, [0] * 3 + [1] * 9 + [2] * 2])


def take(way: Way, monkeypatch: pytest.MonkeyPatch, *, chunk: int = 700) -> None:
    """Make sparse passes go this way, a few queries at a time."""
    monkeypatch.setattr(sparse, "GATHER_FROM", 0 if way == "gathered" else 10**9)
    monkeypatch.setattr(sparse, "CHUNK_SCORES", 4 * chunk)
    monkeypatch.setattr(gathering, "CHUNK_VALUES", chunk)


def attention(**changes: object) -> SparseLatentAttention:
    """In float64, with every parameter random."""
    made = SparseLatentAttention(tiny_v32(**changes), HIGH)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    return made.double()


def inputs(rows: int = 2, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, length, 32, generator=generator, dtype=torch.float64)


def whole(x_BSD: Tensor, phase: IndexerPhase, segments_BS: Tensor | None = None) -> Whole:
    return Whole(torch.zeros(x_BSD.shape[:2], dtype=torch.int64), segments_BS, indexer=phase)


def by_query(
    block: SparseLatentAttention, x_SD: Tensor, segments_S: Tensor, phase: IndexerPhase
) -> tuple[Tensor, Tensor]:
    """(output, divergence [S]) of one sequence, by eq. 1 and 2 and the losses of section 2.1."""
    scores_SS = index_by_head(block, x_SD)
    allowed_SS = torch.zeros_like(scores_SS, dtype=torch.bool)
    for t in range(len(x_SD)):
        seen = [s for s in range(t + 1) if segments_S[s] == segments_S[t]]
        best = sorted(seen, key=lambda s: (-float(scores_SS[t, s]), s))
        kept = seen if phase == "dense" else best[: block.indexer.config.index_topk]
        allowed_SS[t, kept] = True
    out_SD, mass_SS = latent_attention(block, x_SD, allowed_SS)
    missed_S = torch.zeros(len(x_SD), dtype=torch.float64)
    for t in range(len(x_SD)):
        kept_S = allowed_SS[t]
        p = mass_SS[t, kept_S] / mass_SS[t].sum()
        missed_S[t] = (p * (p.log() - scores_SS[t, kept_S].log_softmax(0))).sum()
    return out_SD, missed_S


def index_by_head(block: SparseLatentAttention, x_SD: Tensor) -> Tensor:
    """Eq. 1 for all pairs of tokens, in float64."""
    index, config = block.indexer, block.indexer.config
    width, rope = config.index_head_dim, config.qk_rope_head_dim

    def turned(y_SI: Tensor) -> Tensor:
        """Half-split pairs of the first dims, as interleaved ones."""
        pairs = y_SI[:, :rope].unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
        rotated = rotate_as_complex(pairs, config.rope_theta).unflatten(1, (-1, 2))
        return torch.cat([rotated.transpose(1, 2).flatten(1), y_SI[:, rope:]], dim=1)

    bottleneck = x_SD @ block.q_a_proj.weight.T
    bottleneck = bottleneck / (bottleneck.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    queries = (bottleneck * block.q_a_layernorm.weight) @ index.wq_b.weight.T
    plain = x_SD @ index.wk.weight.T
    centred = plain - plain.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    keys = turned(normed * index.k_norm.weight + index.k_norm.bias)
    weights = x_SD @ index.weights_proj.weight.T
    total = torch.zeros(len(x_SD), len(x_SD), dtype=torch.float64)
    for j in range(config.index_n_heads):
        dots = turned(queries[:, j * width : (j + 1) * width]) @ keys.T
        total += weights[:, j, None] * dots.clamp_min(0)
    return total / math.sqrt(width * config.index_n_heads)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("phase", ["off", "dense", "sparse"])
@pytest.mark.parametrize("segmented", [False, True])
@torch.no_grad()
def test_outputs_and_losses_are_the_papers_query_by_query(
    way: Way, phase: IndexerPhase, segmented: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(way, monkeypatch)
    block, x_BSD = attention(), inputs()
    segments_BS = SEGMENTS_BS if segmented else torch.zeros_like(SEGMENTS_BS)
    batch = whole(x_BSD, phase, segments_BS if segmented else None)
    found_BSD, loss = block(x_BSD, batch)
    rows = [by_query(block, x_BSD[row], segments_BS[row], phase) for row in range(2)]
    # The block's rotary table is of float32.
    for found_SD, (expected_SD, _) in zip(found_BSD, rows, strict=True):
        torch.testing.assert_close(found_SD, expected_SD, rtol=1e-4, atol=1e-5)
    if phase == "off":
        assert loss is None
    else:
        expected = float(torch.cat([missed_S for _, missed_S in rows]).mean())
        assert float(loss) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("phase", ["off", "sparse"])
@pytest.mark.parametrize("segmented", [False, True])
def test_the_two_ways_of_sparse_attention_agree_in_every_gradient(
    phase: IndexerPhase, segmented: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for way in WAYS:
        take(way, monkeypatch)
        block, x_BSD = attention(), inputs().requires_grad_()
        batch = whole(x_BSD, phase, SEGMENTS_BS if segmented else None)
        taste_BSD = torch.sin(torch.arange(x_BSD.numel(), dtype=torch.float64)).view_as(x_BSD)
        out_BSD, loss = block(x_BSD, batch)
        assert (loss is None) == (phase == "off")
        value = (out_BSD * taste_BSD).sum() + (0 if loss is None else 3 * loss)
        leaves = {
            name: p
            for name, p in block.named_parameters()
            if phase == "sparse" or (not name.startswith("indexer."))
        }
        slopes = torch.autograd.grad(value, [x_BSD, *leaves.values()])
        found.append((value, dict(zip(["x", *leaves], slopes, strict=True))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("phase", "way"), [("dense", "masked"), *(("sparse", w) for w in WAYS)])
def test_the_indexers_gradient_is_the_slope_of_its_loss(
    phase: IndexerPhase, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Central differences of 1e-6 in float64, along random directions of each parameter."""
    take(way, monkeypatch)
    block, x_BSD = attention(), inputs()
    leaves = dict(block.indexer.named_parameters())

    def loss() -> Tensor:
        batch = whole(x_BSD, phase, SEGMENTS_BS)
        missed: Tensor = block(x_BSD, batch)[1]
        return missed

    slopes = torch.autograd.grad(loss(), list(leaves.values()))
    generator = torch.Generator().manual_seed(2)
    for (name, leaf), slope in zip(leaves.items(), slopes, strict=True):
        for _ in range(4):
            direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    leaf.add_(sign * 1e-6 * direction)
                    values.append(float(loss()))
                    leaf.sub_(sign * 1e-6 * direction)
            measured = (values[0] - values[1]) / 2e-6
            expected = float((slope * direction).sum())
            assert measured == pytest.approx(expected, rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize(("phase", "way"), [("dense", "masked"), *(("sparse", w) for w in WAYS)])
def test_either_loss_trains_its_own_half_and_nothing_else(
    phase: IndexerPhase, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(way, monkeypatch)
    block, x_BSD = attention(), inputs().requires_grad_()
    batch = whole(x_BSD, phase)
    out_BSD, loss = block(x_BSD, batch)
    indexer = list(block.indexer.parameters())
    main = [x_BSD, *(p for n, p in block.named_parameters() if not n.startswith("indexer."))]
    for value, own, other in (
        (out_BSD.square().sum(), main, indexer),
        (loss, indexer, main),
    ):
        slopes = torch.autograd.grad(value, [*own, *other], retain_graph=True, allow_unused=True)
        assert all(slope is not None and slope.any() for slope in slopes[: len(own)])
        assert not any(slope is not None and slope.any() for slope in slopes[len(own) :])


def test_a_text_that_is_chosen_whole_is_attended_to_densely() -> None:
    block, x_BSD = attention(index_topk=LENGTH), inputs()
    batches = {phase: whole(x_BSD, phase) for phase in ("off", "dense", "sparse")}
    found = {phase: block(x_BSD, batch) for phase, batch in batches.items()}
    for phase in ("dense", "sparse"):
        assert torch.equal(found[phase][0], found["off"][0])
    assert torch.equal(found["dense"][1], found["sparse"][1])
    assert found["off"][1] is None
    shorter, batch = attention(index_topk=LENGTH - 1), whole(x_BSD, "sparse")
    assert not torch.allclose(shorter(x_BSD, batch)[0][:, -1], found["off"][0][:, -1])


def test_long_texts_make_no_tensor_of_all_pairs_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    length = 600
    monkeypatch.setattr(sparse, "CHUNK_SCORES", 2**15)
    monkeypatch.setattr(gathering, "CHUNK_VALUES", 2**13)
    block, x_BSD = attention(index_n_heads=4, max_position_embeddings=1024), inputs(1, length)
    segments_BS = torch.zeros(1, length, dtype=torch.int64)
    with LargestTensor() as made:
        batch = whole(x_BSD.requires_grad_(), "sparse", segments_BS)
        out_BSD, loss = block(x_BSD, batch)
        (out_BSD.sum() + loss).backward()
    assert made.values < length * length / 4
    monkeypatch.setattr(sparse, "GATHER_FROM", 1 + length // block.keep)
    with LargestTensor() as made:
        block(x_BSD, whole(x_BSD, "off", segments_BS))
    assert made.values >= length * length, "or else this test sees nothing"


YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 1.0}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"index_topk": 1},
        {"index_topk": 39},
        {"index_topk": 64},
        {"first_k_dense_replace": 3, "num_hidden_layers": 3, "index_head_dim": 4},
        {"n_group": 1, "topk_group": 1, "qk_rope_head_dim": 8, "index_head_dim": 16},
        {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        {"rope_scaling": YARN | {"mscale": 0.0, "mscale_all_dim": 0.0}},
    ],
)
@torch.no_grad()
def test_a_sparse_model_is_transformers_model(
    changes: dict[str, object], way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(way, monkeypatch)
    config = tiny_v32(num_nextn_predict_layers=0, max_position_embeddings=64, **changes)
    ours, theirs = transformers_twin(config)
    tokens_BS = random_tokens(2, 40)
    expected_BSV = theirs(tokens_BS, use_cache=False).logits
    assert disagreement(ours(tokens_BS), expected_BSV) < TOLERANCE
    if config.index_topk < 39:
        dense_BSV = ours.predict(tokens_BS, indexer="dense").next_BSV
        assert disagreement(dense_BSV, expected_BSV) > 0.1, "attention is not sparse here"


@torch.no_grad()
def test_decoding_keeps_to_the_choices_of_full_passes_while_rows_join_and_leave() -> None:
    """Rows pass index_topk = 5 at different steps; the tokens to come are given."""
    model = random_model(tiny_v32())
    tokens_BS = random_tokens(3, 30)
    session = Session(model, rows=3, tokens=30)
    lengths = [1, 9]
    found = [session.join([tokens_BS[row, :n].tolist() for row, n in enumerate(lengths)])]
    rows = [0, 1]
    expected_BSV = model(tokens_BS)
    for step in range(20):
        for place, row in enumerate(rows):
            difference = (found[-1][place] - expected_BSV[row, lengths[row] - 1]).abs().max()
            assert difference < TOLERANCE * expected_BSV.std()
        if step == 4:
            lengths.append(7)
            rows.append(2)
            joined_BV = session.join([tokens_BS[2, :7].tolist()])
            found.append(torch.cat([found[-1], joined_BV]))
        if step == 11:
            session.leave(0)
            rows = [2, 1]
        found.append(session.step(torch.stack([tokens_BS[row, lengths[row]] for row in rows])))
        for row in rows:
            lengths[row] += 1
    assert min(lengths) > 5


@torch.no_grad()
def test_greedy_answers_are_transformers_for_64_tokens() -> None:
    config = tiny_v32(num_nextn_predict_layers=0, max_position_embeddings=80)
    ours, theirs = transformers_twin(config)
    prompts_BS = random_tokens(2, 7)
    expected_BS = continued_greedily(theirs, prompts_BS, 64)
    found = sample(
        ours,
        prompts_BS.tolist(),
        max_new_tokens=64,
        drawing=Drawing(),
        stop_tokens=(),
        seeds=[0, 1],
    )
    assert [answer.token_ids for answer in found] == expected_BS[:, 7:].tolist()


def test_training_reaches_every_indexer_the_mtp_layers_too() -> None:
    model: Transformer = random_model(tiny_v32()).train()
    tokens_BS = random_tokens(2, 12)
    for phase in ("dense", "sparse"):
        loss = model.predict(tokens_BS, indexer=phase).indexer_loss
        assert loss is not None
        model.zero_grad()
        loss.backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert trained == {name for name, _ in model.named_parameters() if ".indexer." in name}
        assert len({name.split(".")[2] for name in trained}) == 3
    assert model.predict(tokens_BS).indexer_loss is None


def test_the_norm_of_index_keys_starts_without_bias() -> None:
    model = Transformer(tiny_v32()).initialize(0)
    norms = {name: p for name, p in model.named_parameters() if "indexer.k_norm" in name}
    assert len(norms) == 2 * 3
    for name, parameter in norms.items():
        assert torch.equal(parameter, torch.full((6,), float(name.endswith("weight"))))
