"""Trains the byte-level BPE tokenizer or takes one that exists, and encodes with it."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from configs.data import TokenizerConfig
from stages.framing import BOS_TOKEN, EOS_TOKEN
from stages.tokens import begin_texts

Int32 = npt.NDArray[np.int32]


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """A tokenizer of at most `config.vocab_size` tokens: two special, 256 bytes, then merges.

    Each digit is a token of its own, so that columns of numbers stay aligned and
    encode(prompt + answer) = encode(prompt) + encode(answer) at any digit. Every byte is in the
    vocabulary: no text is out of reach, however small the sample. `encode` puts begin-of-text in
    front unless told otherwise, and text that spells a special token stays text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return begin_texts(tokenizer)


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
