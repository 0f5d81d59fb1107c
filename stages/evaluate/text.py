"""Bits per byte: how many bits a model needs for each byte of held-out text.

The number does not depend on the tokenizer, so models with different vocabularies compare.
Axes: B rows, S positions, V vocabulary.
"""

import json
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.errors import DataError
from stages.byte_level import alphabet
from stages.framing import BOS_ID
from stages.segments import segments_of

_TOKENS_PER_BATCH = 4096

Forward = Callable[[Tensor, Tensor], Tensor]
"""tokens_BS, segments_BS -> logits_BSV, float32."""


@dataclass(frozen=True, slots=True)
class TextScore:
    """The cost of some text: information content, size, and the number of tokens predicted."""

    bits: float
    bytes: int
    targets: int

    @property
    def bits_per_byte(self) -> float:
        """DataError if the text has no bytes."""
        if self.bytes == 0:
            raise DataError(f"held-out text: {self.targets} targets with 0 bytes; add text to it")
        return self.bits / self.bytes


def total(scores: Collection[TextScore]) -> TextScore:
    """All texts together."""
    return TextScore(
        bits=math.fsum(score.bits for score in scores),
        bytes=sum(score.bytes for score in scores),
        targets=sum(score.targets for score in scores),
    )


def byte_lengths(tokenizer_json: Path) -> NDArray[np.int64]:
    """Bytes of text that each token id stands for; special tokens stand for none.

    A byte-level vocabulary spells each byte as one character of a fixed alphabet of 256, so a
    token has as many bytes as characters. Tokens added to it are spelt as text. DataError if a
    token of the vocabulary itself uses any other character.
    """
    record = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = record["model"]["vocab"]
    added: dict[str, dict[str, Any]] = {token["content"]: token for token in record["added_tokens"]}
    known = alphabet()
    highest = max([*vocabulary.values(), *(token["id"] for token in added.values())])
    lengths = np.zeros(highest + 1, dtype=np.int64)
    for content, one in added.items():
        lengths[one["id"]] = 0 if one["special"] else len(content.encode())
    for token, token_id in vocabulary.items():
        if token in added:
            continue
        if strange := set(token) - known:
            raise DataError(
                f"{tokenizer_json}: token {token_id} {token!r} holds {sorted(strange)}, outside "
                "the byte-level alphabet; only byte-level tokenizers have exact byte counts"
            )
        lengths[token_id] = len(token)
    return lengths


def target_mask(rows_BS: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the S - 1 next tokens of each row are scored: all but begin-of-text.

    Where a document begins is the packer's doing, not text to predict.
    """
    mask: NDArray[np.bool_] = rows_BS[:, 1:] != BOS_ID
    return mask


def size(rows_BS: NDArray[np.int64], lengths_V: NDArray[np.int64]) -> tuple[int, int]:
    """Bytes and number of the scored targets of packed rows."""
    targets = rows_BS[:, 1:][target_mask(rows_BS)]
    return int(lengths_V[targets].sum()), len(targets)


def batches(rows_BS: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Consecutive rows, about 4096 tokens at a time, so that logits stay small."""
    step = max(1, _TOKENS_PER_BATCH // rows_BS.shape[1])
    for start in range(0, len(rows_BS), step):
        yield rows_BS[start : start + step]


def score_text(
    forward: Forward,
    rows_BS: NDArray[np.int64],
    lengths_V: NDArray[np.int64],
    *,
    device: str = "cpu",
) -> TextScore:
    """Score packed rows under teacher forcing; documents of a row do not see each other.

    `forward` is asked, and answers, on `device`; what it answers is added up on the host.

    DataError if the model's probabilities are not numbers.
    """
    nats = 0.0
    for batch_BS in batches(rows_BS):
        tokens_BS = torch.from_numpy(batch_BS).to(device)
        with torch.inference_mode():
            logits_BSV = forward(tokens_BS, segments_of(tokens_BS))
        mask = torch.from_numpy(target_mask(batch_BS)).to(device)
        nats_P = torch.nn.functional.cross_entropy(
            logits_BSV[:, :-1][mask].float(), tokens_BS[:, 1:][mask], reduction="none"
        )
        nats += float(nats_P.cpu().sum(dtype=torch.float64))
    if not math.isfinite(nats):
        raise DataError(f"held-out text costs {nats} nats; the checkpoint's weights are unusable")
    num_bytes, num_targets = size(rows_BS, lengths_V)
    return TextScore(bits=nats / math.log(2), bytes=num_bytes, targets=num_targets)
