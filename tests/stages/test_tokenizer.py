"""Promises of the tokenizer."""

import os
import random
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from configs.data import TokenizerConfig
from configs.errors import DataError
from stages.data.reads import identify_tokenizer
from stages.data.tokenizer import encode, sample, train_tokenizer
from stages.evaluate.text import byte_lengths
from stages.framing import BOS_ID, BOS_TOKEN, EOS_ID, EOS_TOKEN
from stages.hashing import Hashes

TEXTS = [
    "def first(values):\n    return values[0]  # 2024-01-31\n",
    "the other one, the same\n",
] * 9
TOKENIZER = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=280))


def ids(text: str) -> list[int]:
    return [int(token) for token in encode(TOKENIZER, [text])[0]]


@given(st.text(max_size=50))
def test_every_text_comes_back_whole(text: str) -> None:
    assert TOKENIZER.decode(ids(text), skip_special_tokens=False) == text


@pytest.fixture(scope="module")
def lengths(tmp_path_factory: pytest.TempPathFactory) -> npt.NDArray[np.int64]:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    TOKENIZER.save(str(path))
    return byte_lengths(path)


@given(st.text(max_size=50))
def test_byte_lengths_add_up_to_the_text(lengths: npt.NDArray[np.int64], text: str) -> None:
    assert int(lengths[ids(text)].sum()) == len(text.encode())


def test_the_special_tokens_have_the_ids_that_everyone_assumes() -> None:
    assert TOKENIZER.token_to_id(BOS_TOKEN) == BOS_ID == 0
    assert TOKENIZER.token_to_id(EOS_TOKEN) == EOS_ID == 1


def test_text_that_spells_a_special_token_does_not_become_one() -> None:
    for token in (BOS_TOKEN, EOS_TOKEN):
        assert not {BOS_ID, EOS_ID} & set(ids(f"a {token} b"))


def test_every_digit_is_a_token_of_its_own() -> None:
    text = "on 2024-01-31, 12345678 times"
    digits = [TOKENIZER.decode([one]) for one in ids(text)]
    assert [one for one in digits if any(map(str.isdigit, one))] == list("2024013112345678")


@given(st.integers(0, 999), st.sampled_from("+-*"), st.integers(0, 999), st.integers(0, 999))
def test_a_prompt_and_its_answer_are_encoded_alike_apart_and_together(
    left: int, sign: str, right: int, answer: int
) -> None:
    prompt = f"{left}{sign}{right}="
    assert ids(f"{prompt}{answer}") == ids(prompt) + ids(str(answer))


def test_the_vocabulary_keeps_to_its_bound_and_holds_every_byte() -> None:
    assert TOKENIZER.get_vocab_size() == 280
    tiny = train_tokenizer(["ab"], TokenizerConfig(vocab_size=1024))
    assert 258 <= tiny.get_vocab_size() <= 260
    assert tiny.decode(encode(tiny, ["日本 ✓"])[0].tolist()) == "日本 ✓"


def test_merges_make_familiar_text_shorter() -> None:
    assert len(ids(TEXTS[1])) < 0.6 * len(TEXTS[1])


def test_equal_samples_make_equal_tokenizers() -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(["ab", "ba", "abc", "cab"], k=50)) for _ in range(20)]
    config = TokenizerConfig(vocab_size=290)
    first, second = (train_tokenizer(texts, config).to_str() for _ in range(2))
    assert first == second


def test_the_saved_tokenizer_encodes_as_the_trained_one(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [loaded.encode(text).ids for text in TEXTS] == [[BOS_ID, *ids(t)] for t in TEXTS]


def test_the_sample_stops_at_its_budget() -> None:
    assert list(sample(["abcd", "efgh", "ijkl"], 6)) == ["abcd", "ef"]
    assert list(sample(["abcd"], 100)) == ["abcd"]


@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(DataError, match=r"pipe\.json': cannot be read \(not a regular file\)"):
        identify_tokenizer(TokenizerConfig(file=str(tmp_path / "pipe.json")), Hashes())


def test_a_tokenizer_enters_identity_by_content(tmp_path: Path) -> None:
    assert identify_tokenizer(TokenizerConfig(), Hashes()) == {}
    path = tmp_path / "mine.json"
    path.write_text("one")
    first = identify_tokenizer(TokenizerConfig(file=str(path)), Hashes())
    assert first["tokenizer.json"]["bytes"] == 3
    path.write_text("two")
    assert identify_tokenizer(TokenizerConfig(file=str(path)), Hashes()) != first
    with pytest.raises(DataError, match=r"data\.tokenizer\.file = .*cannot be read"):
        identify_tokenizer(TokenizerConfig(file=str(tmp_path / "none.json")), Hashes())
