"""Sizes of the memory: primes by trial, and the sums that a released model publishes."""

from typing import Any

import pytest
from pydantic import ValidationError

from configs.engram import EngramConfig
from configs.model import V3Config, model_config


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, number))


def flat(config: EngramConfig) -> list[int]:
    """Rows of every table, layer by layer, length by length, head by head."""
    return [
        rows for layer in config.layer_ids for heads in config.table_rows(layer) for rows in heads
    ]


def test_v41_flash_publishes_as_many_rows_as_are_counted_here() -> None:
    config = EngramConfig(layer_ids=(1, 14), table_sizes=(16_000_000,) * 3)
    assert sum(map(sum, config.table_rows(1))) == 384_006_168
    assert sum(map(sum, config.table_rows(14))) == 384_016_682


def test_tables_have_the_next_primes_that_none_has_yet() -> None:
    config = EngramConfig(
        layer_ids=(4, 2), table_sizes=(23, 20, 54), n_embed_per_ngram=6, n_head_per_ngram=3
    )
    taken: list[int] = []
    for size in (23, 20, 54) * 2:
        for _ in range(3):
            taken.append(next(n for n in range(size, 999) if is_prime(n) and n not in taken))
    # The first is 23 itself, since the search begins above size - 1.
    assert taken[:6] == [23, 29, 31, 37, 41, 43]
    assert flat(config) == taken
    assert config.table_rows(2)[0][0] == taken[9]


def test_the_longest_ngram_and_the_widths_follow_from_the_tables() -> None:
    config = EngramConfig(table_sizes=(10, 10, 10), n_embed_per_ngram=24, n_head_per_ngram=4)
    assert (config.max_ngram_size, config.head_dim, config.width) == (4, 6, 72)


def test_a_token_reads_one_row_of_each_table() -> None:
    config = EngramConfig(
        layer_ids=(0,), table_sizes=(7, 17), n_embed_per_ngram=6, n_head_per_ngram=2, kernel_size=5
    )
    rows = 7 + 11 + 17 + 19
    assert flat(config) == [7, 11, 17, 19]
    # Width 16, 3 streams: 4 projections of 12 values read, and 3 norms and 5 taps a channel.
    beside = 4 * 12 * 16 + (3 + 5) * 3 * 16
    assert config.parameters(0, 16, 3, active=False) == 3 * rows + beside
    assert config.parameters(0, 16, 3, active=True) == 3 * 4 + beside


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embed_per_ngram": 10}, "n_embed_per_ngram = 10 is not divisible by n_head_per_ngram"),
        ({"layer_ids": ()}, r"layer_ids = \[\] must name at least one layer"),
        ({"layer_ids": (1, 1)}, r"layer_ids = \[1, 1\] must name at least one layer, and none tw"),
        ({"table_sizes": ()}, "table_sizes is empty"),
        ({"table_sizes": (10, 0)}, "greater than 0"),
    ],
)
def test_numbers_that_disagree_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EngramConfig(**changes)


@pytest.mark.parametrize(
    ("engram", "message"),
    [
        ({"layer_ids": (0, 61)}, "engram.layer_ids holds 61, but num_hidden_layers = 61"),
        ({"pad_id": 129280}, "engram.pad_id = 129280 is not below vocab_size = 129280"),
    ],
)
def test_a_memory_must_fit_its_model(engram: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        V3Config(engram=EngramConfig(**engram))


def test_a_memory_survives_json() -> None:
    config = V3Config(engram=EngramConfig(layer_ids=(2,), table_device="host"))
    assert model_config(config.model_dump(mode="json")) == config
