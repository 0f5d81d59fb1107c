"""The model's own count of operations, beside torch's count of what a pass does."""

import math

import pytest
from torch.utils.flop_counter import FlopCounterMode

from configs.model import ModelConfig, V3Config, V4Config, V32Config
from configs.shape import mean_keys
from model import grouped
from model.transformer import Transformer
from tests.references import TINY, TINY_V4, TINY_V32, random_tokens

ROWS, LENGTH = 2, 32


def wide(config: ModelConfig) -> ModelConfig:
    """Wide beside its norms and biases, which the count takes for weights that multiply."""
    changes = {"hidden_size": 160, "moe_intermediate_size": 96, "vocab_size": 256}
    return type(config).model_validate(config.model_dump() | changes)


@pytest.mark.parametrize("config", [TINY, TINY_V32, TINY_V4], ids=["v3", "v32", "v4"])
@pytest.mark.parametrize("mtp", [0, 1])
def test_weights_multiply_as_often_as_torch_counts(
    config: ModelConfig, mtp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch does not see what C multiplies.
    monkeypatch.setattr(grouped, "serves", lambda *_: False)
    model = wide(config).model_copy(update={"num_nextn_predict_layers": mtp})
    tokens = random_tokens(ROWS, LENGTH, config=model)
    built = Transformer(model).initialize(0)
    with FlopCounterMode(display=False) as counter:
        predicted = built.predict(tokens)
        assert predicted.next_BSV.shape[-1] == model.vocab_size
        assert (predicted.after_next_BSV is None) == (mtp == 0)
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    # `bmm` is attention's here, and the hyper-connections' sums of streams.
    by_weights = counted["aten.mm"] + counted.get("aten.addmm", 0)
    attention = sum(model.attention_products(layer, LENGTH) for layer in range(model.depth + mtp))
    own = model.training_flops_per_token(LENGTH) / 3 - 2 * attention
    assert own == pytest.approx(by_weights / (ROWS * LENGTH), rel=0.01)


def seen(config: ModelConfig, layer: int) -> tuple[float, float]:
    """Keys attended to and keys scored by the indexer, of a query in the mean: one by one."""
    attended = scored = 0.0
    for position in range(1, LENGTH + 1):
        match config:
            case V32Config():
                attended += min(position, config.index_topk)
                scored += position
            case V3Config():
                attended += position
            case V4Config():
                attended += min(position, config.sliding_window)
                kind = config.attention_kind(layer)
                if kind == "csa":
                    attended += min(position / config.csa_ratio, config.index_topk)
                    scored += position / config.csa_ratio
                if kind == "hca":
                    attended += position / config.hca_ratio
    return attended / LENGTH, scored / LENGTH


@pytest.mark.parametrize("config", [TINY, TINY_V32, TINY_V4], ids=["v3", "v32", "v4"])
def test_attention_multiplies_with_the_keys_that_a_query_sees(config: ModelConfig) -> None:
    for layer in range(config.depth + 1):
        attended, scored = seen(config, layer)
        match config:
            case V4Config():
                width = 2 * config.head_dim
            case V3Config():
                width = config.qk_head_dim + config.v_head_dim
        expected = config.num_attention_heads * width * attended
        if config.has_indexer:
            assert isinstance(config, V32Config | V4Config)
            expected += config.index_n_heads * config.index_head_dim * scored
        # A sum over positions is half a key above its integral.
        found = config.attention_products(layer, LENGTH)
        assert found == pytest.approx(expected, rel=1.5 / LENGTH)


def test_the_released_models_have_the_operations_that_their_active_weights_say() -> None:
    """37B active weights of 671B (arXiv 2412.19437), of which 0.93B are embeddings; attention of
    61 layers with 128 heads of 192 and 128."""
    v3 = V3Config(num_nextn_predict_layers=0)
    attention = 61 * 128 * (192 + 128) * 4096 / 2
    found = v3.training_flops_per_token(4096) / 6 - attention
    assert found == pytest.approx(37.5e9 - 0.93e9, rel=0.01)


@pytest.mark.parametrize(
    ("keys", "most", "mean"), [(8, math.inf, 4.0), (8, 8, 4.0), (8, 4, 3.0), (100, 1, 0.995)]
)
def test_keys_are_averaged_over_positions(keys: float, most: float, mean: float) -> None:
    assert mean_keys(keys, most) == pytest.approx(mean)
