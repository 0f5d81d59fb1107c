"""Text that a Debian machine with Python has, as rows of jsonl, with copies and items planted.

Documentation, manual pages, Perl, C headers, and the sources of the standard library and of
installed packages: UTF-8 files without NUL bytes, what gzip packed unpacked, in a seeded shuffle.
Copies of some prose are edited until the exact Jaccard similarity of their shingles is what was
asked, and evaluation items stand in some documents. Both are verified by sets of tuples of words,
which have nothing of Ingot's hashes.
"""

import gzip
import json
import os
import random
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from glob import glob
from pathlib import Path

PLACES: Mapping[str, tuple[str, ...]] = {
    "documentation": ("/usr/share/doc",),
    "manual pages": ("/usr/share/man",),
    "Perl": ("/usr/share/perl*",),
    "C headers": ("/usr/include",),
    "Debian's Python": ("/usr/lib/python3*",),
    "standard library": (sysconfig.get_paths()["stdlib"],),
    "installed packages": (sysconfig.get_paths()["purelib"],),
}
LEAST_BYTES, MOST_BYTES = 500, 400_000
NO_TEXT = (".json", ".csv", ".map", ".svg", "/RECORD")
"""Data rather than text, by the ends of their names."""
SHARD_BYTES = 20_000_000
SIMILARITIES = (0.9, 0.8, 0.7)
SHINGLE_WORDS = 5
ITEM_WORDS = 50
_MOST_ABOVE = 0.01
"""A pair's similarity is that asked, or up to so much more."""
_PROSE_WORDS = (1000, 8000)
_PLANTED_SHARE = 0.2
"""No more of the documents than this become pairs, or hold items, of a small corpus."""
_WORD = re.compile(r"\w+")
_PLAIN_WORD = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True, slots=True)
class Pair:
    """A document and its edited copy."""

    one: str
    other: str
    jaccard: float


@dataclass(frozen=True)
class Planted:
    """What was written, and what of it was planted."""

    folder: str
    """Holds `text/*.jsonl` and `items.jsonl`."""
    documents: int
    bytes: int
    found: dict[str, int]
    """Bytes by place, before anything was planted."""
    pairs: list[Pair]
    items: dict[str, str]
    """By document, the item that stands in it."""

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Planted":
        """What `save` wrote."""
        body = json.loads(path.read_text())
        return cls(**body | {"pairs": [Pair(**one) for one in body["pairs"]]})


