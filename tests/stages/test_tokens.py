"""Tokenizers made elsewhere read text as those made here do, or are refused."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from configs.data import TokenizerConfig
from configs.errors import DataError
from stages.data.tokenizer import train_tokenizer
from stages.shards import EOS_TOKEN
from stages.tokens import frame_texts, read_tokenizer, vocabulary_size

TEXTS = ["def first(values):\n    return values[0]  # 2024-01-31\n", "the other one, the same\n"]


def test_a_tokenizer_made_elsewhere_reads_text_as_one_made_here(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    made = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=280))
    made.save(str(path))
    taken = read_tokenizer(path)
    for text in [*TEXTS, f"a {EOS_TOKEN} b", "日本 42"]:
        assert taken.encode(text).ids == made.encode(text).ids
    assert vocabulary_size(taken) == made.get_vocab_size()


def test_a_vocabulary_with_gaps_is_as_large_as_its_highest_id() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 9}, merges=[]))
    assert tokenizer.get_vocab_size() == 2
    assert vocabulary_size(tokenizer) == 10


def test_the_tokens_that_frame_documents_are_spelt_as_their_tokenizer_does(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    made = Tokenizer(models.BPE(vocab={"<begin>": 0, "<end>": 1, "x": 2}, merges=[]))
    made.add_special_tokens(["<begin>", "<end>"])
    made.save(str(path))
    assert frame_texts(path) == ("<begin>", "<end>")


@pytest.mark.parametrize(
    ("special", "message"),
    [([], "token 0 is 'a', which is not special"), (["a"], "token 1 is 'b', which is not")],
)
def test_a_tokenizer_that_keeps_no_tokens_for_framing_is_refused(
    tmp_path: Path, special: list[str], message: str
) -> None:
    made = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    made.add_special_tokens(special)
    made.save(str(tmp_path / "plain.json"))
    with pytest.raises(DataError, match=message):
        read_tokenizer(tmp_path / "plain.json")


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    for body in ("{", "[]", '{"model": {}}'):
        (tmp_path / "none.json").write_text(body)
        with pytest.raises(DataError, match=r"none\.json: not a tokenizer"):
            read_tokenizer(tmp_path / "none.json")
