"""Promises of bulk encoding; those of gigatoken are checked where it is installed."""

import copy
import json
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from configs.data import TokenizerConfig
from stages.data import bulk
from stages.data.bulk import bulk_encoder
from stages.data.tokenizer import CONTROL_TOKENS, Int32, encode, special_tokens, train_tokenizer

TEXTS = [
    "def first(values):\n    return values[0]  # 2024-01-31\n",
    "the other one, the same 日本語のテキスト\n",
    "naïve Ünï 12345 «quoted»\r\n",
] * 9
CONFIG = TokenizerConfig(
    vocab_size=500, pre_tokenizer="deepseek", special_tokens=("chat", "thinking", "tools", "fim")
)
TOKENIZER = train_tokenizer(TEXTS, CONFIG)
RECORD: dict[str, Any] = json.loads(TOKENIZER.to_str())
SPELT = special_tokens(CONTROL_TOKENS)


class Imitation:
    """What a library called gigatoken does, by `tokenizers`, with what is set to go wrong."""

    def __init__(self, record: str, *, lower: bool = False) -> None:
        self._tokenizer, self._lower = Tokenizer.from_str(record), lower
        self.asked: list[str] = []

    def encode_batch(self, texts: list[str]) -> Any:
        self.asked += texts
        texts = [text.lower() if self._lower else text for text in texts]
        # It makes control tokens of text, as the library does.
        self._tokenizer.encode_special_tokens = False
        found = [np.array(ids, dtype=np.uint32) for ids in encode(self._tokenizer, texts)]
        ends = np.cumsum([0, *map(len, found)])
        return _Ragged(ends, np.concatenate([np.empty(0, dtype=np.uint32), *found]))


class _Buffer:
    def __init__(self, data: Any) -> None:
        self.data = data


class _Layout:
    def __init__(self, offsets: Any, content: Any) -> None:
        self.offsets, self.content = _Buffer(offsets), _Buffer(content)


class _Ragged:
    def __init__(self, offsets: Any, content: Any) -> None:
        self.layout = _Layout(offsets, content)


@pytest.fixture
def imitated(monkeypatch: pytest.MonkeyPatch) -> list[Imitation]:
    return imitate(monkeypatch, Imitation)


def imitate(monkeypatch: pytest.MonkeyPatch, make: Callable[[str], Imitation]) -> list[Imitation]:
    """Those that were loaded since, with `make` in the library's place."""
    made: list[Imitation] = []

    class Library:
        class Tokenizer:
            @staticmethod
            def from_json(record: str) -> Imitation:
                made.append(make(record))
                return made[-1]

    monkeypatch.setattr(bulk, "_gigatoken", Library)
    return made


def same(found: Sequence[Int32], texts: Sequence[str], tokenizer: Tokenizer = TOKENIZER) -> bool:
    expected = encode(tokenizer, texts)
    assert len(found) == len(expected)
    assert all(one.dtype == np.int32 for one in found)
    return all(map(np.array_equal, found, expected))


def test_tokenizers_encode_unless_something_else_is_asked_for(imitated: list[Imitation]) -> None:
    encoder, said = bulk_encoder(RECORD, TOKENIZER, "tokenizers", TEXTS)
    assert said == "tokenizers encodes, as data.tokenizer.encoder says"
    assert same(encoder(TEXTS), TEXTS)
    assert imitated == []


def test_without_the_library_tokenizers_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "_gigatoken", None)
    encoder, said = bulk_encoder(RECORD, TOKENIZER, "gigatoken", TEXTS)
    assert "not gigatoken: it is not installed; pip install 'ingot[gigatoken]'" in said
    assert same(encoder(TEXTS), TEXTS)


def test_the_library_encodes_where_it_agrees(imitated: list[Imitation]) -> None:
    encoder, said = bulk_encoder(RECORD, TOKENIZER, "gigatoken", TEXTS)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert said.startswith(
        f"gigatoken encodes: it agrees with tokenizers on {len(TEXTS)} documents of {num_bytes} by"
    )
    (one,) = imitated
    one.asked.clear()
    assert same(encoder(["ab", "", "日本"]), ["ab", "", "日本"])
    assert one.asked == ["ab", "", "日本"]
    assert encoder([]) == []


def test_text_that_spells_an_added_token_is_never_given_to_the_library(
    imitated: list[Imitation],
) -> None:
    encoder, said = bulk_encoder(RECORD, TOKENIZER, "gigatoken", [f"a {SPELT[0]}", "abc"])
    assert "on 1 documents of 3 bytes" in said
    imitated[0].asked.clear()
    texts = [text for spelt in SPELT for text in (f"a{spelt}b", spelt[:-1], "<", spelt)]
    assert same(encoder(texts), texts)
    assert set(imitated[0].asked) == {"<", *(spelt[:-1] for spelt in SPELT)}


def test_characters_that_are_new_to_unicode_are_never_given_to_the_library(
    imitated: list[Imitation],
) -> None:
    encoder, _ = bulk_encoder(RECORD, TOKENIZER, "gigatoken", [])
    imitated[0].asked.clear()
    new = ["\u0378", "a \U00010efb", "\ufffe", "\U000e0000"]
    texts = [*new, "é", *new, "\ue000 private"]
    assert same(encoder(texts), texts)
    assert imitated[0].asked == ["é", "\ue000 private"]


def test_what_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    imitate(monkeypatch, lambda record: Imitation(record, lower=True))
    encoder, said = bulk_encoder(RECORD, TOKENIZER, "gigatoken", ["abc"])
    assert "not gigatoken: it encodes 'Plain words, " in said and "otherwise" in said
    assert same(encoder(["ABC"]), ["ABC"])