def write_corpus(
    folder: Path, megabytes: float, *, pairs: int = 100, items: int = 100, seed: int = 0
) -> Planted:
    """About so much text below `folder`, with `pairs` copies of each similarity and `items` items.

    A corpus of few documents has fewer of both. Equal files and seeds give equal bytes.
    """
    rng = random.Random(seed)
    texts, found = _texts(round(megabytes * 1e6), rng)
    most = int(_PLANTED_SHARE * len(texts))
    prose = [at for at, text in enumerate(texts) if _is_prose(text)]
    rng.shuffle(prose)
    each = min(pairs, most // len(SIMILARITIES), len(prose) // len(SIMILARITIES))
    copied = prose[: each * len(SIMILARITIES)]
    copies = [
        edited(texts[at], SIMILARITIES[number % len(SIMILARITIES)], rng)
        for number, at in enumerate(copied)
    ]
    hosts = rng.sample(sorted(set(range(len(texts))) - set(copied)), min(items, most))
    words = sorted({word for at in prose for word in _PLAIN_WORD.findall(texts[at][:2000])})
    said = [" ".join(rng.choices(words, k=ITEM_WORDS)) for _ in hosts]
    for at, item in zip(hosts, said, strict=True):
        texts[at] = _planted(texts[at], item, rng)

    order = list(range(len(texts) + len(copies)))
    rng.shuffle(order)
    names = {at: f"d{place:07}" for place, at in enumerate(order)}
    every = [*texts, *(text for text, _ in copies)]
    size = _write_rows(folder / "text", ((names[at], every[at]) for at in order))
    (folder / "items.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in said))
    made = [
        Pair(names[at], names[len(texts) + number], copies[number][1])
        for number, at in enumerate(copied)
    ]
    hosted = {names[at]: item for at, item in zip(hosts, said, strict=True)}
    planted = Planted(str(folder), len(order), size, found, made, hosted)
    planted.save(folder / "planted.json")
    return planted


def shingles(text: str) -> set[tuple[str, ...]]:
    """All runs of `SHINGLE_WORDS` words, in small letters; of a shorter text, all its words."""
    words = _WORD.findall(text.lower())
    runs = max(1, len(words) - SHINGLE_WORDS + 1)
    return {tuple(words[at : at + SHINGLE_WORDS]) for at in range(runs)}


def exact_jaccard(one: str, other: str) -> float:
    """The similarity of the sets of two texts' shingles."""
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def edited(text: str, similarity: float, rng: random.Random) -> tuple[str, float]:
    """The text with some words replaced, and its exact similarity to what it was: that asked, or
    less than a hundredth above.

    A word in which nothing repeats takes five shingles away and brings five. Where something
    repeats another number of words is tried.
    """
    spans = [match.span() for match in _WORD.finditer(text)]
    order = list(range(len(spans)))
    rng.shuffle(order)
    before = shingles(text)
    low, high = 0, len(order)
    while low <= high:
        middle = (low + high) // 2
        changed = _replaced(text, spans, order[:middle])
        after = shingles(changed)
        value = len(before & after) / len(before | after)
        if similarity <= value < similarity + _MOST_ABOVE:
            return changed, value
        # More words replaced leave less in common.
        low, high = (middle + 1, high) if value > similarity else (low, middle - 1)
    raise ValueError(f"no edit of {len(spans)} words leaves {similarity} of their shingles")


def texts_of(planted: Planted) -> Iterator[tuple[str, str]]:
    """Each document's name and text, in the order of the files."""
    for path in sorted(Path(planted.folder, "text").iterdir()):
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            row = json.loads(line)
            yield row["id"], row["text"]


def _replaced(text: str, spans: Sequence[tuple[int, int]], numbers: Sequence[int]) -> str:
    """The text with these words replaced by ones that nobody writes."""
    parts, end = [], 0
    for number in sorted(numbers):
        start, stop = spans[number]
        parts += [text[end:start], f"quzx{_letters(number)}"]
        end = stop
    return "".join([*parts, text[end:]])


def _letters(number: int) -> str:
    return "".join(chr(ord("a") + int(digit)) for digit in str(number))


def _planted(text: str, item: str, rng: random.Random) -> str:
    """The text with a paragraph more, between two of its lines."""
    lines = text.split("\n")
    at = rng.randint(0, len(lines))
    return "\n".join([*lines[:at], item, *lines[at:]])


def _is_prose(text: str) -> bool:
    """Whether a text is ASCII and mostly plain words, of which everybody's notion is the same."""
    if not text.isascii():
        return False
    words = _WORD.findall(text)
    least, most = _PROSE_WORDS
    return least <= len(words) <= most and sum(map(str.isalpha, words)) > 0.9 * len(words)


def _texts(wanted_bytes: int, rng: random.Random) -> tuple[list[str], dict[str, int]]:
    """Texts in a seeded shuffle until there are enough bytes of them; bytes by place."""
    paths = rng.sample(_paths(), len(_paths()))
    texts: list[str] = []
    found = dict.fromkeys(PLACES, 0)
    for place, path in paths:
        if sum(found.values()) >= wanted_bytes:
            break
        if (text := _text(path)) is not None:
            texts.append(text)
            found[place] += len(text.encode())
    return texts, found


@cache
def _paths() -> list[tuple[str, str]]:
    """All files of all places, by place."""
    return [(place, path) for place, globs in PLACES.items() for path in _files(globs)]


def _files(globs: Sequence[str]) -> Iterator[str]:
    """Files of fair size below these folders, each once, in the order of their names."""
    for root in sorted({found for one in globs for found in glob(one)}):
        for folder, folders, names in os.walk(root):
            # What is installed in the standard library's folder is a place of its own.
            folders[:] = sorted(set(folders) - {"site-packages", "dist-packages", "__pycache__"})
            for name in sorted(names):
                path = f"{folder}/{name}"
                if path.endswith(NO_TEXT) or os.path.islink(path):
                    continue
                if 0 < os.stat(path).st_size <= MOST_BYTES:
                    yield path


def _text(path: str) -> str | None:
    """What a file says; none if it is no text, or too short or long."""
    try:
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if path.endswith(".gz") else data
        text = data.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return None
    if "\0" in text or not LEAST_BYTES <= len(data) <= MOST_BYTES or not text.strip():
        return None
    return text


def _write_rows(folder: Path, rows: Iterator[tuple[str, str]]) -> int:
    """Write rows in files of about `SHARD_BYTES`; the bytes of all texts."""
    folder.mkdir(parents=True)
    total = size = number = 0
    write: Callable[[str], object] | None = None
    file = None
    for name, text in rows:
        if file is None or size >= SHARD_BYTES:
            if file is not None:
                file.close()
            file = (folder / f"{number:05}.jsonl").open("w", encoding="utf-8")
            write, size, number = file.write, 0, number + 1
        line = json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n"
        assert write is not None
        write(line)
        size += len(line.encode())
        total += len(text.encode())
    if file is not None:
        file.close()
    return total
