"""Single documents of a corpus, found by name in the Parquet files that list all of them.

`documents/` has one row for each document that stayed, `drops/` one for each reason why a document,
or a part of it, did not, `duplicates.parquet` who repeats whom. All are scanned as columns, a batch
of rows at a time: of millions of documents only those asked for become Python's.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

DOCUMENTS, DROPS, DUPLICATES = "documents", "drops", "duplicates.parquet"
REPEATS_SHOWN = 5
_NAMES = pa.schema([(name, pa.string()) for name in ("source", "document", "key")])
_REASONS = pa.schema(
    [
        *_NAMES,
        *((name, pa.string()) for name in ("rule", "start", "of", "reason")),
        *((name, pa.float64()) for name in ("value", "threshold")),
        ("cut_chars", pa.int64()),
    ]
)
_PARTS = 8
"""A name is compared with others by its beginnings and ends of so many lengths."""
_BLOCK_ROWS = 250_000
_OF_A_BLOCK, _COMPARED = 500, 2_000
"""So many of the likest names of a block of rows are looked at closely, and of all blocks."""
_FILE = "__filename"
"""A column that Arrow makes: the file that a row is from."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a document, or a part of it, is not in the corpus."""

    rule: str
    value: float | None
    threshold: float | None
    start: str
    """First characters of the text, or of what was cut."""
    of: str
    """What it repeats: a document, or a set that is held out."""
    cut_chars: int | None
    """None if all of the document went."""
    reason: str
    """Of what could not be read: what is wrong."""


@dataclass(frozen=True, slots=True)
class Stayed:
    """What is known of a document that is in the corpus."""

    is_held_out: bool
    chars: int
    licence: str
    timestamp: str
    measures: Mapping[str, float]
    """By quality rule, in the order in which they are asked."""


@dataclass(frozen=True, slots=True)
class Repeat:
    """A document that went for being like another."""

    document: str
    """As `source/document`."""
    rule: str
    jaccard: float | None


@dataclass(frozen=True, slots=True)
class Known:
    """One document, and what became of it."""

    source: str
    document: str
    key: str
    """Its own name for itself, if its source has such."""
    stayed: Stayed | None
    """None if the document is not in the corpus."""
    reasons: tuple[Reason, ...]
    """Why it went; of one that stayed, what was cut of it."""
    repeats: int
    """How many documents went for being like this one."""
    first_repeats: tuple[Repeat, ...]

    @property
    def name(self) -> str:
        """What it is known by in the whole corpus."""
        return f"{self.source}/{self.document}"


def lists_documents(folder: Path) -> bool:
    """Whether the corpus in `folder` lists its documents; those of earlier versions do not."""
    return all((folder / name).is_dir() for name in (DOCUMENTS, DROPS))


def find_documents(folder: Path, name: str) -> list[Known]:
    """All documents of the corpus in `folder` that are called `name`: as `source/document`, by
    `document` alone, or by their key. In the order of their full names."""
    stayed = _stayed(folder, name)
    reasons = _reasons(folder, name)
    found = sorted({*stayed, *reasons})
    repeats = _repeats(folder, [f"{source}/{document}" for source, document, _ in found])
    return [
        Known(
            source,
            document,
            key,
            stayed.get((source, document, key)),
            tuple(reasons.get((source, document, key), ())),
            *repeats.get(f"{source}/{document}", (0, ())),
        )
        for source, document, key in found
    ]


def count_documents(folder: Path) -> int:
    """Documents that `find_documents` looks through, with rows and files that were broken."""
    kept, dropped = _dataset(folder, DOCUMENTS, _NAMES), _dataset(folder, DROPS, _REASONS)
    rows = 0 if kept is None else kept.count_rows()
    if dropped is not None:
        # One row of each document that went as a whole, and any number of what was cut.
        rows += dropped.count_rows(filter=ds.field("cut_chars").is_null())
    return int(rows)


def nearest(folder: Path, name: str, *, most: int = 3) -> list[str]:
    """The names most like `name`, each as `source/document` (and by its key where that is alike).

    Looked for among those that begin or end as `name` does, as a mistyped one nearly always does.
    """
    likely: list[tuple[int, str, str]] = []
    for kind in (DOCUMENTS, DROPS):
        for table in _blocks(_dataset(folder, kind, _NAMES)):
            likely = sorted({*likely, *_likely(table, name)}, reverse=True)[:_COMPARED]
    shown = {form.lower(): full for _, form, full in likely}
    near = difflib.get_close_matches(name.lower(), shown, n=most, cutoff=0.5)
    return list(dict.fromkeys(shown[form] for form in near))


_Name = tuple[str, str, str]
"""Source, document and key."""


