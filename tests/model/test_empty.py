"""A rank may have no rows, and a row no tokens: the graph is that of the other ranks.

Ranks sum gradients parameter by parameter. One whose rows ran out must have a gradient wherever the
others have one, and it must be 0.
"""

import pytest
import torch

from configs.engram import EngramConfig
from configs.model import ModelConfig
from configs.train import Precision
from model.passes import IndexerPhase
from model.transformer import Predictions, Transformer
from tests.references import random_model, random_tokens, tiny, tiny_v4, tiny_v32

ENGRAM = EngramConfig(
    layer_ids=(1,), table_sizes=(50, 60), n_embed_per_ngram=8, n_head_per_ngram=2
).model_dump()
CASES: dict[str, tuple[ModelConfig, IndexerPhase]] = {
    "v3": (tiny(), "off"),
    "v3 with memory": (tiny(engram=ENGRAM), "off"),
    "v32 dense": (tiny_v32(), "dense"),
    "v32 by a mask": (tiny_v32(), "sparse"),
    "v32 gathered": (tiny_v32(index_topk=2), "sparse"),
    "v32 gathered, not taught": (tiny_v32(index_topk=2), "off"),
    "v4 dense": (tiny_v4(index_topk=2), "dense"),
    "v4": (tiny_v4(index_topk=2, engram=ENGRAM), "sparse"),
}


def learnt(
    config: ModelConfig, phase: IndexerPhase, precision: Precision, *shape: int, segments: bool
) -> tuple[Transformer, Predictions]:
    """A model after the backward pass of a loss in which everything that can learn has a part; and
    what that was a loss of."""
    model = random_model(config, precision=precision).train()
    tokens_BS = random_tokens(*shape, config=config)
    segments_BS = torch.zeros_like(tokens_BS) if segments else None
    predicted = model.predict(tokens_BS, segments_BS, indexer=phase)
    assert predicted.after_next_BSV is not None
    loss = predicted.next_BSV.square().sum() + predicted.after_next_BSV.square().sum()
    if predicted.indexer_loss is not None:
        loss = loss + predicted.indexer_loss
    loss.backward()
    return model, predicted


@pytest.mark.parametrize("precision", ["high", "fp8"])
@pytest.mark.parametrize("case", CASES)
def test_a_rank_without_rows_has_gradients_of_zero_where_others_have_some(
    case: str, precision: Precision
) -> None:
    config, phase = CASES[case]
    full, _ = learnt(config, phase, precision, 2, 24, segments=True)
    for segments in (True, False):
        empty, predicted = learnt(config, phase, precision, 0, 24, segments=segments)
        for (name, a), b in zip(full.named_parameters(), empty.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            assert b.grad is None or not b.grad.any(), name
        loads = [one.load_E for one in predicted.reports if one.load_E is not None]
        assert len(loads) == len(empty.moe_layers())
        assert not any(load_E.any() for load_E in loads)


@pytest.mark.parametrize("case", CASES)
def test_rows_without_tokens_are_read(case: str) -> None:
    config, phase = CASES[case]
    model, _ = learnt(config, phase, "high", 2, 0, segments=False)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    with torch.no_grad():
        assert model.eval()(random_tokens(3, 0)).shape == (3, 0, config.vocab_size)
