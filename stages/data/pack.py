"""Packs documents into rows of one length, and asks for the middle of some of them.

Documents are framed first: BOS, tokens, EOS. They come and go as streams: nothing here holds more
than a block of rows, the rows that are still open, and a document.

Axes: N rows, S tokens of a row.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from configs.seed import derive
from stages.framing import BOS_ID, EOS_ID

Int32 = npt.NDArray[np.int32]

BLOCK_TOKENS = 1 << 20
"""Rows are handed on in blocks of about so many tokens."""
OPEN_ROWS = 1024
"""Rows among which a document finds its place; more make less padding and cost little."""


def frame(token_ids: Int32) -> Int32:
    """A document as it is packed: BOS, its tokens, EOS."""
    framed = np.empty(len(token_ids) + 2, dtype=np.int32)
    framed[0], framed[1:-1], framed[-1] = BOS_ID, token_ids, EOS_ID
    return framed


def take_until(documents: Iterable[Int32], max_tokens: int) -> list[Int32]:
    """Framed documents from the front until they hold `max_tokens` or none is left."""
    taken, total = [], 0
    for document in documents:
        if total >= max_tokens:
            break
        taken.append(document)
        total += len(document)
    return taken


def pack(
    documents: Iterable[Int32], *, sequence_tokens: int, max_rows: int, pad: bool = False
) -> Int32:
    """The first `max_rows` rows [N, S] of `concat_rows`, or as many as there are."""
    blocks, left = [np.empty((0, sequence_tokens), dtype=np.int32)], max_rows
    for block in concat_rows(documents, sequence_tokens=sequence_tokens, pad=pad):
        blocks.append(block[:left])
        left -= len(blocks[-1])
        if left == 0:
            break
    return np.concatenate(blocks)


def concat_rows(
    documents: Iterable[Int32], *, sequence_tokens: int, pad: bool = False
) -> Iterator[Int32]:
    """Rows of framed documents laid end to end, in blocks [N, S] of int32.

    What is left at the end is dropped, or with `pad` filled up with BOS, which is never scored.
    """
    block_tokens = max(BLOCK_TOKENS, sequence_tokens)
    waiting: list[Int32] = []
    num_waiting = 0
    for document in documents:
        waiting.append(document)
        num_waiting += len(document)
        if num_waiting >= block_tokens:
            stream = np.concatenate(waiting)
            whole = num_waiting - num_waiting % sequence_tokens
            yield stream[:whole].reshape(-1, sequence_tokens)
            waiting, num_waiting = [stream[whole:].copy()], num_waiting - whole
    if pad and (lack := -num_waiting % sequence_tokens):
        waiting.append(np.full(lack, BOS_ID, dtype=np.int32))
        num_waiting += lack
    if num_waiting >= sequence_tokens:
        whole = num_waiting - num_waiting % sequence_tokens
        yield np.concatenate(waiting)[:whole].reshape(-1, sequence_tokens)


def best_fit_rows(
    documents: Iterable[Int32], *, sequence_tokens: int, window: int = OPEN_ROWS
) -> Iterator[Int32]:
    """Rows that keep framed documents whole where they can, in blocks [N, S] of int32.

    After Ding et al. 2024, "Fewer Truncations Improve Language Modeling": a document goes where it
    leaves the least space, of equals into the row that was opened first; only one that is longer
    than a row is cut, into full rows and a rest. There they sort the whole corpus by length; here
    at most `window` rows are open, and where none of them has room the fullest one is closed for a
    new one. A rest opens a row of its own: behind another document, for want of a BOS, it would be
    read as part of that. What stays empty at the end of a row is BOS, which is never scored.
    """
    # Of each open row its space and number, in this order; the documents by number.
    spaces: list[tuple[int, int]] = []
    open_rows: dict[int, list[Int32]] = {}
    block = _Block(sequence_tokens)
    for number, document in enumerate(documents):
        place = bisect_left(spaces, (len(document), -1))
        if len(document) >= sequence_tokens:
            whole = len(document) - len(document) % sequence_tokens
            for start in range(0, whole, sequence_tokens):
                yield from block.add([document[start : start + sequence_tokens]])
            if whole == len(document):
                continue
            # No open row has had room for the whole document, so this opens one. A view would keep
            # the whole document for as long as the row is open.
            document = document[whole:].copy()
        if place < len(spaces):
            space, row = spaces.pop(place)
        else:
            if len(spaces) == window:
                yield from block.add(open_rows.pop(spaces.pop(0)[1]))
            space, row = sequence_tokens, number
            open_rows[row] = []
        open_rows[row].append(document)
        if space == len(document):
            yield from block.add(open_rows.pop(row))
        else:
            insort(spaces, (space - len(document), row))
    for row in sorted(open_rows):
        yield from block.add(open_rows[row])
    yield from block.rest()


@dataclass(slots=True)
class _Block:
    """Closed rows until there are enough to hand on."""

    sequence_tokens: int
    _rows: list[list[Int32]] = field(default_factory=list)

    def add(self, row: list[Int32]) -> Iterator[Int32]:
        """Close a row of these pieces; a block if it is full."""
        self._rows.append(row)
        if len(self._rows) * self.sequence_tokens >= BLOCK_TOKENS:
            yield from self.rest()

    def rest(self) -> Iterator[Int32]:
        """The rows that wait, if there are any."""
        if not self._rows:
            return
        rows = np.full((len(self._rows), self.sequence_tokens), BOS_ID, dtype=np.int32)
        for row, pieces in zip(rows, self._rows, strict=True):
            joined = np.concatenate(pieces)
            row[: len(joined)] = joined
        self._rows = []
        yield rows


@dataclass(frozen=True, slots=True)
class Filling:
    """What packing cost."""

    rows: int
    padding_tokens: int
    cut_documents: int
    """Documents that begin in a row and do not end there."""

    def __add__(self, other: "Filling") -> "Filling":
        """Of both blocks of rows."""
        return Filling(
            self.rows + other.rows,
            self.padding_tokens + other.padding_tokens,
            self.cut_documents + other.cut_documents,
        )


def filling(rows_NS: Int32) -> Filling:
    """What packing cost in these rows [N, S]; of a document that ends a row with its BOS alone,
    this BOS counts as padding."""
    num_rows, length = rows_NS.shape
    last_token_N = _last(rows_NS != BOS_ID)
    inside_NS = np.arange(length) <= last_token_N[:, None]
    last_begin_N = _last((rows_NS == BOS_ID) & inside_NS)
    last_end_N = _last(rows_NS == EOS_ID)
    return Filling(
        rows=num_rows,
        padding_tokens=int((length - 1 - last_token_N).sum()),
        cut_documents=int((last_begin_N > last_end_N).sum()),
    )


def _last(is_NS: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The last place in each row that is true, -1 where none is."""
    length = is_NS.shape[1]
    return np.where(is_NS.any(axis=1), length - 1 - is_NS[:, ::-1].argmax(axis=1), -1)


