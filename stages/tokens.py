"""Tokenizers: what every one of this line must have, and what is taken off one made elsewhere.

A document is read as begin-of-text (id 0), its text, end-of-text (id 1); text never becomes a
special token, even if it spells one. A `tokenizer.json` can say the first half of this, by a
post-processor that servers apply; the second it cannot say, so whoever loads it here sets it.
"""

import json
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from configs.errors import ArtifactError, DataError
from model.weights.reading import require_not_pointer
from stages.framing import BOS_ID, EOS_ID

_CONTROL = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)
"""Looks like a control token, whether or not its file calls it special."""
_ADDED: Mapping[str, tuple[type, str]] = {
    "id": (int, "whole number"),
    "content": (str, "text"),
    "special": (bool, "truth value"),
}
"""What is read of an added token, and what it must be."""
_PROBES = (
    "Plain words, 12 + 34 = 46.",
    "  leading,  double and trailing  ",
    "tab\there\nline\r\n\n  indented",
    "Ünï é e\u0301 ﬁ Ａ１ ½ İ",
    "日本語 漢字 한글 ไทย हिन्दी",
    "“quotes” – dashes … 🙂 👩‍👩‍👧",
    "snake_case(x)[0] != \\n // #comment",
)
"""Texts of which a tokenizer that changes any text changes one, in all likelihood."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`, reading text as the corpus was read.

    Text that spells a special token stays text: a prompt can neither end nor begin a document.
    Errors as of `adopt_tokenizer`.
    """
    return _parsed(Path(path), _read(Path(path)))


@dataclass(frozen=True, slots=True)
class Adopted:
    """A tokenizer made elsewhere, without the settings of whoever used it last."""

    tokenizer: Tokenizer
    """Reads text as those made here do."""
    record: Mapping[str, Any]
    """Its `tokenizer.json`, as this line and servers are to have it."""
    said: tuple[str, ...]
    """What was switched off or replaced, and what changes text; one line each."""


def adopt_tokenizer(path: Path, *, vocab_size: int | None = None) -> Adopted:
    """A tokenizer made elsewhere, for a model of `vocab_size` tokens if that is known.

    DataError if it cannot be read or does not keep the tokens 0 and 1 for framing documents,
    ArtifactError if it has words beyond the model's vocabulary, or is a pointer of git-lfs.
    """
    record = _read(path)
    said = [*_switch_off(record), *_drop_beyond(path, record, vocab_size)]
    tokenizer = _parsed(path, record)
    special = {token["id"] for token in record["added_tokens"] if token["special"]}
    if missing := {BOS_ID, EOS_ID} - special:
        raise DataError(
            f"{path}: token {min(missing)} is {tokenizer.id_to_token(min(missing))!r}, which is "
            f"not special, but tokens {BOS_ID} and {EOS_ID} begin and end documents; use a "
            "tokenizer that keeps them for that"
        )
    said += [*_begin_texts(record), *_uncalled(record), *_changes_of_text(tokenizer)]
    return Adopted(_reading_text(record), record, tuple(said))


def begin_texts(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, with `encode` putting begin-of-text in front unless told otherwise."""
    record = json.loads(tokenizer.to_str())
    for _ in _begin_texts(record):
        pass
    return _reading_text(record)


def served_record(path: Path) -> Mapping[str, Any]:
    """A `tokenizer.json` of the line's as servers are to have it, whoever wrote it."""
    record = _read(path)
    for _ in (*_switch_off(record), *_begin_texts(record)):
        pass
    return record


def read_record(path: Path) -> Mapping[str, Any]:
    """A `tokenizer.json` of the line's, as JSON values; errors as of `adopt_tokenizer`."""
    return _read(path)


def write_tokenizer(path: Path, record: Mapping[str, Any]) -> None:
    """Write a `tokenizer.json`."""
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the highest id, added tokens and gaps included."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def frame_texts(path: str | Path) -> tuple[str, str]:
    """How the tokenizer in a `tokenizer.json` spells the tokens that begin and end a document."""
    tokenizer = Tokenizer.from_file(str(path))
    return str(tokenizer.id_to_token(BOS_ID)), str(tokenizer.id_to_token(EOS_ID))


def _read(path: Path) -> dict[str, Any]:
    try:
        require_not_pointer(path)
        record = json.loads(path.read_text(encoding="utf-8-sig"))
    except ArtifactError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); make it readable") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a tokenizer: {error}; name another") from None
    if not isinstance(record, dict) or not isinstance(record.get("model"), dict):
        raise DataError(f"{path}: not a tokenizer: it has no table `model`; name another")
    # Where a tokenizer has no added tokens, its file may leave them out.
    record["added_tokens"] = [] if (added := record.get("added_tokens")) is None else added
    if fault := next(_faults(record), None):
        raise DataError(f"{path}: not a tokenizer: {fault}; mend it, or name another")
    return record


def _faults(record: Mapping[str, Any]) -> Iterator[str]:
    """What is not as it must be of the fields that are read here."""
    added, vocabulary = record["added_tokens"], record["model"].get("vocab")
    if not isinstance(added, list):
        yield f"added_tokens = {reprlib.repr(added)} is no list"
        return
    for place, token in enumerate(added):
        if not isinstance(token, dict):
            yield f"added_tokens[{place}] = {reprlib.repr(token)} is no table"
            continue
        for name, (kind, word) in _ADDED.items():
            if type(token.get(name)) is not kind:
                yield f"added_tokens[{place}].{name} = {reprlib.repr(token.get(name))} is no {word}"
    if isinstance(vocabulary, dict):
        yield from (
            f"model.vocab[{word!r}] = {reprlib.repr(number)} is no whole number"
            for word, number in vocabulary.items()
            if type(number) is not int
        )
    elif not isinstance(vocabulary, list | None):
        yield f"model.vocab = {reprlib.repr(vocabulary)} is neither a table nor a list"