def test_the_documents_to_check_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "_PROBES", ("abc",))
    imitate(monkeypatch, lambda record: Imitation(record, lower=True))
    _, agreed = bulk_encoder(RECORD, TOKENIZER, "gigatoken", ["abc", "def"])
    assert agreed.startswith("gigatoken encodes")
    _, said = bulk_encoder(RECORD, TOKENIZER, "gigatoken", ["abc", "Def"])
    assert said == "tokenizers encodes, not gigatoken: it encodes 'Def' otherwise"


def test_a_refusal_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(record: str) -> Imitation:
        raise RuntimeError("Unknown regexes\n\nLocation:\n    hf.rs")

    imitate(monkeypatch, refuse)
    encoder, said = bulk_encoder(RECORD, TOKENIZER, "gigatoken", TEXTS)
    assert said.endswith("not gigatoken: it refuses the tokenizer (Unknown regexes)")
    assert same(encoder(TEXTS), TEXTS)


def _digits_first(record: dict[str, Any]) -> None:
    parts = record["pre_tokenizer"]["pretokenizers"]
    parts.insert(0, {"type": "Digits", "individual_digits": True})


def _removed(record: dict[str, Any]) -> None:
    record["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed"


def _inverted(record: dict[str, Any]) -> None:
    record["pre_tokenizer"]["pretokenizers"][1]["invert"] = True


def _literal(record: dict[str, Any]) -> None:
    record["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"String": "1"}


def _words_twice(record: dict[str, Any]) -> None:
    record["pre_tokenizer"]["pretokenizers"][-1]["use_regex"] = True


def _prefix_space(record: dict[str, Any]) -> None:
    record["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True


def _no_words(record: dict[str, Any]) -> None:
    record["pre_tokenizer"] = None


def _bytes_alone(record: dict[str, Any]) -> None:
    record["pre_tokenizer"] = record["pre_tokenizer"]["pretokenizers"][-1]


def _lower(record: dict[str, Any]) -> None:
    record["normalizer"] = {"type": "Lowercase"}


def _several(record: dict[str, Any]) -> None:
    record["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}


def _dropout(record: dict[str, Any]) -> None:
    record["model"]["dropout"] = 0.5


FORMS = [_digits_first, _removed, _inverted, _literal, _words_twice, _prefix_space, _no_words]


@pytest.mark.parametrize("change", [*FORMS, _bytes_alone, _lower, _several, _dropout])
def test_what_the_library_would_overlook_is_not_asked_of_it(
    change: Callable[[dict[str, Any]], None], imitated: list[Imitation]
) -> None:
    record = copy.deepcopy(RECORD)
    change(record)
    tokenizer = Tokenizer.from_str(json.dumps(record))
    encoder, said = bulk_encoder(record, tokenizer, "gigatoken", [])
    assert said.startswith("tokenizers encodes, not gigatoken: it")
    assert imitated == []
    if change is not _dropout:
        assert same(encoder(TEXTS), TEXTS, tokenizer)


def test_an_empty_normalizer_is_none(imitated: list[Imitation]) -> None:
    record = {**RECORD, "normalizer": {"type": "Sequence", "normalizers": []}}
    assert bulk_encoder(record, TOKENIZER, "gigatoken", [])[1].startswith("gigatoken encodes")


def test_the_cache_begins_anew_now_and_then(
    monkeypatch: pytest.MonkeyPatch, imitated: list[Imitation]
) -> None:
    encoder, _ = bulk_encoder(RECORD, TOKENIZER, "gigatoken", [])
    monkeypatch.setattr(bulk, "_RENEWAL_CHARS", 1000)
    for _ in range(5):
        assert same(encoder(["x" * 600]), ["x" * 600])
    assert len(imitated) == 3


@pytest.fixture(scope="module")
def real() -> Callable[[Sequence[str]], list[Int32]]:
    pytest.importorskip("gigatoken")
    encoder, said = bulk_encoder(RECORD, TOKENIZER, "gigatoken", TEXTS)
    assert said.startswith("gigatoken encodes: it agrees with tokenizers on 27 documents")
    return encoder


@given(st.lists(st.text(max_size=40), max_size=4))
def test_the_real_library_encodes_any_text_alike(
    real: Callable[[Sequence[str]], list[Int32]], texts: list[str]
) -> None:
    assert same(real(texts), texts)


def test_the_real_library_encodes_every_character_alike(
    real: Callable[[Sequence[str]], list[Int32]],
) -> None:
    # Of the great alphabets, whose characters are all alike, every 64th is enough.
    codes = [
        code
        for code in range(0x110000)
        if not 0xD800 <= code < 0xE000
        and (code % 64 == 0 or unicodedata.category(chr(code)) not in ("Lo", "Cn", "Co"))
    ]
    texts = [f" {c} a{c}b {c}{c}\n\n{c}1" for c in map(chr, codes)]
    assert len(texts) > 20_000
    assert same(real(texts), texts)


def test_the_real_library_makes_no_control_token_of_text(
    real: Callable[[Sequence[str]], list[Int32]],
) -> None:
    texts = [f"a {spelt} b" for spelt in SPELT]
    assert same(real(texts), texts)
    assert min(int(ids.min()) for ids in real(texts)) >= len(SPELT)


def test_the_real_library_refuses_what_it_does_not_know() -> None:
    pytest.importorskip("gigatoken")
    record = copy.deepcopy(RECORD)
    record["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\p{N}{1,2}"}
    tokenizer = Tokenizer.from_str(json.dumps(record))
    encoder, said = bulk_encoder(record, tokenizer, "gigatoken", TEXTS)
    assert said.startswith("tokenizers encodes, not gigatoken: it refuses the tokenizer (Unknown")
    assert "\n" not in said
    assert same(encoder(TEXTS), TEXTS, tokenizer)