def is_fim(seed: int, document: str, rate: float) -> bool:
    """Whether this document is to be filled in the middle, for a share `rate` of all documents."""
    return derive(seed, "data", "fim", document) < rate * 2.0**63


def fill_in_middle(token_ids: Int32, ids: tuple[int, int, int], *, seed: int) -> Int32:
    """A document, not framed yet, as the task to fill its middle: prefix, suffix, middle (PSM).

    `ids` stand before the prefix, before the suffix and before the middle: begin, hole and end, as
    DeepSeek-V3 has them (section 4.1 of its report; Bavarian et al. 2022, "Efficient Training of
    Language Models to Fill in the Middle"). Both cuts are between tokens, drawn evenly by `seed` so
    that no part is empty; a document of fewer than 3 tokens stays as it is.
    """
    length = len(token_ids)
    if length < 3:
        return token_ids
    more, one = divmod(seed, length - 1)
    other = more % (length - 2)
    first, second = sorted((one, other + (other >= one)))
    prefix, suffix = token_ids[: first + 1], token_ids[second + 1 :]
    middle = token_ids[first + 1 : second + 1]
    asked = np.empty(length + 3, dtype=np.int32)
    asked[0], asked[len(prefix) + 1], asked[-len(middle) - 1] = ids
    asked[1 : len(prefix) + 1] = prefix
    asked[len(prefix) + 2 : -len(middle) - 1] = suffix
    asked[-len(middle) :] = middle
    return asked
