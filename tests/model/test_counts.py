"""Promises of size: every tensor of the released models, counted where none takes memory."""

import time

import pytest
import torch

from configs.model import ModelConfig
from configs.reading import load_recipe
from model.transformer import Transformer

SIZES = {
    "deepseek-v3": 671_026_419_200,
    "deepseek-v3.2": 671_877_944_064,
    "deepseek-v4-flash": 284_334_567_511,
    "deepseek-v4-pro": 1_572_999_528_803,
}
"""Values of the main model, routing biases and hash tables included, the MTP layer not."""
LIMIT_SECONDS = 10.0
"""Of one processor."""
DERIVED = ("canonical_ids", "multipliers")
"""Of an engram: follow from tokenizer and seed, and are no weights."""


RECIPES = [
    *("smoke", "tiny", "tiny-v3.2", "tiny-v4", "tiny-engram", "article-v4"),
    *("servable", "servable-v3.2", "servable-v4"),
]


def main_model(config: ModelConfig) -> ModelConfig:
    """The same model without its MTP layer."""
    return config.model_copy(update={"num_nextn_predict_layers": 0})


def count(config: ModelConfig) -> int:
    """Values of all parameters and of the buffers that a checkpoint holds."""
    with torch.device("meta"):
        model = Transformer(config)
    state = model.state_dict()
    return sum(tensor.numel() for name, tensor in state.items() if not name.endswith(DERIVED))


@pytest.mark.parametrize(("recipe", "size"), SIZES.items())
def test_a_released_model_has_its_published_number_of_weights(recipe: str, size: int) -> None:
    config = main_model(load_recipe(recipe).model)
    begin = time.process_time()
    counted = count(config)
    seconds = time.process_time() - begin
    assert counted == size
    assert config.parameters() == size
    assert seconds < LIMIT_SECONDS


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_arithmetic_of_a_config_counts_what_the_model_holds(recipe: str) -> None:
    config = main_model(load_recipe(recipe).model)
    assert count(config) == config.parameters()
