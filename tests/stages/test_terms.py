"""Every term of the pretraining loss of every family, and its gradient, as the papers write them.

The terms are written out here from the papers' equations, in float64 and position by position, on
what the layers of a float64 model are handed; slopes along random directions of the parameters are
differences of those. Choices among experts and entries are discrete, and steps too small to change
them. A term of an indexer is a function of the indexer alone: the report detaches its inputs
(DeepSeek-V3.2-Exp, section 2.1), so that no other parameter may have a gradient from it.
"""

import heapq
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from configs.engram import EngramConfig
from configs.model import ModelConfig
from model.compressed import CompressedAttention, PickingCompressor
from model.moe import Gate, HashGate
from model.passes import IndexerPhase, Whole
from model.sparse import SparseLatentAttention
from model.transformer import Transformer
from stages.framing import BOS_ID
from stages.pretrain.objective import PretrainLoss
from stages.segments import segments_of
from tests.losses import part_of
from tests.references import (
    attend_by_query,
    latent_attention,
    random_model,
    random_tokens,
    tiny,
    tiny_v4,
    tiny_v32,
)

STEP = 1e-6
ENGRAM = EngramConfig(
    layer_ids=(1,), table_sizes=(50, 60), n_embed_per_ngram=8, n_head_per_ngram=2
).model_dump()
FAMILIES = {
    "v3": tiny(),
    "v32": tiny_v32(),
    "v4": tiny_v4(index_topk=2),
    "v3 with memory": tiny(engram=ENGRAM),
    "v4 with memory": tiny_v4(index_topk=2, engram=ENGRAM),
}
WEIGHTS = {"next": 1.0, "mtp": 0.3, "balance": 0.05, "indexer": 0.25}


def texts(config: ModelConfig) -> Tensor:
    """Two rows of two documents each, some of them long enough for V4's indexers to choose."""
    tokens_BS = random_tokens(2, 24, config=config).clamp_min(BOS_ID + 1)
    tokens_BS[:, 0] = BOS_ID
    tokens_BS[0, 5] = tokens_BS[1, 17] = BOS_ID
    return tokens_BS


@contextmanager
def watched(model: Transformer) -> Iterator[dict[nn.Module, Tensor]]:
    """What each gate and each attention is handed while the body runs."""
    seen: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[module] = inputs[0]

    kinds = Gate, SparseLatentAttention, CompressedAttention
    found = [m for m in model.modules() if isinstance(m, kinds)]
    handles = [module.register_forward_pre_hook(note) for module in found]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def by_the_papers(
    model: Transformer, tokens_BS: Tensor, phase: IndexerPhase, *, of: str = "all"
) -> dict[str, float]:
    """Each term from its equation; `of` the "indexer" alone, of the "model", or all."""
    segments_BS = segments_of(tokens_BS)
    with watched(model) as seen:
        predicted = model.predict(tokens_BS, segments_BS, indexer=phase)
    terms = dict.fromkeys(WEIGHTS, 0.0)
    if of != "indexer":
        assert predicted.after_next_BSV is not None
        terms["next"] = likelihood(predicted.next_BSV, tokens_BS, 1)
        terms["mtp"] = likelihood(predicted.after_next_BSV, tokens_BS, 2)
    for module, x in seen.items():
        if of == ("model" if not isinstance(module, Gate) else "indexer"):
            continue
        match module:
            case HashGate():
                pass
            case Gate():
                terms["balance"] += balance(module, x.unflatten(0, tokens_BS.shape))
            case SparseLatentAttention():
                terms["indexer"] += token_indexer(module, x, segments_BS, phase)
            case CompressedAttention(compressor=PickingCompressor()):
                terms["indexer"] += block_indexer(module, x, tokens_BS, segments_BS, phase)
    return terms


def likelihood(logits_BSV: Tensor, tokens_BS: Tensor, ahead: int) -> float:
    """DeepSeek-V3, eq. 24: the mean of -log P(t_{i + ahead}); what begins a document is no target.

    Nor is anything that lies beyond such a beginning, seen from i.
    """
    found = []
    for logits_SV, tokens in zip(logits_BSV, tokens_BS.tolist(), strict=True):
        for i in range(len(tokens) - ahead):
            if BOS_ID not in tokens[i + 1 : i + 1 + ahead]:
                row = logits_SV[i].tolist()
                top = max(row)
                log_total = top + math.log(math.fsum(math.exp(v - top) for v in row))
                found.append(log_total - row[tokens[i + ahead]])
    return math.fsum(found) / len(found)


