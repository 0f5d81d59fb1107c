"""What the corpus is made of: sources, quality rules, tokenizer, packing."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from configs.base import Frozen
from configs.names import Word

SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
"""Names a folder of the corpus, so it holds letters, digits, `_` and `-` only."""
Share = Annotated[float, Field(ge=0, le=1)]
"""Part of the training tokens that a source supplies; a source of share 0 is left out."""


SLIP_STEPS = 20
"""Documents of each problem where some have slips; their share is met to one in so many."""


class StdlibSource(Frozen):
    """Source code and docstrings of the running Python's standard library."""

    type: Literal["stdlib"] = "stdlib"
    share: Share
    max_bytes: PositiveInt = 8_000_000
    """Read at most this much text, from a seeded shuffle of the files; what is left out is said."""


class ArithmeticSource(Frozen):
    """Generated arithmetic with checkable answers, as `37+45=` and its answer."""

    type: Literal["arithmetic"] = "arithmetic"
    share: Share
    operations: Annotated[tuple[Literal["+", "-", "*"], ...], Field(min_length=1)] = ("+",)
    digits: Annotated[int, Field(ge=1, le=6)] = 2
    """Digits of the larger operands."""
    zero_padded: bool = True
    """Write both operands and the answer with leading zeros, so that columns align."""
    answer_order: Literal["most-significant-first", "least-significant-first"] = (
        "least-significant-first"
    )
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Part of all distinct problems that training never sees."""
    slip_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Part of the training documents whose answer has one digit off by one, as sums that people
    write have. Problems, and held-out documents, are always right."""
    max_problems: Annotated[int, Field(ge=10)] = 100_000
    """Where more distinct problems exist, this many are drawn by seed, as many each operation."""

    @field_validator("operations")
    @classmethod
    def _each_once(cls, operations: tuple[str, ...]) -> tuple[str, ...]:
        """In an order of their own, as the one in which they are named means nothing."""
        return tuple(sorted(set(operations)))


class FilesSource(Frozen):
    """Text from files: `.txt`, `.jsonl` or `.parquet`, by glob or any fsspec URL.

    Files without a suffix are read as what they hold, and what gzip packed is unpacked. What a glob
    finds is said in `stages/data/finding.py`: hidden names only where they are asked for, linked
    folders once, and nothing of Ingot's own store.
    """

    provenance_fields: ClassVar[frozenset[str]] = frozenset({"glob"})
    type: Literal["files"] = "files"
    share: Share
    glob: str = Field(min_length=1)
    text_field: str = "text"
    """Column or key that holds the text (jsonl, parquet); `meta.text` for one inside another."""
    max_bytes: PositiveInt = 100_000_000
    """Read at most this much text, files in the order of their names; what is left out is said."""


Source = Annotated[StdlibSource | ArithmeticSource | FilesSource, Field(discriminator="type")]


class QualityConfig(Frozen):
    """Thresholds of the quality rules; a document that fails one is dropped with the reason."""

    min_chars: int = Field(default=64, ge=0)
    max_chars: PositiveInt = 1_000_000
    max_control_share: float = Field(default=0.001, ge=0, le=1)
    """Control characters other than tab and line breaks, and replacement characters."""
    max_repeated_line_share: float = Field(default=0.5, ge=0, le=1)
    """Non-empty lines that repeat an earlier line of the same document."""
    min_letter_share: float = Field(default=0.2, ge=0, le=1)
    max_line_chars: PositiveInt = 5_000


class TokenizerConfig(Frozen):
    """A byte-level BPE with digits split singly, or one that exists."""

    provenance_fields: ClassVar[frozenset[str]] = frozenset({"file"})

    file: str | None = None
    """A `tokenizer.json` to take as it is; what else is said here then means nothing, and is
    as if it were not said."""
    vocab_size: Annotated[int, Field(ge=260)] = 1024
    """Upper bound: 256 bytes, two special tokens, merges. A small corpus may need fewer."""
    training_bytes: PositiveInt = 4_000_000

    @model_validator(mode="before")
    @classmethod
    def _file_says_it_all(cls, fields: Any) -> Any:
        if not isinstance(fields, Mapping) or fields.get("file") is None:
            return fields
        # They would enter the identity of a corpus on which they have no bearing.
        return {k: v for k, v in fields.items() if k not in ("vocab_size", "training_bytes")}


class DataConfig(Frozen):
    """The corpus: a mixture by tokens, packed into rows of one length.

    An overlay adds a source under a name of its own, or replaces one by giving the same name
    another `type`. TOML cannot delete a table: `share = 0` takes a source out, and what it says
    besides no longer matters. The shares that remain must add up to 1, so set them anew.
    """

    sources: dict[SourceName, Source] = Field(min_length=1)
    train_tokens: PositiveInt
    """Tokens to pack for training. Arithmetic is drawn as often as needed; text never repeats."""
    sequence_tokens: Annotated[int, Field(ge=8)] = 256
    held_out_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Part of the text documents held out, decided by each document's hash."""
    max_held_out_tokens: PositiveInt = 100_000
    """Held-out tokens to pack for each source."""
    quality: QualityConfig = QualityConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()

    @field_validator("sources")
    @classmethod
    def _without_empty_shares(cls, sources: dict[str, Source]) -> dict[str, Source]:
        return {name: source for name, source in sources.items() if source.share}

    @model_validator(mode="after")
    def _shares_add_up(self) -> Self:
        total = sum(source.share for source in self.sources.values())
        if abs(total - 1) > 1e-6:
            shares = ", ".join(f"{name} {source.share}" for name, source in self.sources.items())
            raise ValueError(
                f"sources: shares add up to {total:g}, not 1 ({shares}); set them anew"
            )
        return self


class DataSection(DataConfig):
    """`[data]`: the node `data`, and further corpora by name: `[data.corpora.math]` is `data.math`.

    A further corpus has sources and `train_tokens` of its own, and this section's other settings
    where it says nothing else. It is encoded by this section's tokenizer, so that one model reads
    both.
    """

    corpora: dict[Word, DataConfig] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_tokenizer(self) -> Self:
        for name, corpus in self.corpora.items():
            if "tokenizer" in corpus.model_fields_set:
                raise ValueError(
                    f"corpora.{name}.tokenizer: all corpora are encoded by data.tokenizer, so that "
                    "one model reads them; drop it"
                )
        return self


class DataSpec(Frozen):
    """The data stage's whole config."""

    seed: int
    data: DataConfig
