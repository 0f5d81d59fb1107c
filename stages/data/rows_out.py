"""Turns the sources' streams into the rows of the corpus: how many of each, in which order.

Axes: N rows, S tokens of a row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from cluster.shards import Done
from configs.data import DataConfig, TextSource
from configs.errors import DataError
from configs.seed import derive
from stages.data.apart import TEXT, held_out_texts
from stages.data.encode import STREAM, Stream, write_stream
from stages.data.mixture import interleave_order, mixable_rows, repeatable_rows, row_budget
from stages.data.pack import Int32, best_fit_rows, concat_rows, filling, frame, pack, take_until
from stages.data.questions import Posed
from stages.data.shop import Shop
from stages.data.tables import load, save
from stages.data.tokenizer import encode
from stages.framing import BOS_ID
from stages.names import TOKENIZER
from stages.shards import write_shard
from stages.tokens import load_tokenizer

REVISION = 1
MIN_ROWS = 8
"""Fewer training rows than this are no corpus but a mistake in the sources."""
ROWS = "rows.arrow"
SHARD_TOKENS = 8_000_000
"""A shard of the corpus holds about so many."""
_DOCUMENTS_A_TIME, _TOKENS_A_TIME = 64, 1 << 20
_DRAWS_A_TIME = 1 << 12


@dataclass(frozen=True, slots=True)
class Mixed:
    """The training rows, in shards."""

    shards: Sequence[Done]
    rows: Mapping[str, int]
    """Of each source."""
    documents: Mapping[str, int]
    """Documents that begin in the rows of each source."""
    epochs: Mapping[str, float]
    """How often each text source's rows come, on the whole."""
    sequence_tokens: int
    encoders: Sequence[str]
    """What encoded text, and why."""
    fim_documents: Mapping[str, int]
    """Documents of each text source that are asked to be filled in the middle."""
    short: Sequence[Path]
    """Folders that say which documents were too short to be packed."""
    padding_tokens: int
    short_documents: Mapping[str, int]
    """Documents of each text source that have fewer tokens than `data.pack.min_document_tokens`."""
    lacking: Sequence[str]
    """Text sources that are too short for their share."""

    @property
    def total_rows(self) -> int:
        """Of all sources."""
        return sum(self.rows.values())

    @property
    def total_tokens(self) -> int:
        """Of all sources, padding included."""
        return self.total_rows * self.sequence_tokens


def mix(
    spec: DataConfig,
    shop: Shop,
    encoded: Mapping[str, Sequence[Done]],
    posed: Mapping[str, Posed],
    tokenizer: Path,
    *,
    seed: int,
) -> Mixed:
    """Rows of each source, in the proportions that the recipe asks for, mixed.

    Text is repeated up to its source's `max_epochs`; where it is still shorter than its share, all
    shrink alike. DataError if too little is left to train on.
    """
    shares = {name: source.share for name, source in sorted(spec.sources.items())}
    length, wanted = spec.sequence_tokens, spec.train_tokens // spec.sequence_tokens
    streams = {n: [one.folder / STREAM for one in done] for n, done in encoded.items()}
    distinct = {name: len(Stream(paths, length)) for name, paths in streams.items()}
    epochs = {n: s.max_epochs for n, s in spec.sources.items() if isinstance(s, TextSource)}
    available = dict.fromkeys(shares, wanted) | repeatable_rows(distinct, epochs)
    budget = _budget(spec, shares, available, wanted)
    for name, one in posed.items():
        done = shop.one(
            "draw",
            {
                "revision": REVISION,
                "posed": one.digest,
                "rows": budget[name],
                "seed": seed,
                "name": name,
                "length": length,
                "method": spec.pack.method,
            },
            partial(
                _draw, one.train, tokenizer, budget[name], length, spec.pack.method, seed, name
            ),
            tokenizer,
        )
        streams[name] = [done.folder / STREAM]
    every = [one for done in encoded.values() for one in done]
    shards = _shards(spec, shop, budget, budget | distinct, streams, seed=seed)
    names = sorted(budget)
    begun = np.sum([one.facts["begun"] for one in shards], axis=0)
    return Mixed(
        shards,
        budget,
        dict(zip(names, map(int, begun), strict=True)),
        {name: budget[name] / max(1, rows) for name, rows in distinct.items()},
        length,
        sorted({one.facts["encoder"] for done in encoded.values() for one in done}),
        {n: sum(one.facts["fim_documents"] for one in done) for n, done in encoded.items()},
        [one.folder for one in every if one.facts["short_documents"]],
        sum(int(one.facts["padding"]) for one in shards),
        {n: sum(one.facts["short_documents"] for one in done) for n, done in encoded.items()},
        [name for name, rows in row_budget(shares, wanted).items() if available[name] < rows],
    )


def _budget(
    spec: DataConfig, shares: Mapping[str, float], available: Mapping[str, int], wanted: int
) -> dict[str, int]:
    """Rows of each source. DataError if they are too few."""
    budget, length = row_budget(shares, wanted), spec.sequence_tokens
    short = {name for name in shares if available[name] < budget[name]}
    total = mixable_rows({name: shares[name] for name in short}, available, wanted)
    budget = row_budget(shares, total)
    # Rounding may give one source a row more than the shares of fewer rows would.
    while total >= MIN_ROWS and any(budget[name] > available[name] for name in shares):
        total -= 1
        budget = row_budget(shares, total)
    if total >= MIN_ROWS:
        return budget
    lacking = min(short, key=lambda name: available[name] / shares[name], default="")
    least = spec.pack.min_document_tokens
    cause = (
        f"data.pack.min_document_tokens = {least} leaves data.sources.{lacking} nothing; lower it"
        if lacking and least and not available[lacking]
        else f"data.sources.{lacking} has text for {available[lacking]} rows of its share of "
        f"{shares[lacking]}; give it more text or a smaller share"
        if lacking
        else f"data.train_tokens = {spec.train_tokens} is too small; raise it"
    )
    raise DataError(
        f"data.sequence_tokens = {length}: the sources fill {total} rows of that length, "
        f"but training needs {MIN_ROWS}; {cause}"
    )