def balance(gate: Gate, x_BSD: Tensor) -> float:
    """DeepSeek-V3, eq. 17-20, a mean over sequences: f_i counts the top K of plain scores."""
    config, total = gate.config, 0.0
    experts, choices = config.n_routed_experts, config.num_experts_per_tok
    for x_SD in x_BSD:
        rows = (x_SD @ gate.weight.T).tolist()
        if config.family == "v4":
            scores = [[math.sqrt(math.log1p(math.exp(v))) for v in row] for row in rows]
        else:
            scores = [[1 / (1 + math.exp(-v)) for v in row] for row in rows]
        tops = [heapq.nlargest(choices, range(experts), key=s.__getitem__) for s in scores]
        for i in range(experts):
            chosen = sum(i in top for top in tops)
            f = experts / (choices * len(scores)) * chosen
            total += f * math.fsum(s[i] / sum(s) for s in scores) / len(scores)
    return total / len(x_BSD)


def divergence(attention: list[float], index: list[float]) -> float:
    """KL(p || softmax(I)) for p = attention / sum(attention) (DeepSeek-V3.2-Exp, eq. 3 and 4)."""
    total, top = math.fsum(attention), max(index)
    log_total = top + math.log(math.fsum(math.exp(v - top) for v in index))
    p = [a / total for a in attention]
    return math.fsum(q * (math.log(q) - v + log_total) for q, v in zip(p, index, strict=True) if q)


def scored(q_JI: Tensor, w_J: Tensor, k_I: Tensor) -> float:
    """Eq. 1: sum over heads of w ReLU(q . k), with the released scales."""
    dots = [max(0.0, dot) for dot in (q_JI @ k_I).tolist()]
    weighted = math.fsum(w * d for w, d in zip(w_J.tolist(), dots, strict=True))
    return weighted / math.sqrt(q_JI.numel())


def best(index: dict[int, float], keep: int, phase: IndexerPhase) -> list[int]:
    """Everything in the dense phase, the highest scores in the sparse one."""
    entries = sorted(index, key=lambda s: -index[s])
    return sorted(entries if phase == "dense" else entries[:keep])


def token_indexer(
    block: SparseLatentAttention, x_BSD: Tensor, segments_BS: Tensor, phase: IndexerPhase
) -> float:
    """V3.2: the mean over queries of their indexer's divergence from attention."""
    positions, found = torch.arange(x_BSD.shape[1]), []
    table = block.rotary(x_BSD.shape[1], x_BSD.device)
    projected = block.project(x_BSD, table, positions)
    assert projected.q_latent_BSA is not None
    q, w = block.indexer.queries(x_BSD, projected.q_latent_BSA, table, positions)
    k = block.indexer.keys(x_BSD, table, positions)
    for b, segments in enumerate(segments_BS.tolist()):
        allowed_SS = torch.zeros(len(segments), len(segments), dtype=torch.bool)
        indices = []
        for t in range(len(segments)):
            visible = [s for s in range(t + 1) if segments[s] == segments[t]]
            index = {s: scored(q[b, t], w[b, t], k[b, s]) for s in visible}
            index = {s: index[s] for s in best(index, block.keep, phase)}
            allowed_SS[t, list(index)] = True
            indices.append(index)
        _, mass_SS = latent_attention(block, x_BSD[b], allowed_SS)
        for index, mass_S in zip(indices, mass_SS, strict=True):
            found.append(divergence([float(mass_S[s]) for s in index], list(index.values())))
    return math.fsum(found) / len(found)


def block_indexer(
    block: CompressedAttention,
    x_BSD: Tensor,
    tokens_BS: Tensor,
    segments_BS: Tensor,
    phase: IndexerPhase,
) -> float:
    """V4: as V3.2's, over blocks; a query that sees none of them adds 0 to the mean."""
    compressor, positions = block.compressor, torch.arange(x_BSD.shape[1])
    assert isinstance(compressor, PickingCompressor)
    batch = Whole(tokens_BS, segments_BS)
    table = block._rotary(x_BSD.shape[1], x_BSD.device)
    q_latent, queries, shared = block.project(x_BSD, table, positions)
    keys = compressor.indexer(x_BSD, batch)
    q, w = compressor.indexer.queries(x_BSD, q_latent, table, positions)
    chosen, found = torch.full((*segments_BS.shape, keys.shape[1]), -1), []
    indices: list[dict[int, float]] = []
    for b, segments in enumerate(segments_BS.tolist()):
        for t in range(len(segments)):
            ends = {i: (i + 1) * compressor.ratio - 1 for i in range(keys.shape[1])}
            visible = [i for i, end in ends.items() if end <= t and segments[end] == segments[t]]
            index = {i: scored(q[b, t], w[b, t], keys[b, i]) for i in visible}
            picked = best(index, block.config.index_topk, phase)
            chosen[b, t, : len(picked)] = torch.tensor(picked, dtype=torch.int64)
            indices.append({i: index[i] for i in picked})
    sight = replace(block.sight, segments_BS=segments_BS, chosen_BSK=chosen)
    blocks = compressor(x_BSD, batch)
    _, mass_BSL = attend_by_query(queries, shared, blocks, block.sinks, sight)
    for index, mass_L in zip(indices, mass_BSL.flatten(0, 1), strict=True):
        if index:
            found.append(divergence([float(mass_L[i]) for i in index], list(index.values())))
    return math.fsum(found) / len(indices)


