"""What training text must not hold: held-out text, held-out problems, and items of evaluations.

It is written once, in a folder that every worker reads, and each worker says which of it stood in
its shard before anything was cut, and which stands there still.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from stages.data.tables import Writer, batches, load, save
from stages.overlap import Span, Windows, merge
from stages.statements import Finder
from stages.verifiers import Problem, find_statements, read_problems, write_problems

PASSAGE, PROBLEM, EVALUATION = "held_out_passage", "held_out_problem", "evaluation_item"
"""Why text was cut: it stands in held-out text, states a held-out problem, or stands in an item of
an evaluation."""
TEXT = ""
"""The set of held-out text; the others are evaluations, by name."""
_TEXTS, _PROBLEMS, _FOUND = "apart.arrow", "apart.parquet", "found.json"
_AT_A_TIME = 256
_SCHEMA = pa.schema([("set", pa.string()), ("source", pa.string()), ("text", pa.large_string())])

Apart = tuple[str, str, str]
"""A text: its set, the source that it was read from, and itself."""
Reason = tuple[str, str]
"""Why a passage is cut, and of which set it is."""


def write_apart(folder: Path, texts: Iterable[Apart], problems: Sequence[Problem]) -> None:
    """Write what is held out."""
    with Writer(folder / _TEXTS, _SCHEMA) as writer:
        waiting: list[Apart] = []
        for one in chain(texts, [None]):
            if one is not None:
                waiting.append(one)
            if one is None or len(waiting) == _AT_A_TIME:
                columns = zip(*waiting, strict=True) if waiting else [(), (), ()]
                writer.write(dict(zip(_SCHEMA.names, map(list, columns), strict=True)))
                waiting.clear()
    write_problems(folder / _PROBLEMS, problems)


def held_out_texts(folder: Path) -> Iterator[Apart]:
    """What `write_apart` wrote, in order."""
    for batch in batches(folder / _TEXTS, *_SCHEMA.names):
        yield from zip(batch["set"], batch["source"], batch["text"], strict=True)


class HeldOut:
    """What is held out, as a worker looks for it in one shard."""

    def __init__(self, windows: Mapping[str, Windows], find: Finder) -> None:
        """Windows by set, none of which was found yet; what finds statements of problems."""
        self._windows, self._find = windows, find
        self._problems: set[str] = set()
        self._changed: list[str] = []

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Of the folder that `write_apart` wrote."""
        windows, find = _opened(folder)
        for one in windows.values():
            one.forget()
        return cls(windows, find)

    def look(self, texts: Sequence[str]) -> list[dict[Reason, list[Span]]]:
        """What stands in each text, by reason and set."""
        found: list[dict[Reason, list[Span]]] = [{} for _ in texts]
        for name, windows in self._windows.items():
            for reasons, spans in zip(found, windows.look_many(texts), strict=True):
                if spans:
                    reasons[PASSAGE if name == TEXT else EVALUATION, name] = spans
        for reasons, text in zip(found, texts, strict=True):
            if spans := _stated(self._find, text, self._problems):
                reasons[PROBLEM, ""] = spans
        return found

    def changed(self, text: str) -> None:
        """Remember a text that was cut, to see at the end what stands in it still."""
        self._changed.append(text)

    def save(self, out: Path) -> None:
        """Write what was found before and, of the texts that were cut, after."""
        marks = {
            f"before_{number}": one.marks() for number, one in enumerate(self._windows.values())
        }
        after: set[str] = set()
        for one in self._windows.values():
            one.forget()
            one.look_many(self._changed)
        for text in self._changed:
            _stated(self._find, text, after)
        marks |= {
            f"after_{number}": one.marks() for number, one in enumerate(self._windows.values())
        }
        for name, found in marks.items():
            save(out, **{f"found_{name}": np.packbits(found)})
        told = {"before": sorted(self._problems), "after": sorted(after)}
        (out / _FOUND).write_text(json.dumps(told))


@dataclass(frozen=True, slots=True)
class Found:
    """How much of one set stood in training text, in windows or problems."""

    total: int
    before: int
    after: int


def found_in(folder: Path, shards: Sequence[Path]) -> tuple[dict[str, Found], Found]:
    """Windows by set, and problems, that the shards' workers found."""
    windows, _ = _opened(folder)
    sets = {}
    for number, (name, one) in enumerate(windows.items()):
        counted, size = {}, len(one.marks())
        for when in ("before", "after"):
            one.forget()
            for shard in shards:
                marks = load(shard, f"found_{when}_{number}")
                one.mark(np.unpackbits(np.asarray(marks), count=size))
            counted[when] = one.found
        sets[name] = Found(one.total, counted["before"], counted["after"])
    told = [json.loads((shard / _FOUND).read_text()) for shard in shards]
    before, after = (len({one for some in told for one in some[w]}) for w in ("before", "after"))
    return sets, Found(len(read_problems(folder / _PROBLEMS)), before, after)


@lru_cache(maxsize=1)
def _opened(folder: Path) -> tuple[Mapping[str, Windows], Finder]:
    """Windows by set and a finder of problems; kept, as one worker cleans many shards."""
    texts: dict[str, list[str]] = {TEXT: []}
    for name, _, text in held_out_texts(folder):
        texts.setdefault(name, []).append(text)
    windows = {name: Windows.of(some) for name, some in sorted(texts.items())}
    return windows, find_statements(read_problems(folder / _PROBLEMS))


def _stated(find: Finder, text: str, told: set[str]) -> list[Span]:
    """Where the text states held-out problems, which are added to `told`."""
    spans = []
    for statement in find(text):
        told.add(statement.problem_id)
        spans.append((statement.start, statement.end))
    return merge(spans)
