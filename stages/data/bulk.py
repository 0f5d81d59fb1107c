"""Encodes text in bulk, with gigatoken where that is known to give what `tokenizers` gives.

gigatoken (MIT) is tens of times as fast, and differs in ways that an equality check on samples may
miss. It takes some pre-tokenizers for others that it knows; it makes a control token of text that
spells one; its table of characters can be of another Unicode version; and its cache of words never
shrinks. So it is asked only for tokenizers of one form, and never for a text that spells an added
token or has a character that is new to Unicode; and it begins anew now and then.
"""

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from tokenizers import Regex, Tokenizer, pre_tokenizers

from stages.data.tokenizer import Int32, encode

_gigatoken: Any
try:
    import gigatoken as _found

    _gigatoken = _found
except ImportError:
    _gigatoken = None

_RENEWAL_CHARS = 256_000_000
"""After so much text gigatoken begins anew: its cache takes up to five times the bytes of text that
repeats no word. Loading takes a tenth of a second, a full cache is two or three times as fast."""
_STRANGE = pre_tokenizers.Split(Regex(r"\P{Cn}+"), "removed")
"""Leaves of a text the characters that `tokenizers` knows no category of."""
_PROBES = (
    "Plain words, 12 + 34 = 46; 1234567 and 3.14159,\tx==y[0]!='%s'\r\n\r\n\n  indented  \n",
    "don't I'LL we've  double  spaces   \u00a0\u2003\u3000 and trailing   ",
    "Ünï é e\u0301 n\u0303o ﬁ Ａ１ ½ ² Ⅷ İ ß ǅ ١٢٣٤ 一二三四五 Ελληνικά Русский עִבְרִית العَرَبِيَّة",
    "日本語のテキスト、漢字とカタカナ。한국어 텍스트 ไทย हिन्दी 12時30分 龦 㐀 𠀀",
    "“quotes” – dashes … 🙂👩‍👩‍👧 €£¥ ←→ ∑√∞ «x» ©®™ \u200b\ufeff\u0000\u0007\u0085\u2028",
    "snake_case(x)[0] != \\n //comment #include <a.h> $HOME/.bashrc `code` ~/x {a:b} <p class='q'>",
    "",
)
"""Texts of which two tokenizers that differ encode one differently, in all likelihood."""

Encoder = Callable[[Sequence[str]], list[Int32]]
"""Token ids of each text, without special tokens."""


def bulk_encoder(
    record: Mapping[str, Any],
    tokenizer: Tokenizer,
    kind: Literal["tokenizers", "gigatoken"],
    check: Sequence[str],
) -> tuple[Encoder, str]:
    """What encodes as `encode(tokenizer, texts)` does, and one line on what that is and why.

    `record` is the `tokenizer.json` of `tokenizer`. gigatoken has to be asked for by `kind`, be
    installed, take the tokenizer, and agree on every text of `check`; else `tokenizers` encodes.
    """

    def plain(texts: Sequence[str]) -> list[Int32]:
        return encode(tokenizer, texts)

    if kind == "tokenizers":
        return plain, "tokenizers encodes, as data.tokenizer.encoder says"
    instead = "tokenizers encodes, not gigatoken:"
    if _gigatoken is None:
        return plain, f"{instead} it is not installed; pip install 'ingot[gigatoken]'"
    if refusal := _refusal(record):
        return plain, f"{instead} {refusal}"
    try:
        fast = _Gigatoken(record, tokenizer)
    except Exception as error:
        # The library raises plain errors for what it cannot load, of several lines.
        said = (str(error).splitlines() or [type(error).__name__])[0]
        return plain, f"{instead} it refuses the tokenizer ({said})"
    if difference := _difference(fast, tokenizer, [*_PROBES, *check]):
        return plain, f"{instead} {difference}"
    asked = [text for text in check if not fast.is_risky(text)]
    num_bytes = sum(len(text.encode()) for text in asked)
    return fast, (
        f"gigatoken encodes: it agrees with tokenizers on {len(asked)} documents of {num_bytes} "
        "bytes; what spells a control token is left to tokenizers"
    )