def loss_of(term: str, phase: IndexerPhase) -> PretrainLoss:
    """The stage's loss with the weight of one term, beside the next token's, always there."""
    weight = {name: value * (name == term) for name, value in WEIGHTS.items()}
    return PretrainLoss(
        mtp_weight=weight["mtp"],
        balance_weight=weight["balance"],
        attend_across_documents=False,
        indexer=phase,
        indexer_weight=weight["indexer"],
    )


def gradients(
    model: Transformer, loss: PretrainLoss, batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    value, _ = part_of(loss, model, batch)
    slopes = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {n: s for n, s in zip(named, slopes, strict=True) if s is not None and bool(s.any())}


def is_indexers(name: str) -> bool:
    return "indexer" in name.split(".")


def kind(name: str, config: ModelConfig) -> str:
    """Parameters of one kind are moved together."""
    parts = name.split(".")
    if "indexer" in parts:
        return "indexer"
    if name.startswith(f"model.layers.{config.num_hidden_layers}."):
        return "the MTP layer"
    kinds = {"shared_experts": "experts", "attn_hc": "streams", "ffn_hc": "streams"}
    kinds |= {one: one for one in ("experts", "gate", "self_attn", "engram")}
    return next((kinds[part] for part in parts if part in kinds), "norms and ends")


CASES = [
    pytest.param(family, phase, id=f"{family} {phase}")
    for family, config in FAMILIES.items()
    for phase in (("dense", "sparse") if config.has_indexer else ("off",))
    if not (config.engram and phase == "dense")
]


@pytest.mark.parametrize(("family", "phase"), CASES)
def test_every_term_and_its_gradient_are_the_papers(family: str, phase: IndexerPhase) -> None:
    config = FAMILIES[family]
    model = random_model(config).double().train()
    batch = {"tokens": texts(config)}

    whole = PretrainLoss(0.3, 0.05, False, phase, 0.25)
    value, metrics = part_of(whole, model, batch)
    expected = by_the_papers(model, batch["tokens"], phase)
    names = {"next": "next_token_loss", "mtp": "mtp_loss", "balance": "balance_loss"}
    if config.has_indexer:
        names["indexer"] = "indexer_loss"
    for term, metric in names.items():
        # Tables of angles are float32 here, and exact in the twins of attention.
        assert metrics[metric] == pytest.approx(expected[term], rel=1e-5), term
    total = sum(WEIGHTS[term] * expected[term] for term in names)
    assert float(value.detach()) == pytest.approx(total, rel=1e-5)

    alone = {term: gradients(model, loss_of(term, phase), batch) for term in names}
    plain = alone["next"]
    generator = torch.Generator().manual_seed(5)
    named = dict(model.named_parameters())
    for one in sorted({kind(name, config) for name in named}):
        moved = {n: p for n, p in named.items() if kind(n, config) == one}
        ways = {
            n: torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for n, p in moved.items()
        }
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for name, parameter in moved.items():
                    parameter.add_(sign * STEP * ways[name])
                of = "indexer" if one == "indexer" else "model"
                ends.append(by_the_papers(model, batch["tokens"], phase, of=of))
                for name, parameter in moved.items():
                    parameter.sub_(sign * STEP * ways[name])
        for term in names:
            slope = (ends[0][term] - ends[1][term]) / (2 * STEP)
            # The next token's loss is in every one of the sums.
            base = {} if term == "next" else plain
            found = sum(
                float(((alone[term].get(n, 0 * way) - base.get(n, 0 * way)) * way).sum())
                for n, way in ways.items()
            )
            if (term == "indexer") != (one == "indexer"):
                assert found == 0.0, (term, one)
            else:
                assert found == pytest.approx(WEIGHTS[term] * slope, rel=2e-5, abs=1e-7), (
                    term,
                    one,
                )


@pytest.mark.parametrize("family", ["v32", "v4"])
def test_the_indexers_term_reaches_indexers_and_no_other_term_does(family: str) -> None:
    model, batch = (
        random_model(FAMILIES[family]).double().train(),
        {"tokens": texts(FAMILIES[family])},
    )
    plain = gradients(model, loss_of("next", "sparse"), batch)
    taught = gradients(model, loss_of("indexer", "sparse"), batch)
    assert not any(map(is_indexers, plain))
    assert {n for n in taught if n not in plain} == {n for n in taught if is_indexers(n)} != set()
    for name, slope in plain.items():
        assert torch.equal(taught[name], slope), name
