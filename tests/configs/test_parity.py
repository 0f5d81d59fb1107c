"""Promises of the section that asks for a comparison of precisions."""

import pytest

from configs.errors import ConfigError
from configs.parity import ParityConfig
from configs.reading import load_recipe


def test_the_order_of_seeds_means_nothing() -> None:
    assert ParityConfig(seeds=(2, 0, 1)) == ParityConfig(seeds=(0, 1, 2))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("parity.seeds=[]", "parity.seeds"),
        ("parity.seeds=[1, 1]", "name each once"),
        ("parity.seeds=[-1]", "parity.seeds"),
        ("parity.tail_share=0", "parity.tail_share"),
        ("parity.tail_share=1.1", "parity.tail_share"),
        ("parity.limit=0", "parity.limit"),
        ("parity.tail_shar=1", "did you mean 'tail_share'"),
        ('pretrain.precision="high"', "this leaves nothing to compare"),
        ('base="somewhere"', "drop one of the two"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("parity", sets=[assignment])
    assert message in str(caught.value)


def test_a_comparison_of_high_precision_with_itself_is_refused() -> None:
    parts = ["attention", "indexer", "dense_ffn", "shared_experts", "routed_experts"]
    high = [f'pretrain.fp8.{part}="high"' for part in parts]
    load_recipe("parity", sets=high[1:])
    with pytest.raises(ConfigError, match="sets every part of this model to"):
        load_recipe("parity", sets=high)
    # V3 has no indexer that could be FP8.
    with pytest.raises(ConfigError, match="sets every part of this model to"):
        load_recipe("parity", sets=[one for one in high if "indexer" not in one])


def test_any_recipe_may_be_asked_for_a_comparison() -> None:
    asked = load_recipe("smoke", sets=["parity.seeds=[4]"]).parity
    assert asked == ParityConfig(seeds=(4,))