def _parsed(path: Path, record: Mapping[str, Any]) -> Tokenizer:
    """`_reading_text` of what `path` holds; DataError if that is no tokenizer."""
    try:
        return _reading_text(record)
    except Exception as error:
        # The library raises plain Exceptions for what it cannot parse.
        raise DataError(f"{path}: not a tokenizer: {error}; name another") from None


def _reading_text(record: Mapping[str, Any]) -> Tokenizer:
    """A tokenizer of this record in which text stays text, whatever it spells."""
    added = [
        {**token, "special": token["special"] or _is_control(token)}
        for token in record["added_tokens"]
    ]
    tokenizer = Tokenizer.from_str(json.dumps({**record, "added_tokens": added}))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _is_control(token: Mapping[str, Any]) -> bool:
    """Whether an added token looks like a control token, whatever it is called."""
    return bool(_CONTROL.fullmatch(token["content"]))


def _uncalled(record: Mapping[str, Any]) -> Iterator[str]:
    """One line if clients cannot keep the text of some control tokens text."""
    if found := [
        token["content"]
        for token in record["added_tokens"]
        if _is_control(token) and not token["special"]
    ]:
        yield (
            f"its control tokens {_shown(found)} are not called special: text that spells them "
            "stays text in training, but becomes these tokens in every client, also with "
            "`split_special_tokens=True`"
        )


def _shown(tokens: list[str]) -> str:
    """The first of the tokens, as they are spelt."""
    return f"{', '.join(map(repr, tokens[:5]))}{', ...' if tokens[5:] else ''}"


def _switch_off(record: dict[str, Any]) -> Iterator[str]:
    """Take off what is a setting of the last user's, not part of the tokenizer."""
    for name, what in (
        ("padding", "would fill texts up with padding"),
        ("truncation", "would cut texts short"),
    ):
        if record.get(name):
            record[name] = None
            yield f"its {name} is switched off: it {what}"
    if record["model"].get("dropout"):
        yield (
            f"its dropout of {record['model']['dropout']} is switched off: equal texts are to be "
            "encoded equally"
        )
        record["model"]["dropout"] = None


def _drop_beyond(path: Path, record: dict[str, Any], vocab_size: int | None) -> Iterator[str]:
    """Take off added tokens that the model has no embedding for."""
    if vocab_size is None:
        return
    vocabulary = record["model"].get("vocab")
    words = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary or ()))
    if (highest := max(words, default=0)) >= vocab_size:
        raise ArtifactError(
            f"{path} has {highest + 1} tokens, but vocab_size = {vocab_size} in its config.json; "
            "put the model's own tokenizer there"
        )
    added = record["added_tokens"]
    beyond = [token["content"] for token in added if token["id"] >= vocab_size]
    if beyond:
        record["added_tokens"] = [token for token in added if token["id"] < vocab_size]
        yield (
            f"its added tokens {_shown(beyond)} are dropped: their ids are not below vocab_size = "
            f"{vocab_size}, so the model has no embedding for them; text that spells them is read "
            "as text"
        )


def _begin_texts(record: dict[str, Any]) -> Iterator[str]:
    """Have the post-processor put begin-of-text in front of a text, and nothing behind it."""
    tokenizer = Tokenizer.from_str(json.dumps(record))
    probe = _PROBES[0]
    plain = tokenizer.encode(probe, add_special_tokens=False).ids
    framed = tokenizer.encode(probe, add_special_tokens=True).ids
    if framed == [BOS_ID, *plain]:
        return
    begin = str(tokenizer.id_to_token(BOS_ID))
    first, second = ({"SpecialToken": {"id": begin, "type_id": i}} for i in (0, 1))
    one, other = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    template = {
        "type": "TemplateProcessing",
        "single": [first, one],
        "pair": [first, one, second, other],
        "special_tokens": {begin: {"id": begin, "ids": [BOS_ID], "tokens": [begin]}},
    }
    old = record.get("post_processor")
    kept = [part for part in _processors(old) if part["type"] == "ByteLevel"]
    record["post_processor"] = (
        {"type": "Sequence", "processors": [*kept, template]} if kept else template
    )
    if framed != plain:
        yield (
            f"its post-processor, which framed texts otherwise ({framed[:3]} ... {framed[-2:]}), "
            f"is replaced by one that puts {begin!r} in front, as training does"
        )


def _processors(found: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The single post-processors of one that may be a sequence, or none."""
    if found is None:
        return
    if found["type"] == "Sequence":
        for part in found["processors"]:
            yield from _processors(part)
    else:
        yield found


def _changes_of_text(tokenizer: Tokenizer) -> Iterator[str]:
    """One line if what is encoded is not the text that was given."""
    normalize: Callable[[str], str] = (
        tokenizer.normalizer.normalize_str if tokenizer.normalizer is not None else str
    )
    for probe in _PROBES:
        changed, by = normalize(probe), "normalizer"
        if changed == probe:
            ids = tokenizer.encode(probe, add_special_tokens=False).ids
            changed = tokenizer.decode(ids, skip_special_tokens=False)
            by = "way of encoding and decoding"
        if changed != probe:
            yield (
                f"its {by} changes text, as {probe!r} into {changed!r}; the model is trained and "
                "measured on the changed text"
            )
            return
