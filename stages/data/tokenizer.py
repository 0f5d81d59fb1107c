"""Trains the byte-level BPE tokenizer or takes one that exists, and encodes with it.

A trained tokenizer begins its vocabulary with begin-of-text (0) and end-of-text (1); then come the
control tokens that the config asks for, in the order of `CONTROL_TOKENS`; then 256 bytes; then the
merges.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from configs.data import TokenizerConfig
from configs.errors import DataError
from stages.framing import BOS_TOKEN, EOS_TOKEN
from stages.tokens import begin_texts

Int32 = npt.NDArray[np.int32]

FIM_TOKENS = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
"""Stand before the prefix, before the suffix and before the middle of a document."""
CONTROL_TOKENS: Mapping[str, tuple[str, ...]] = {
    "thinking": ("<think>", "</think>"),
    "fim": FIM_TOKENS,
    "chat": ("<｜User｜>", "<｜Assistant｜>"),
    "tools": (
        *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        *("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
        *("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"),
        *("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
        "<｜tool▁sep｜>",
    ),
}
"""Control tokens by kind, spelt as in the tokenizer of DeepSeek-V3 and R1. Ids are given in this
order, whatever the order in a config, as DeepSeek orders the kinds."""
DEEPSEEK_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n"
    r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+"
    "[\r\n]*"
    r"|\s*"
    "[\r\n]+"
    r"|\s+(?!\S)|\s+",
)
"""Words of DeepSeek-V3's `tokenizer.json`, each expression applied to what the one before left:
numbers of up to three digits, runs of Han characters and kana, and the rest. Line ends stand for
themselves, as there: what reads the file may compare it letter by letter."""


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """A tokenizer of at most `config.vocab_size` tokens: special ones, 256 bytes, then merges.

    With the pre-tokenizer "digits" each digit is a token of its own, so that columns of numbers
    stay aligned and encode(prompt + answer) = encode(prompt) + encode(answer) at any digit. Every
    byte is in the vocabulary: no text is out of reach, however small the sample. `encode` puts
    begin-of-text in front unless told otherwise, and text that spells a special token stays text.
    """
    special = special_tokens(config.special_tokens)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer(config)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return begin_texts(tokenizer)


def special_tokens(kinds: Collection[str]) -> tuple[str, ...]:
    """The special tokens of a tokenizer with these kinds of them, in the order of their ids."""
    asked = (tokens for kind, tokens in CONTROL_TOKENS.items() if kind in kinds)
    return (BOS_TOKEN, EOS_TOKEN, *(token for tokens in asked for token in tokens))


def fim_ids(tokenizer: Tokenizer, fim_rate: float) -> tuple[int, int, int]:
    """The ids of `FIM_TOKENS`; DataError if the tokenizer lacks one, naming the rate that asks."""
    begin, hole, end = (tokenizer.token_to_id(token) for token in FIM_TOKENS)
    if begin is None or hole is None or end is None:
        raise DataError(
            f"data.pack.fim_rate = {fim_rate}: the tokenizer lacks one of {', '.join(FIM_TOKENS)}; "
            'put "fim" among data.tokenizer.special_tokens, name a file that has them, or set 0'
        )
    return begin, hole, end


def sample(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Texts from the front until they hold `max_bytes`; the last one is cut."""
    left_bytes = max_bytes
    for text in texts:
        if left_bytes <= 0:
            return
        yield text[:left_bytes]
        left_bytes -= len(text.encode())


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Int32]:
    """The token ids of each text, without special tokens."""
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


def _pre_tokenizer(config: TokenizerConfig) -> pre_tokenizers.PreTokenizer:
    """What parts a text into the words that merges stay inside."""
    match config.pre_tokenizer:
        case "digits":
            return pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
                ]
            )
        case "deepseek":
            return pre_tokenizers.Sequence(
                [
                    *(pre_tokenizers.Split(Regex(each), "isolated") for each in DEEPSEEK_SPLITS),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
