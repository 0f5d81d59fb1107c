"""Tokenizers made elsewhere, and what every tokenizer of this line must have."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from configs.errors import DataError
from stages.shards import BOS_ID, EOS_ID


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer made elsewhere, told to read text as those made here do.

    DataError if it cannot be read, or does not keep the tokens 0 and 1 for framing documents.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_str(json.dumps(record))
        special = {token["id"] for token in record["added_tokens"] if token["special"]}
    except Exception as error:
        # The library raises plain Exceptions for what it cannot parse.
        raise DataError(f"{path}: not a tokenizer: {error}; name another") from None
    if missing := {BOS_ID, EOS_ID} - special:
        raise DataError(
            f"{path}: token {min(missing)} is {tokenizer.id_to_token(min(missing))!r}, which is "
            f"not special, but tokens {BOS_ID} and {EOS_ID} begin and end documents; use a "
            "tokenizer that keeps them for that"
        )
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the highest id, added tokens and gaps included."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def frame_texts(path: str | Path) -> tuple[str, str]:
    """How the tokenizer in a `tokenizer.json` spells the tokens that begin and end a document."""
    tokenizer = Tokenizer.from_file(str(path))
    return str(tokenizer.id_to_token(BOS_ID)), str(tokenizer.id_to_token(EOS_ID))