class _Gigatoken:
    """Encodes with gigatoken, and with `tokenizers` what gigatoken may read otherwise."""

    def __init__(self, record: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._record = json.dumps(record)
        self._added = tuple(token["content"] for token in record["added_tokens"])
        # Hundreds of added tokens begin in a few ways, which are faster to look for.
        self._starts = tuple(sorted({spelt[:2] for spelt in self._added}))
        self._known: set[str] = set()
        self._fast = _gigatoken.Tokenizer.from_json(self._record)
        self._chars = 0

    def __call__(self, texts: Sequence[str]) -> list[Int32]:
        risky = [self.is_risky(text) for text in texts]
        plain = iter(encode(self._tokenizer, [t for t, r in zip(texts, risky, strict=True) if r]))
        fast = self._encode([t for t, r in zip(texts, risky, strict=True) if not r])
        return [next(plain) if one else next(fast) for one in risky]

    def is_risky(self, text: str) -> bool:
        """Whether a text spells an added token or has a character that is new to Unicode."""
        if any(start in text for start in self._starts) and any(s in text for s in self._added):
            return True
        return not text.isascii() and self._has_new_characters(text)

    def _has_new_characters(self, text: str) -> bool:
        """Whether Python or `tokenizers` knows no category of a character.

        gigatoken 0.10 has Unicode 17, where tokenizers 0.23 has 16.
        """
        if not (unseen := set(text) - self._known):
            return False
        if any(unicodedata.category(character) == "Cn" for character in unseen):
            return True
        if _STRANGE.pre_tokenize_str("".join(sorted(unseen))):
            return True
        self._known |= unseen
        return False

    def _encode(self, texts: list[str]) -> Iterator[Int32]:
        if self._chars > _RENEWAL_CHARS:
            self._fast, self._chars = _gigatoken.Tokenizer.from_json(self._record), 0
        self._chars += sum(map(len, texts))
        # A ragged array: the tokens of all texts end to end, and where each begins.
        ragged = self._fast.encode_batch(texts).layout
        starts = np.asarray(ragged.offsets.data).tolist()
        token_ids = np.asarray(ragged.content.data).astype(np.int32)
        for start, end in pairwise(starts):
            yield token_ids[start:end]


def _refusal(record: Mapping[str, Any]) -> str:
    """Why gigatoken is not asked to load a tokenizer; nothing if it is.

    It overlooks settings of a pre-tokenizer, so the form is compared here; whether it knows the
    expressions it says itself.
    """
    parts = (record.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    *splits, last = parts
    is_known_form = bool(splits) and all(map(_is_plain_split, splits)) and _is_bytes(last)
    if not is_known_form:
        return "its pre-tokenizer is not made of words split by expressions and then bytes"
    if (record.get("normalizer") or {}).get("normalizers", record.get("normalizer")):
        return "it has a normalizer"
    if record["model"].get("dropout"):
        return "it has dropout"
    return ""


def _is_plain_split(part: Mapping[str, Any]) -> bool:
    return (
        part.get("type") == "Split"
        and "Regex" in part["pattern"]
        and part["behavior"] == "Isolated"
        and not part["invert"]
    )


def _is_bytes(part: Mapping[str, Any]) -> bool:
    is_bytes = part.get("type") == "ByteLevel"
    return is_bytes and not part["add_prefix_space"] and part.get("use_regex") is False


def _difference(fast: Encoder, tokenizer: Tokenizer, texts: Sequence[str]) -> str:
    """The first text that is encoded otherwise; nothing if there is none."""
    pairs = zip(texts, fast(texts), encode(tokenizer, texts), strict=True)
    for text, found, expected in pairs:
        if not np.array_equal(found, expected):
            return f"it encodes {text[:40]!r} otherwise"
    return ""
