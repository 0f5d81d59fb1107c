"""Promises of the tokenizer."""

import json
import os
import random
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from configs.data import SPECIAL_TOKENS, TokenizerConfig
from configs.errors import DataError
from stages.data.reads import identify_tokenizer
from stages.data.tokenizer import (
    CONTROL_TOKENS,
    FIM_TOKENS,
    encode,
    fim_ids,
    sample,
    special_tokens,
    train_tokenizer,
)
from stages.evaluate.text import byte_lengths
from stages.framing import BOS_ID, BOS_TOKEN, EOS_ID, EOS_TOKEN
from stages.hashing import Hashes
from stages.templates import compile_template, render
from stages.tokens import adopt_tokenizer, load_tokenizer

TEXTS = [
    "def first(values):\n    return values[0]  # 2024-01-31\n",
    "the other one, the same\n",
] * 9
TOKENIZER = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=280))


WORDS = train_tokenizer(
    [*TEXTS, "In 1984 it cost 12,500 yen.\n\n", "日本語のテキスト、漢字とかな。\n"] * 9,
    TokenizerConfig(
        vocab_size=400,
        pre_tokenizer="deepseek",
        special_tokens=("tools", "chat", "fim", "thinking"),
    ),
)
"""As DeepSeek's, with every kind of control token."""
ALL_SPECIAL = special_tokens(CONTROL_TOKENS)


def ids(text: str, tokenizer: Tokenizer = TOKENIZER) -> list[int]:
    return [int(token) for token in encode(tokenizer, [text])[0]]


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


def test_control_tokens_have_the_ids_after_end_of_text_whatever_the_order_of_their_kinds() -> None:
    assert ALL_SPECIAL[:4] == (BOS_TOKEN, EOS_TOKEN, "<think>", "</think>")
    assert ALL_SPECIAL[4:9] == (*FIM_TOKENS, "<｜User｜>", "<｜Assistant｜>")
    assert ALL_SPECIAL[9:11] == ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
    assert len(set(ALL_SPECIAL)) == len(ALL_SPECIAL) == 18
    assert [WORDS.token_to_id(token) for token in ALL_SPECIAL] == list(range(18))
    assert special_tokens(("chat", "thinking")) == (*ALL_SPECIAL[:4], *ALL_SPECIAL[7:9])
    assert fim_ids(WORDS, 0.1) == (4, 5, 6)
    with pytest.raises(DataError, match=r"data\.pack\.fim_rate = 0\.1: the tokenizer lacks"):
        fim_ids(TOKENIZER, 0.1)


def test_the_smallest_vocabulary_has_bytes_and_control_tokens_and_no_merges() -> None:
    config = TokenizerConfig(vocab_size=274, special_tokens=("tools", "chat", "fim", "thinking"))
    assert train_tokenizer(TEXTS, config).get_vocab_size() == 274


@given(st.lists(st.one_of(st.sampled_from(ALL_SPECIAL), st.text(max_size=5)), max_size=6))
def test_text_that_spells_control_tokens_stays_text(pieces: list[str]) -> None:
    text = "".join(pieces)
    found = ids(text, WORDS)
    assert min(found, default=18) >= 18
    assert WORDS.decode(found, skip_special_tokens=False) == text


def test_a_tokenizer_with_control_tokens_is_adopted_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    WORDS.save(str(path))
    adopted = adopt_tokenizer(path, vocab_size=WORDS.get_vocab_size())
    assert adopted.said == ()
    assert adopted.record == json.loads(WORDS.to_str())
    text = f"x {' '.join(ALL_SPECIAL)} 日本 1234"
    for tokenizer in (adopted.tokenizer, load_tokenizer(path)):
        assert ids(text, tokenizer) == ids(text, WORDS)
        assert tokenizer.encode(text).ids == [BOS_ID, *ids(text, WORDS)]


def test_what_a_chat_template_writes_can_be_read_as_control_tokens() -> None:
    template = compile_template(
        "{{ bos_token }}{% for m in messages %}<｜User｜>{{ m['content'] }}{% endfor %}"
        "<｜Assistant｜><think>",
        "a template",
    )
    asked = render(template, [{"role": "user", "content": "2+2"}], {"bos_token": BOS_TOKEN}, "it")
    reader = Tokenizer.from_str(WORDS.to_str())
    reader.encode_special_tokens = False
    found = reader.encode(asked, add_special_tokens=False).ids
    user, assistant, think = map(WORDS.token_to_id, ("<｜User｜>", "<｜Assistant｜>", "<think>"))
    assert found == [BOS_ID, user, *ids("2+2", WORDS), assistant, think]


def deepseek_words(text: str) -> list[str]:
    """Words by Python's own expressions, for texts of ASCII, kana and Han characters."""
    words: list[str] = []
    for number, other in re.findall(r"([0-9]{1,3})|([^0-9]+)", text):
        if number:
            words.append(number)
            continue
        for han, rest in re.findall("([一-龥぀-ゟ゠-ヿ]+)|([^一-龥぀-ゟ゠-ヿ]+)", other):
            words += [han] if han else _western_words(rest)
    return words


def _western_words(text: str) -> list[str]:
    sign = r"[!-/:-@\[-`{-~]"
    return re.findall(
        rf"{sign}[A-Za-z]+|[^\r\nA-Za-z!-/:-@\[-`{{-~]?[A-Za-z]+| ?{sign}+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        text,
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("on 2024-01-31", ["on", " ", "202", "4", "-", "01", "-", "31"]),
        ("f(x)\n  return", ["f", "(x", ")\n", " ", " return"]),
        ("日本語abc、かな", ["日本語", "abc", "、", "かな"]),
        ("e\u0301te\u0301 x+y", ["e\u0301te\u0301", " x", "+y"]),
        ("don't  stop", ["don", "'t", " ", " stop"]),
    ],
)
def test_words_are_those_of_deepseek(text: str, words: list[str]) -> None:
    assert pre_tokenized(text) == words


def pre_tokenized(text: str) -> list[str]:
    pre_tokenizer = WORDS.pre_tokenizer
    assert pre_tokenizer is not None
    return [text[start:end] for _, (start, end) in pre_tokenizer.pre_tokenize_str(text)]


@given(st.text(st.sampled_from("ab Z019'!.(_[]{}|`~\\\n\r\tかナ漢字"), max_size=30))
def test_words_are_parted_as_a_twin_of_pythons_expressions_parts_them(text: str) -> None:
    assert pre_tokenized(text) == deepseek_words(text)


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


def test_the_recipe_knows_how_many_control_tokens_there_are() -> None:
    assert {kind: len(tokens) for kind, tokens in CONTROL_TOKENS.items()} == SPECIAL_TOKENS
