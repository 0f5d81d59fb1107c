"""What the corpus is made of: sources, quality rules, tokenizer, packing."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, ValidationInfo, field_validator, model_validator

from configs.base import Frozen
from configs.names import Word
from configs.quality_rules import HEURISTICS

SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
"""Names a folder of the corpus, so it holds letters, digits, `_` and `-` only."""
Share = Annotated[float, Field(ge=0, le=1)]
"""Part of the training tokens that a source supplies; a source of share 0 is left out."""


SLIP_STEPS = 20
"""Documents of each problem where some have slips; their share is met to one in so many."""


Heuristics = Literal["gopher-repetition", "gopher-quality", "c4", "fineweb"]
"""Published sets of rules for prose of the web; see `stages/data/heuristics.py`."""


class QualityConfig(Frozen):
    """Thresholds of the quality rules; a document that fails one is dropped with the reason."""

    normalise: Literal["none", "lines", "nfc"] = "lines"
    """What is made alike before anything is judged: nothing; line ends, which become
    `\\n`, and byte-order marks, which go; or these and Unicode composition (NFC)."""
    min_chars: int = Field(default=64, ge=0)
    max_chars: PositiveInt = 1_000_000
    max_control_share: float = Field(default=0.001, ge=0, le=1)
    """Control characters other than tab and line breaks, and replacement characters."""
    max_repeated_line_share: float = Field(default=0.5, ge=0, le=1)
    """Non-empty lines that repeat an earlier line of the same document."""
    min_letter_share: float = Field(default=0.2, ge=0, le=1)
    max_line_chars: PositiveInt = 5_000
    heuristics: tuple[Heuristics, ...] = ()
    """Sets of published rules, made for prose; code fails many of them."""
    thresholds: dict[str, float] = Field(default_factory=dict)
    """Other values for single rules of these sets, by the rule's name: `gopher_min_words = 30`."""

    @field_validator("thresholds")
    @classmethod
    def _of_rules(cls, thresholds: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        """An overlay cannot delete those of a set that it leaves out, so they mean nothing."""
        known = {rule: name for name, rules in HEURISTICS.items() for rule in rules}
        for rule in thresholds:
            if rule not in known:
                alike = get_close_matches(rule, known, n=1)
                hint = f"did you mean {alike[0]!r}?" if alike else "drop it"
                raise ValueError(f"no set of `heuristics` has a rule {rule!r}; {hint}")
        named = info.data.get("heuristics", HEURISTICS)
        return {rule: value for rule, value in thresholds.items() if known[rule] in named}


class StdlibSource(Frozen):
    """Source code and docstrings of the running Python's standard library."""

    type: Literal["stdlib"] = "stdlib"
    share: Share
    max_epochs: Annotated[float, Field(ge=1)] = 1.0
    """How often its text may be trained on, where it is shorter than its share."""
    quality: QualityConfig | None = None
    """Rules for this source, in place of `data.quality`."""
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
    """Text from files: `.txt`, `.md`, `.jsonl`, `.parquet` or source code, by glob or fsspec URL.

    Files without a suffix are read as what they hold; what gzip or zstd packed is unpacked. A row,
    file or encoding that cannot be read is set aside with its reason. What a glob
    finds is said in `stages/data/finding.py`: hidden names only where they are asked for, linked
    folders once, and nothing of Ingot's own store.
    """

    provenance_fields: ClassVar[frozenset[str]] = frozenset({"glob"})
    type: Literal["files"] = "files"
    share: Share
    glob: str = Field(min_length=1)
    text_field: str = "text"
    """Column or key that holds the text (jsonl, parquet); `meta.text` for one inside another."""
    id_field: str | None = None
    """Column or key by which a document is known besides its place; unique, or the repeats are
    counted and told."""
    licence_field: str | None = None
    """Column or key that holds each document's licence, for the data card."""
    timestamp_field: str | None = None
    """Column or key that says when each document was written, for the data card."""
    licence: str | None = None
    """The licence of documents that say none of their own."""
    split_documents: bool = True
    """Cut long plain text into pieces at blank lines; otherwise a file is one document."""
    max_broken_share: float = Field(default=0.01, ge=0, le=1)
    """Part of the source's bytes that may be set aside as broken before the stage fails."""
    max_epochs: Annotated[float, Field(ge=1)] = 1.0
    """How often its text may be trained on, where it is shorter than its share."""
    quality: QualityConfig | None = None
    """Rules for this source, in place of `data.quality`."""
    max_bytes: PositiveInt = 100_000_000
    """Read at most this much text, files in the order of their names; what is left out is said."""


class ProblemsSource(Frozen):
    """Questions with answers that can be checked, from files of rows, as GSM8K has them."""

    provenance_fields: ClassVar[frozenset[str]] = frozenset({"glob", "held_out_glob"})
    type: Literal["problems"] = "problems"
    share: Share
    glob: str = Field(min_length=1)
    held_out_glob: str | None = None
    """Files of the problems that training never sees; without, a share of `glob`'s is held out."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Part of the problems to hold out, by each one's hash; unused with `held_out_glob`."""
    prompt_field: str = "question"
    answer_field: str = "answer"
    answer_mark: str = "####"
    """What stands before the final answer in the answer's text; one without it is the answer
    whole."""
    licence: str | None = None


Source = Annotated[
    StdlibSource | ArithmeticSource | FilesSource | ProblemsSource, Field(discriminator="type")
]
TextSource = StdlibSource | FilesSource
"""Sources of documents, which are cleaned; the others make theirs of problems."""
CheckableSource = ArithmeticSource | ProblemsSource
"""Sources of problems with answers that can be checked."""


class EvaluationSet(Frozen):
    """What training text must not hold: the items of an evaluation, as text fields of files."""

    provenance_fields: ClassVar[frozenset[str]] = frozenset({"glob"})
    glob: str = Field(min_length=1)
    """Files as of a source."""
    text_fields: Annotated[tuple[str, ...], Field(min_length=1)] = ("text",)
    """Columns or keys whose text is searched for, each by itself; one that a row lacks is passed
    over."""


class DedupConfig(Frozen):
    """What counts as said before; of equal documents the first one stays."""

    exact: bool = True
    """Documents that are equal but for capitals, white space and Unicode composition."""
    near: bool = True
    """Documents whose sets of word shingles are alike; MinHash finds them, a count judges."""
    min_jaccard: float = Field(default=0.8, ge=0.6, le=1)
    """From this share of shingles in common two documents are near-duplicates. MinHash with 25
    bands of 5 finds 99.99 of 100 pairs that have 0.8 in common, 99 at 0.7 and 87 at 0.6; below
    that it would miss too many."""
    paragraphs: bool = False
    """Cut paragraphs that an earlier document has, capitals and white space aside."""
    min_paragraph_chars: PositiveInt = 200
    """A shorter paragraph may repeat."""

    @model_validator(mode="after")
    def _near_holds_equal(self) -> Self:
        if self.near and not self.exact:
            raise ValueError(
                "exact = false, but near = true drops equal documents too; set near = false as "
                "well, or leave exact"
            )
        return self


class PackConfig(Frozen):
    """How documents become rows of one length."""

    method: Literal["concat", "best-fit"] = "concat"
    """End to end, cut where a row is full; or whole documents into the rows that they fill best,
    where only what is longer than a row is cut and what stays empty is padding."""
    min_document_tokens: int = Field(default=0, ge=0)
    """Pack text documents of so many tokens or more alone, as a phase of long rows wants them."""
    fim_rate: float = Field(default=0.0, ge=0, le=1)
    """Part of the text documents that are asked to be filled in the middle (prefix, suffix,
    middle); needs `fim` among `data.tokenizer.special_tokens`, or a tokenizer that has them."""


SPECIAL_TOKENS = {"chat": 2, "thinking": 2, "tools": 9, "fim": 3}
"""How many control tokens there are of each kind."""


class TokenizerConfig(Frozen):
    """A byte-level BPE with digits split singly, or one that exists."""

    provenance_fields: ClassVar[frozenset[str]] = frozenset({"file", "encoder"})

    file: str | None = None
    """A `tokenizer.json` to take as it is; what else is said here then means nothing, and is
    as if it were not said."""
    vocab_size: Annotated[int, Field(ge=260)] = 1024
    """Upper bound: 256 bytes, special tokens, merges. A small corpus may need fewer."""
    training_bytes: PositiveInt = 4_000_000
    pre_tokenizer: Literal["digits", "deepseek"] = "digits"
    """What merges cannot cross: single digits and GPT-2's words, or the words of DeepSeek-V3's
    tokenizer, with up to three digits."""
    special_tokens: tuple[Literal["chat", "thinking", "tools", "fim"], ...] = ()
    """Kinds of control tokens to have besides those that begin and end a document, spelt as
    DeepSeek spells them."""
    encoder: Literal["tokenizers", "gigatoken"] = "tokenizers"
    """What encodes in bulk; gigatoken where it is installed and knows the pre-tokenizer exactly,
    after it has been seen to agree."""

    @model_validator(mode="before")
    @classmethod
    def _file_says_it_all(cls, fields: Any) -> Any:
        if not isinstance(fields, Mapping):
            return fields
        if isinstance(kinds := fields.get("special_tokens"), list):
            # What a validator has seen counts as of Python, where a list is no tuple.
            fields = {**fields, "special_tokens": tuple(kinds)}
        if fields.get("file") is None:
            return fields
        # They would enter the identity of a corpus on which they have no bearing.
        unsaid = ("vocab_size", "training_bytes", "pre_tokenizer", "special_tokens")
        return {k: v for k, v in fields.items() if k not in unsaid}

    @field_validator("special_tokens")
    @classmethod
    def _kinds_once(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        """In an order of their own, as the one in which they are named means nothing."""
        return tuple(sorted(set(kinds)))

    @model_validator(mode="after")
    def _holds_its_special_tokens(self) -> Self:
        least = 258 + sum(SPECIAL_TOKENS[kind] for kind in self.special_tokens)
        if self.vocab_size < least:
            raise ValueError(
                f"vocab_size = {self.vocab_size} has no room for 256 bytes and "
                f"{least - 256} special tokens; set it to {least} or more"
            )
        return self


class DataConfig(Frozen):
    """The corpus: a mixture by tokens, packed into rows of one length.

    An overlay adds a source under a name of its own, or replaces one by giving the same name
    another `type`. TOML cannot delete a table: `share = 0` takes a source out, and what it says
    besides no longer matters. The shares that remain must add up to 1, so set them anew.
    """

    sources: dict[SourceName, Source] = Field(min_length=1)
    train_tokens: PositiveInt
    """Tokens to pack for training. Problems are drawn as often as needed, text as a source's
    `max_epochs` says."""
    sequence_tokens: Annotated[int, Field(ge=8)] = 256
    held_out_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Part of the text documents held out, decided by each document's hash; no more of them than
    `max_held_out_tokens` can take."""
    max_held_out_tokens: PositiveInt = 100_000
    """Held-out tokens to pack for each source."""
    shard_bytes: PositiveInt = 32_000_000
    """Files of a source are prepared in shards of about this size on disk, which is what a lost
    worker costs; shards are shuffled, and the documents within each."""
    quality: QualityConfig = QualityConfig()
    dedup: DedupConfig = DedupConfig()
    evaluations: dict[SourceName, EvaluationSet] = Field(default_factory=dict)
    """Sets of items that are cut out of training text, besides held-out text and problems."""
    pack: PackConfig = PackConfig()
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

    @model_validator(mode="after")
    def _can_ask_for_the_middle(self) -> Self:
        """Here, as this section's tokenizer encodes all corpora."""
        if self.tokenizer.file is not None or "fim" in self.tokenizer.special_tokens:
            return self
        further = {f"data.corpora.{name}": corpus for name, corpus in self.corpora.items()}
        for table, corpus in ({"data": self} | further).items():
            if corpus.pack.fim_rate:
                raise ValueError(
                    f"{table}.pack.fim_rate = {corpus.pack.fim_rate:g} needs control tokens; add "
                    '"fim" to data.tokenizer.special_tokens, or set it to 0'
                )
        return self


class DataSpec(Frozen):
    """The data stage's whole config."""

    seed: int
    data: DataConfig
