"""Tokenizers made elsewhere read text as those made here do, or are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from configs.data import TokenizerConfig
from configs.errors import ArtifactError, DataError
from stages.data.tokenizer import encode, train_tokenizer
from stages.framing import BOS_ID, BOS_TOKEN, EOS_ID, EOS_TOKEN
from stages.tokens import (
    adopt_tokenizer,
    begin_texts,
    frame_texts,
    load_tokenizer,
    vocabulary_size,
    write_tokenizer,
)

TEXTS = ["def first(values):\n    return values[0]  # 2024-01-31\n", "the other one, the same\n"]
HARD = [*TEXTS, f"a {EOS_TOKEN} b", f"{BOS_TOKEN}c", "日本 42", " two  spaces ", "Ａ ﬁ e\u0301"]


@pytest.fixture
def made() -> Tokenizer:
    return train_tokenizer(TEXTS, TokenizerConfig(vocab_size=280))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokenizer.json"


def changed(made: Tokenizer, path: Path, **fields: Any) -> Path:
    """`made` on disk, with other values in some fields of its file."""
    path.write_text(json.dumps(json.loads(made.to_str()) | fields))
    return path


def plain(tokenizer: Tokenizer) -> list[list[int]]:
    return [one.tolist() for one in encode(tokenizer, HARD)]


def test_a_tokenizer_made_elsewhere_reads_text_as_one_made_here(
    made: Tokenizer, path: Path
) -> None:
    made.save(str(path))
    taken = adopt_tokenizer(path, vocab_size=280)
    assert plain(taken.tokenizer) == plain(made)
    assert taken.said == ()
    assert taken.record == json.loads(made.to_str())
    assert vocabulary_size(taken.tokenizer) == made.get_vocab_size()
    write_tokenizer(path, taken.record)
    assert plain(load_tokenizer(path)) == plain(made)


def test_encode_begins_every_text_as_training_does(made: Tokenizer) -> None:
    for text, ids in zip(HARD, plain(made), strict=True):
        assert made.encode(text).ids == [BOS_ID, *ids]
        assert made.encode(text, add_special_tokens=False).ids == ids
    assert made.encode("a", "b").ids == [0, *plain_ids(made, "a"), 0, *plain_ids(made, "b")]


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def test_padding_truncation_and_dropout_are_settings_and_switched_off(
    made: Tokenizer, path: Path
) -> None:
    expected = plain(made)
    made.enable_padding(length=64, pad_id=EOS_ID, pad_token=EOS_TOKEN)
    made.enable_truncation(max_length=4)
    record = json.loads(made.to_str())
    changed(made, path, model=record["model"] | {"dropout": 0.5})
    taken = adopt_tokenizer(path)
    assert plain(taken.tokenizer) == expected
    assert [line.split(" is switched off")[0] for line in taken.said] == [
        "its padding",
        "its truncation",
        "its dropout of 0.5",
    ]
    assert taken.record["padding"] is None
    assert taken.record["truncation"] is None
    assert taken.record["model"]["dropout"] is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: setattr(t, "normalizer", normalizers.NFKC()), "its normalizer changes text"),
        (lambda t: setattr(t, "normalizer", normalizers.Lowercase()), "into 'plain words,"),
        (lambda t: setattr(t, "normalizer", normalizers.Strip()), "its normalizer changes text"),
        (
            lambda t: setattr(
                t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
            ),
            "its way of encoding and decoding changes text, as 'Plain",
        ),
    ],
)
def test_what_changes_text_is_kept_and_said_aloud(
    made: Tokenizer, path: Path, change: Callable[[Tokenizer], None], said: str
) -> None:
    change(made)
    made.save(str(path))
    taken = adopt_tokenizer(path)
    (line,) = taken.said
    assert said in line
    assert taken.record["normalizer"] == json.loads(made.to_str())["normalizer"]


def test_a_normalizer_that_changes_nothing_is_not_worth_a_word(made: Tokenizer, path: Path) -> None:
    made.normalizer = normalizers.Sequence([])
    made.save(str(path))
    assert adopt_tokenizer(path).said == ()


def test_added_tokens_that_the_model_has_no_embedding_for_are_dropped_and_named(
    made: Tokenizer, path: Path
) -> None:
    made.add_special_tokens(["<|tool|>"])
    made.add_tokens([AddedToken("<think>", special=False)])
    made.save(str(path))
    assert vocabulary_size(made) == 282
    taken = adopt_tokenizer(path, vocab_size=280)
    (line,) = taken.said
    assert "its added tokens '<|tool|>', '<think>' are dropped" in line
    assert vocabulary_size(taken.tokenizer) == 280
    for text in ("<|tool|>", "<think>"):
        ids = plain_ids(taken.tokenizer, text)
        assert max(ids) < 280
        assert taken.tokenizer.decode(ids) == text
    assert adopt_tokenizer(path, vocab_size=282).said == ()


def test_words_beyond_the_models_vocabulary_are_refused(made: Tokenizer, path: Path) -> None:
    made.save(str(path))
    with pytest.raises(ArtifactError, match="has 280 tokens, but vocab_size = 279 in its config"):
        adopt_tokenizer(path, vocab_size=279)


def test_control_tokens_that_are_not_called_special_stay_text_too(
    made: Tokenizer, path: Path
) -> None:
    made.add_tokens([AddedToken("<｜User｜>", special=False), AddedToken("  ", special=False)])
    made.save(str(path))
    taken = adopt_tokenizer(path)
    ids = plain_ids(taken.tokenizer, "a<｜User｜>b  c")
    assert made.token_to_id("<｜User｜>") not in ids
    assert made.token_to_id("  ") in ids
    assert taken.tokenizer.decode(ids, skip_special_tokens=False) == "a<｜User｜>b  c"
    (line,) = taken.said
    assert "its control tokens '<｜User｜>' are not called special" in line
    # Its own file keeps its own word for it.
    (user,) = (one for one in taken.record["added_tokens"] if "User" in one["content"])
    assert user["special"] is False


@pytest.mark.parametrize(
    "old",
    [
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="$A </s>", pair=None, special_tokens=[("</s>", 1)]),
        processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single="<s> $A </s>", pair=None, special_tokens=[("<s>", 0), ("</s>", 1)]
                ),
            ]
        ),
        processors.RobertaProcessing(("</s>", 1), ("<s>", 0)),
    ],
)
def test_whatever_framed_texts_before_begin_of_text_does_now(
    made: Tokenizer, path: Path, old: Any
) -> None:
    made.post_processor = old
    made.save(str(path))
    taken = adopt_tokenizer(path)
    write_tokenizer(path, taken.record)
    served = Tokenizer.from_file(str(path))
    for text in TEXTS:
        assert served.encode(text).ids == [BOS_ID, *plain_ids(made, text)]
    framed = not isinstance(old, processors.ByteLevel)
    assert len(taken.said) == framed
    assert all("its post-processor, which framed texts otherwise" in line for line in taken.said)
    if isinstance(old, processors.ByteLevel | processors.Sequence):
        kept = taken.record["post_processor"]["processors"][0]
        assert (kept["type"], kept["trim_offsets"]) == ("ByteLevel", False)


def test_a_name_of_begin_of_text_with_signs_of_a_template_is_no_template(tmp_path: Path) -> None:
    names = ["<$A :0 begin>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    odd = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    odd.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    odd.add_special_tokens(names[:2])
    assert begin_texts(odd).encode("ab").ids[0] == BOS_ID


def test_a_vocabulary_with_gaps_is_as_large_as_its_highest_id() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 9}, merges=[]))
    assert tokenizer.get_vocab_size() == 2
    assert vocabulary_size(tokenizer) == 10


def test_the_tokens_that_frame_documents_are_spelt_as_their_tokenizer_does(path: Path) -> None:
    made = Tokenizer(models.BPE(vocab={"<begin>": 0, "<end>": 1, "x": 2}, merges=[]))
    made.add_special_tokens(["<begin>", "<end>"])
    made.save(str(path))
    assert frame_texts(path) == ("<begin>", "<end>")


@pytest.mark.parametrize(
    ("special", "message"),
    [([], "token 0 is 'a', which is not special"), (["a"], "token 1 is 'b', which is not")],
)
def test_a_tokenizer_that_keeps_no_tokens_for_framing_is_refused(
    path: Path, special: list[str], message: str
) -> None:
    made = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    made.add_special_tokens(special)
    made.save(str(path))
    with pytest.raises(DataError, match=message):
        adopt_tokenizer(path)


def test_what_is_no_tokenizer_is_refused(path: Path) -> None:
    for body in ("{", "[]", '{"model": {}}', '{"model": {"type": "BPE"}}'):
        path.write_text(body)
        with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
            adopt_tokenizer(path)


def test_a_git_lfs_pointer_is_named_with_its_remedy(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: .*git lfs pull"):
        adopt_tokenizer(path)


def test_a_byte_order_mark_is_no_part_of_a_tokenizer(made: Tokenizer, path: Path) -> None:
    path.write_text("\ufeff" + made.to_str(), encoding="utf-8")
    assert plain(adopt_tokenizer(path).tokenizer) == plain(made)
    assert plain(load_tokenizer(path)) == plain(made)


@pytest.mark.parametrize("added", [{"added_tokens": None}, {}, {"added_tokens": []}])
def test_a_tokenizer_may_have_no_added_tokens(
    made: Tokenizer, path: Path, added: dict[str, Any]
) -> None:
    record = json.loads(made.to_str())
    del record["added_tokens"]
    path.write_text(json.dumps(record | added))
    assert plain_ids(load_tokenizer(path), "ab") == plain_ids(made, "ab")
    with pytest.raises(DataError, match=r"which is not special, but tokens 0 and 1 begin"):
        adopt_tokenizer(path, vocab_size=280)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ({"id": "999"}, r"added_tokens\[1\]\.id = '999' is no whole number"),
        ({"id": None}, r"added_tokens\[1\]\.id = None is no whole number"),
        ({"id": True}, r"added_tokens\[1\]\.id = True is no whole number"),
        ({"content": 5}, r"added_tokens\[1\]\.content = 5 is no text"),
        ({"special": "yes"}, r"added_tokens\[1\]\.special = 'yes' is no truth value"),
        ("a", r"added_tokens\[1\] = 'a' is no table"),
    ],
)
def test_an_odd_added_token_is_named_by_its_place(
    made: Tokenizer, path: Path, token: Any, message: str
) -> None:
    first, second = json.loads(made.to_str())["added_tokens"]
    odd = second | token if isinstance(token, dict) else token
    changed(made, path, added_tokens=[first, odd])
    for read in (lambda: adopt_tokenizer(path, vocab_size=280), lambda: load_tokenizer(path)):
        with pytest.raises(DataError, match=rf"tokenizer\.json: not a tokenizer: {message}; mend"):
            read()


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({"a": "1"}, r"model\.vocab\['a'\] = '1' is no whole number"),
        ({"a": 1.0}, r"model\.vocab\['a'\] = 1\.0 is no whole number"),
        (5, r"model\.vocab = 5 is neither a table nor a list"),
        ({"a": -1}, "invalid value"),
    ],
)
def test_an_odd_vocabulary_is_named(
    made: Tokenizer, path: Path, vocabulary: Any, message: str
) -> None:
    changed(made, path, model=json.loads(made.to_str())["model"] | {"vocab": vocabulary})
    with pytest.raises(DataError, match=rf"tokenizer\.json: not a tokenizer: .*{message}"):
        adopt_tokenizer(path, vocab_size=280)


def test_added_tokens_are_a_list(made: Tokenizer, path: Path) -> None:
    with pytest.raises(DataError, match=r"added_tokens = \{'a': 1\} is no list; mend it, or name"):
        adopt_tokenizer(changed(made, path, added_tokens={"a": 1}))


def test_a_tokenizer_that_is_nested_without_end_is_refused(path: Path) -> None:
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="not a tokenizer"):
        adopt_tokenizer(path)


def test_a_missing_tokenizer_is_named(path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(path)
