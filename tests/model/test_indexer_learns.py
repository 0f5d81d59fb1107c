"""The indexer of V3.2 learns what attention looks for: a toy retrieval task, a minute on one core.

Run with `-s` to see the figures. A text names 48 pairs of a key and a value, each in one token, and
then asks for the values of 16 keys; one answer in ten is drawn at random, so that the best loss is
not zero. The order of training is the report's (DeepSeek-V3.2-Exp, section 2.1): a dense model, a
warm-up of its indexer alone, and then sparse training of both.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.model import V32Config
from model.decoder import DecoderLayer
from model.indexer import choose, index_scores
from model.passes import IndexerPhase
from model.sparse import SparseLatentAttention
from model.transformer import Transformer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

KEYS, VALUES, PAIRS, ASKED = 64, 8, 48, 16
FIRST_KEY = KEYS * VALUES
FIRST_VALUE = FIRST_KEY + KEYS
SLIPS = 0.1
KEPT = 8
BATCH = 32
CURRICULUM = ((75, 4), (150, 8), (225, 16), (300, 32), (500, PAIRS))
"""(until step, pairs): found among few pairs first, retrieval is learnt in seconds."""
WARMUP_STEPS = 150
SPARSE_STEPS = 60


def config(index_topk: int) -> V32Config:
    """One layer: a second one would find nothing left to look for, and attend everywhere."""
    return V32Config(
        family="v32",
        vocab_size=FIRST_VALUE + VALUES,
        hidden_size=64,
        num_hidden_layers=1,
        first_k_dense_replace=1,
        num_attention_heads=2,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        index_n_heads=8,
        index_head_dim=16,
        index_topk=index_topk,
        intermediate_size=128,
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        num_nextn_predict_layers=0,
        max_position_embeddings=128,
        initializer_range=0.05,
    )


def texts(rows: int, generator: torch.Generator, pairs: int = PAIRS) -> Tensor:
    """`pairs` tokens that each name a key and a value, then keys and their values by turns."""
    keys_BP = torch.rand(rows, KEYS, generator=generator).argsort(1)[:, :pairs]
    values_BP = torch.randint(VALUES, (rows, pairs), generator=generator)
    asked_BA = torch.randint(pairs, (rows, ASKED), generator=generator)
    slips_BA = torch.rand(rows, ASKED, generator=generator) < SLIPS
    random_BA = torch.randint(VALUES, (rows, ASKED), generator=generator)
    answers_BA = torch.where(slips_BA, random_BA, values_BP.gather(1, asked_BA))
    talk_BA2 = torch.stack([FIRST_KEY + keys_BP.gather(1, asked_BA), FIRST_VALUE + answers_BA], -1)
    return torch.cat([keys_BP * VALUES + values_BP, talk_BA2.flatten(1)], dim=1)


def answer_loss(logits_BSV: Tensor, tokens_BS: Tensor) -> Tensor:
    """Mean cross-entropy of the answers."""
    asks_A = torch.arange(tokens_BS.shape[1] - 2 * ASKED, tokens_BS.shape[1], 2)
    logits, targets = logits_BSV[:, asks_A], tokens_BS[:, asks_A + 1]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def optimizer(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)


def step(taken: torch.optim.AdamW, loss: Tensor) -> None:
    taken.zero_grad()
    loss.backward()
    taken.step()


def train_densely(model: Transformer) -> None:
    generator = torch.Generator().manual_seed(0)
    main = optimizer((p for n, p in model.named_parameters() if ".indexer." not in n), 5e-3)
    last = CURRICULUM[-1][0]
    for number in range(last):
        pairs = next(pairs for until, pairs in CURRICULUM if number < until)
        tokens_BS = texts(BATCH, generator, pairs)
        main.param_groups[0]["lr"] = 5e-3 * min(1.0, (number + 1) / 50, (last - number) / 100)
        step(main, answer_loss(model(tokens_BS), tokens_BS))


def warm_up(model: Transformer) -> None:
    generator = torch.Generator().manual_seed(1)
    indexer = optimizer((p for n, p in model.named_parameters() if ".indexer." in n), 5e-3)
    for _ in range(WARMUP_STEPS):
        missed = model.predict(texts(BATCH, generator), indexer="dense").indexer_loss
        assert missed is not None
        step(indexer, missed)


def train_on(model: Transformer, phase: IndexerPhase) -> None:
    """The same texts whatever the phase."""
    generator = torch.Generator().manual_seed(2)
    everything = optimizer(model.parameters(), 3e-4)
    for _ in range(SPARSE_STEPS):
        tokens_BS = texts(BATCH, generator)
        predicted = model.predict(tokens_BS, indexer=phase)
        loss = answer_loss(predicted.next_BSV, tokens_BS)
        step(everything, loss if predicted.indexer_loss is None else loss + predicted.indexer_loss)


@torch.no_grad()
def loss_of(model: Transformer) -> float:
    tokens_BS = texts(512, torch.Generator().manual_seed(3))
    return float(answer_loss(model(tokens_BS), tokens_BS))


@torch.no_grad()
def shares_kept(model: Transformer) -> tuple[float, float]:
    """Of dense attention's mass, by what the indexer picks: of asking queries, and of all.

    Means over queries that see more than `KEPT` tokens; all heads count alike.
    """
    tokens_BS = texts(64, torch.Generator().manual_seed(4))
    (layer,) = model.model.layers
    assert isinstance(layer, DecoderLayer)
    block = layer.self_attn
    assert isinstance(block, SparseLatentAttention)
    x_BSD = layer.input_layernorm(model.model.embed_tokens(tokens_BS))
    positions_S = torch.arange(tokens_BS.shape[1])
    table = block.rotary(len(positions_S), x_BSD.device)
    seen = block.project(x_BSD, table, positions_S)
    heads = block.expand(seen)
    causal_BSS = (positions_S <= positions_S[:, None]).expand(len(tokens_BS), -1, -1)
    score_BHSS = heads.q_BHSQ @ heads.k_BHSQ.transpose(2, 3) * block.scale
    hidden_B1SS = ~causal_BSS.unsqueeze(1)
    mass_BSS = score_BHSS.masked_fill(hidden_B1SS, float("-inf")).softmax(-1).mean(1)
    assert seen.q_latent_BSA is not None
    q, weights = block.indexer.queries(x_BSD, seen.q_latent_BSA, table, positions_S)
    keys = block.indexer.keys(x_BSD, table, positions_S)
    chosen_BSK = choose(index_scores(q, keys, weights), causal_BSS, KEPT)
    kept_BSK = mass_BSS.gather(2, chosen_BSK.clamp_min(0)).masked_fill(chosen_BSK < 0, 0.0)
    kept_BS = kept_BSK.sum(-1)
    return float(kept_BS[:, PAIRS::2].mean()), float(kept_BS[:, KEPT:].mean())


@dataclass(frozen=True)
class Figures:
    """What the tests look at, taken from one training."""

    dense_loss: float
    untrained_loss: float
    warm_loss: float
    untrained: tuple[float, float]
    warm: tuple[float, float]
    trained_loss: float
    trained_on_loss: float


@pytest.fixture(scope="module")
def figures() -> Figures:
    torch.set_num_threads(1)
    dense = Transformer(config(PAIRS + 2 * ASKED)).initialize(0)
    train_densely(dense)
    sparse = Transformer(config(KEPT)).initialize(0)
    sparse.load_state_dict(dense.state_dict())
    dense_loss, untrained_loss, untrained = loss_of(dense), loss_of(sparse), shares_kept(sparse)
    warm_up(sparse)
    warm_loss, warm = loss_of(sparse), shares_kept(sparse)
    train_on(sparse, "sparse")
    train_on(dense, "off")
    found = Figures(
        dense_loss, untrained_loss, warm_loss, untrained, warm, loss_of(sparse), loss_of(dense)
    )
    print(f"\n{found}")
    return found


def test_the_dense_model_has_learnt_to_retrieve(figures: Figures) -> None:
    """All that is left is the slips' entropy, 0.46 nats; not to look at the pairs costs ln 8."""
    assert figures.dense_loss < 0.55


def test_warm_up_raises_the_mass_that_is_kept_from_chance_to_nine_tenths(figures: Figures) -> None:
    positions_S = torch.arange(PAIRS + 2 * ASKED)
    chance_S = KEPT / (positions_S + 1)
    for place, queries in enumerate((slice(PAIRS, None, 2), slice(KEPT, None))):
        chance = float(chance_S[queries].mean())
        print(
            f"\nkept: chance {chance:.3f}, untrained {figures.untrained[place]:.3f}, "
            f"after warm-up {figures.warm[place]:.3f}"
        )
        assert figures.untrained[place] < 2 * chance
        assert figures.warm[place] >= 0.9


def test_the_sparse_models_loss_is_within_one_percent_of_the_dense_ones(figures: Figures) -> None:
    """Right after the warm-up, and after as much training more, dense or sparse."""
    assert figures.untrained_loss > 1.5 * figures.dense_loss, "else sparsity would cost nothing"
    assert figures.warm_loss == pytest.approx(figures.dense_loss, rel=0.01)
    assert figures.trained_loss == pytest.approx(figures.trained_on_loss, rel=0.01)
