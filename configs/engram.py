"""Engram, conditional memory: tables looked up by hashed n-grams (arXiv 2601.07372)."""

from functools import cache
from typing import ClassVar, Literal, Self

from pydantic import NonNegativeInt, PositiveInt, model_validator

from configs.base import Frozen

TableDevice = Literal["model", "host"]
"""Where a memory's tables lie: with the rest of the model, or in main memory."""


class EngramConfig(Frozen):
    """Which layers have a memory, and its size. Defaults are the paper's demonstration."""

    provenance_fields: ClassVar[frozenset[str]] = frozenset({"table_device"})

    layer_ids: tuple[NonNegativeInt, ...] = (1, 15)
    """Layers in front of which the memory is read, counted from 0."""
    table_sizes: tuple[PositiveInt, ...] = (646400, 646400)
    """Rows a table has at least, for n-grams of 2, 3, ... tokens; its length sets the longest."""
    n_embed_per_ngram: PositiveInt = 512
    """Width read for one length of n-gram, over its heads together."""
    n_head_per_ngram: PositiveInt = 8
    """Independent hashes of one n-gram, each with a table of its own."""
    kernel_size: PositiveInt = 4
    """Taps of the short convolution; they lie as many tokens apart as the longest n-gram has."""
    seed: NonNegativeInt = 0
    """Of the numbers that n-grams are hashed with."""
    pad_id: NonNegativeInt = 2
    """Token that stands where an n-gram reaches back over the start of its document, or of its row
    where documents attend to each other."""
    table_device: TableDevice = "model"
    """`host` keeps the tables in main memory wherever the model goes. A model's folder does not say
    it: where a loaded model's tables lie, `load_pretrained` is told."""

    @model_validator(mode="after")
    def _numbers_agree(self) -> Self:
        if self.n_embed_per_ngram % self.n_head_per_ngram:
            raise ValueError(
                f"n_embed_per_ngram = {self.n_embed_per_ngram} is not divisible by "
                f"n_head_per_ngram = {self.n_head_per_ngram}; change either"
            )
        if len(set(self.layer_ids)) != len(self.layer_ids) or not self.layer_ids:
            raise ValueError(
                f"layer_ids = {list(self.layer_ids)} must name at least one layer, and none twice"
            )
        if not self.table_sizes:
            raise ValueError("table_sizes is empty; give one number of rows for each n-gram length")
        return self

    @property
    def max_ngram_size(self) -> int:
        """Tokens of the longest n-gram."""
        return len(self.table_sizes) + 1

    @property
    def head_dim(self) -> int:
        """Width of one table's rows."""
        return self.n_embed_per_ngram // self.n_head_per_ngram

    @property
    def width(self) -> int:
        """Values read for one token: all n-gram lengths and heads side by side."""
        return len(self.table_sizes) * self.n_embed_per_ngram

    def table_rows(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """Rows of each table of `layer`, by n-gram length, then head: distinct primes.

        Ascending from the first prime above `table_sizes` - 1, no prime twice in the model.
        """
        position = self.layer_ids.index(layer)
        return _table_rows(self.layer_ids, self.table_sizes, self.n_head_per_ngram)[position]

    def parameters(self, layer: int, hidden_size: int, streams: int, *, active: bool) -> int:
        """Weights of the memory of one layer; with `active`, one row of each table.

        Tables, one key projection a stream and one value projection, the norms of states and keys
        and of the convolution's input (one vector a stream each), and the taps.
        """
        if active:
            tables = self.width
        else:
            tables = self.head_dim * sum(sum(rows) for rows in self.table_rows(layer))
        projections = (streams + 1) * self.width * hidden_size
        return tables + projections + streams * hidden_size * (3 + self.kernel_size)


@cache
def _table_rows(
    layer_ids: tuple[int, ...], table_sizes: tuple[int, ...], heads: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    taken: set[int] = set()
    layers = []
    for _ in layer_ids:
        lengths = []
        for size in table_sizes:
            rows: list[int] = []
            candidate = size - 1
            while len(rows) < heads:
                candidate += 1
                if candidate not in taken and _is_prime(candidate):
                    rows.append(candidate)
                    taken.add(candidate)
            lengths.append(tuple(rows))
        layers.append(tuple(lengths))
    return tuple(layers)


def _is_prime(number: int) -> bool:
    if number < 4:
        return number > 1
    if number % 2 == 0:
        return False
    divisor = 3
    while divisor * divisor <= number:
        if number % divisor == 0:
            return False
        divisor += 2
    return True