def _shards(
    spec: DataConfig,
    shop: Shop,
    budget: Mapping[str, int],
    available: Mapping[str, int],
    streams: Mapping[str, Sequence[Path]],
    *,
    seed: int,
) -> list[Done]:
    """The mixed rows, a task for each shard of them."""
    names, length = sorted(budget), spec.sequence_tokens

    def make(out: Path) -> Mapping[str, Any]:
        _, source_N, row_N = interleave_order(budget, seed=seed, available=available)
        save(out, source=source_N, row=row_N)
        return {"rows": len(row_N)}

    used = [path.parent for name in names for path in streams[name]]
    key = {"revision": REVISION, "budget": dict(budget), "available": dict(available)}
    done = shop.one("order", key | {"length": length, "seed": seed}, make, *used)
    order, total = done.folder, int(done.facts["rows"])
    rows_a_shard = max(1, SHARD_TOKENS // length)
    tasks = [
        shop.task(
            "rows",
            {"revision": REVISION, "first": first, "length": length},
            partial(
                _write_rows,
                order=order,
                first=first,
                last=min(total, first + rows_a_shard),
                streams=[list(streams[name]) for name in names],
                length=length,
                is_padded=spec.pack.method == "best-fit",
            ),
            order,
            reads=used,
        )
        for first in range(0, total, rows_a_shard)
    ]
    return shop.run(tasks)


def _write_rows(
    out: Path,
    *,
    order: Path,
    first: int,
    last: int,
    streams: Sequence[Sequence[Path]],
    length: int,
    is_padded: bool,
) -> Mapping[str, Any]:
    """The task of one shard of rows; how many documents of each source begin in it."""
    source_N, row_N = (load(order, name)[first:last] for name in ("source", "row"))
    rows = np.empty((last - first, length), np.int32)
    begun, padding = list[int](), 0
    rows_a_time = max(1, _TOKENS_A_TIME // length)
    for number, paths in enumerate(streams):
        stream, here = Stream(paths, length), np.flatnonzero(source_N == number)
        begun.append(0)
        for at in range(0, len(here), rows_a_time):
            some = here[at : at + rows_a_time]
            rows[some] = found = stream.take(row_N[some])
            empty = filling(found).padding_tokens if is_padded else 0
            begun[-1] += int(np.count_nonzero(found == BOS_ID)) - empty
            padding += empty
    write_shard(out / ROWS, rows)
    return {"rows": last - first, "begun": begun, "padding": padding}


def _draw(
    texts: Sequence[str],
    tokenizer: Path,
    rows: int,
    length: int,
    method: str,
    seed: int,
    name: str,
    out: Path,
) -> Mapping[str, Any]:
    """The task of texts drawn with replacement until they fill so many rows."""
    encoder = load_tokenizer(tokenizer / TOKENIZER)
    framed = [frame(token_ids) for token_ids in encode(encoder, texts)]

    def drawn() -> Iterator[Int32]:
        rng = np.random.default_rng(derive(seed, "data", name, "draws"))
        while True:
            for pick in rng.integers(len(framed), size=_DRAWS_A_TIME).tolist():
                yield framed[pick]

    def filled() -> Iterator[Int32]:
        pack_rows = best_fit_rows if method == "best-fit" else concat_rows
        left = rows
        for block in pack_rows(drawn(), sequence_tokens=length):
            yield block[:left]
            left -= len(block)
            if left <= 0:
                return

    return {"tokens": write_stream(out / STREAM, filled() if rows else ())}


def held_out_rows(
    spec: DataConfig, decided: Path, posed: Mapping[str, Posed], tokenizer: Tokenizer
) -> dict[str, Int32]:
    """Packed held-out rows of each source: at least one, the last filled up with padding."""
    texts: dict[str, list[str]] = {name: [] for name in spec.sources}
    texts |= {name: list(one.held_out_documents) for name, one in posed.items()}
    for kind, name, text in held_out_texts(decided):
        if kind == TEXT and name not in posed:
            texts[name].append(text)
    if bare := [name for name, some in sorted(texts.items()) if not some]:
        raise DataError(
            f"data.sources.{bare[0]}: none of its documents could be held out, as all of them say "
            "the same; give others, or leave data.dedup.exact on"
        )
    max_rows = max(1, spec.max_held_out_tokens // spec.sequence_tokens)
    return {
        name: pack(
            take_until(_framed(tokenizer, some), spec.max_held_out_tokens),
            sequence_tokens=spec.sequence_tokens,
            max_rows=max_rows,
            pad=True,
        )
        for name, some in sorted(texts.items())
    }


def _framed(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[Int32]:
    """Texts as they are packed, encoded a few at a time: who stops early pays for little more."""
    for start in range(0, len(texts), _DOCUMENTS_A_TIME):
        for token_ids in encode(tokenizer, texts[start : start + _DOCUMENTS_A_TIME]):
            yield frame(token_ids)