def _dataset(folder: Path, kind: str, schema: pa.Schema) -> Any:
    """All files of a kind as one table; none where there is no file."""
    paths = sorted(map(str, (folder / kind).glob("*.parquet")))
    return ds.dataset(paths, schema=schema, format="parquet") if paths else None


def _called(name: str) -> Any:
    """Which rows are called `name`, as an expression."""
    source, _, document = name.partition("/")
    full = (ds.field("source") == source) & (ds.field("document") == document)
    # Without a name every document without a key would be meant.
    key = ds.field("key") == name if name else pc.scalar(False)
    return full | (ds.field("document") == name) | key


def _stayed(folder: Path, name: str) -> dict[_Name, Stayed]:
    dataset = _dataset(folder, DOCUMENTS, _NAMES)
    if dataset is None:
        return {}
    wanted = dataset.scanner(columns=["document", _FILE], filter=_called(name)).to_table()
    names: dict[str, list[str]] = {}
    for document, path in zip(*(column.to_pylist() for column in wanted.columns), strict=True):
        names.setdefault(path, []).append(document)
    # File by file: which rules measured is a matter of each source.
    rows = [
        row
        for path, some in names.items()
        for row in pq.read_table(path, filters=ds.field("document").isin(some)).to_pylist()
    ]
    return {
        (row["source"], row["document"], row["key"]): Stayed(
            row["side"] == "held_out",
            row["chars"],
            row["licence"],
            row["timestamp"],
            {rule: value for rule, value in row["measures"].items() if value is not None},
        )
        for row in rows
    }


def _reasons(folder: Path, name: str) -> dict[_Name, list[Reason]]:
    dataset = _dataset(folder, DROPS, _REASONS)
    rows = [] if dataset is None else dataset.to_table(filter=_called(name)).to_pylist()
    found: dict[_Name, list[Reason]] = {}
    for row in rows:
        names = (row.pop("source"), row.pop("document"), row.pop("key"))
        found.setdefault(names, []).append(Reason(**row))
    return found


def _repeats(folder: Path, names: Sequence[str]) -> dict[str, tuple[int, tuple[Repeat, ...]]]:
    """By full name how many documents repeat it, and the first of them."""
    path = folder / DUPLICATES
    if not names or not path.is_file():
        return {}
    dataset = ds.dataset(str(path), format="parquet")
    found: dict[str, list[Repeat]] = {name: [] for name in names}
    counts = dict.fromkeys(names, 0)
    for batch in dataset.to_batches(filter=ds.field("kept").isin(list(names))):
        for kept in names:
            some = batch.filter(pc.equal(batch.column("kept"), kept))
            counts[kept] += some.num_rows
            left = max(0, REPEATS_SHOWN - len(found[kept]))
            for row in some.slice(0, left).drop_columns(["kept"]).to_pylist():
                found[kept].append(Repeat(**row))
    return {name: (counts[name], tuple(found[name])) for name in names if counts[name]}


def _blocks(dataset: Any) -> Iterator[pa.Table]:
    """Its rows, very many at a time, since a file's own groups of rows may be small."""
    waiting: list[pa.RecordBatch] = []
    rows = 0
    for batch in () if dataset is None else dataset.to_batches():
        waiting.append(batch)
        rows += batch.num_rows
        if rows >= _BLOCK_ROWS:
            yield pa.Table.from_batches(waiting).combine_chunks()
            waiting, rows = [], 0
    if rows:
        yield pa.Table.from_batches(waiting).combine_chunks()


def _likely(table: pa.Table, name: str) -> Iterator[tuple[int, str, str]]:
    """How like, what is alike, and the full name, of the likest few rows of a table."""
    document, key = table.column("document"), table.column("key")
    full = pc.binary_join_element_wise(table.column("source"), document, "/")
    for column in (full, document, key) if "/" in name else (document, key):
        alike = _score(column, name)
        most = min(_OF_A_BLOCK, table.num_rows)
        order = pc.select_k_unstable(alike, k=most, sort_keys=[("", "descending")])
        some = zip(*(one.take(order).to_pylist() for one in (alike, column, full)), strict=True)
        yield from ((score, form, shown) for score, form, shown in some if score and form)


def _score(column: Any, name: str) -> Any:
    """How many beginnings and ends of `name`, of `_PARTS` lengths, each text of a column has."""
    lower, wanted = pc.utf8_lower(column), name.lower()
    lengths = {max(1, len(wanted) * part // _PARTS) for part in range(1, _PARTS + 1)}
    scores: Any = pa.scalar(0, pa.int8())
    for length in lengths:
        for matches, pattern in (
            (pc.starts_with, wanted[:length]),
            (pc.ends_with, wanted[-length:]),
        ):
            scores = pc.add(scores, matches(lower, pattern).cast(pa.int8()))
    return scores
