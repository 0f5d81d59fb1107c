"""Reads problems with answers from files of rows, some of which training never sees.

A question is known by its characters without white space and in lower case, as in
`stages/overlap.py`: two rows that ask the same are one problem, in whichever source they stand.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from configs.data import ProblemsSource
from configs.errors import DataError
from configs.seed import derive
from stages.data.faults import Broken, Globbed, HeldOutFiles, fault, require_unchanged
from stages.data.files import read_rows, worded
from stages.data.finding import matches
from stages.data.reads import identify
from stages.data.rows import Wanted
from stages.hashing import Hashes
from stages.rolling import fold
from stages.verifiers import Problem, read_number

KIND = "question"
"""Of all problems that are read, which decides how answers to them are judged."""
MAX_BROKEN_SHARE = 0.01
"""Part of the rows that may be broken; a file of problems is small enough to be mended."""
_ID_DIGITS = 16
_SHOWN_BROKEN = 3


@dataclass(frozen=True, slots=True)
class ProblemSplit:
    """The problems of one source, in the order of its files, and each as a document."""

    train: list[Problem]
    held_out: list[Problem]
    train_documents: list[str]
    """Question and answer of each problem of `train`, in the same order."""
    held_out_documents: list[str]
    repeats: int = 0
    """Rows left out as they ask what an earlier one asked, or what is held out."""
    broken: tuple[Broken, ...] = ()
    """Rows that cannot be read."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """One row: a question, known by its `key`, and its answer at length and in short."""

    key: str
    question: str
    answer: str
    final: str


def read_problem_files(
    name: str, source: ProblemsSource, hashes: Hashes, *, seed: int
) -> ProblemSplit:
    """The problems of a source on two sides, by `held_out_glob` or by each question's hash.

    A place by hash follows from the question and the seed alone. DataError if files cannot be found
    or read, more than `MAX_BROKEN_SHARE` of the rows are broken, or a side is left empty.
    """
    before = identify(name, source, hashes)
    broken: list[Broken] = []
    asked = list(_read(name, source, source, before["glob"], hashes, broken))
    if source.held_out_glob is None:
        held_keys = {
            one.key
            for one in asked
            if derive(seed, "problems", one.key) / 2**63 < source.held_out_share
        }
        kept_out = [one for one in asked if one.key in held_keys]
    else:
        files, known = HeldOutFiles(source.held_out_glob), before["held_out_glob"]
        kept_out = list(_read(name, files, source, known, hashes, broken))
        held_keys = {one.key for one in kept_out}
    after = identify(name, source, hashes)
    for field, entries in before.items():
        require_unchanged(name, source, entries, after[field])
    rows = len(asked) + (len(kept_out) if source.held_out_glob is not None else 0)
    _require_rows(name, source, rows, broken)
    train = _firsts(one for one in asked if one.key not in held_keys)
    held_out = _firsts(kept_out)
    split = ProblemSplit(
        train=[_problem(name, one) for one in train],
        held_out=[_problem(name, one) for one in held_out],
        train_documents=[f"{one.question}\n{one.answer}" for one in train],
        held_out_documents=[f"{one.question}\n{one.answer}" for one in held_out],
        repeats=rows - len(train) - len(held_out),
        broken=tuple(broken),
    )
    _require_sides(name, source, split)
    return split


def keep_sources_apart(
    splits: Mapping[str, ProblemSplit], sources: Mapping[str, ProblemsSource]
) -> dict[str, ProblemSplit]:
    """The same without training problems that any of the sources holds out.

    DataError if that leaves a source nothing to train on.
    """
    held = {_key_of(one) for split in splits.values() for one in split.held_out}
    result = {}
    for name, split in splits.items():
        pairs = zip(split.train, split.train_documents, strict=True)
        kept = [(one, text) for one, text in pairs if _key_of(one) not in held]
        result[name] = replace(
            split,
            train=[one for one, _ in kept],
            train_documents=[text for _, text in kept],
            repeats=split.repeats + len(split.train) - len(kept),
        )
        _require_sides(name, sources[name], result[name])
    return result


def final_answer(answer: str, mark: str) -> str:
    """What stands behind the last `mark`, or all; of a number its digits, sign and point alone."""
    final = answer.rpartition(mark)[2] if mark and mark in answer else answer
    if read_number(final) is None:
        return final.strip()
    return "".join(final.split()).replace(",", "").replace("$", "")


def _read(
    name: str,
    files: Globbed,
    source: ProblemsSource,
    known: Mapping[str, Any],
    hashes: Hashes,
    broken: list[Broken],
) -> Iterator[_Asked]:
    """The rows of all files of one glob; those that are none are added to `broken`."""
    setting = f"data.sources.{name}.prompt_field"
    wanted = Wanted(setting, source.prompt_field, (source.answer_field,))
    for path, label in matches(name, files, hashes.store):
        rows = read_rows(name, files, path, label, known.get(label), wanted, splits=False)
        for number, row in enumerate(rows, start=1):
            if isinstance(row, Broken):
                broken.append(row)
                continue
            if not row.also:
                raise fault(
                    name, files, f"{label} holds no rows", "give files of .jsonl or .parquet"
                )
            question, answer = row.text.strip(), worded(row.also[0]).strip()
            final = final_answer(answer, source.answer_mark)
            key = "".join(map(chr, fold([question])[0].tolist()))
            if key and final:
                yield _Asked(key, question, answer, final)
                continue
            where = f"{label} row {number}"
            said = (
                f"{where} has no {'answer' if key else 'question'}; set data.sources.{name}."
                f"{'answer_field' if key else 'prompt_field'} to the one that holds it, or take "
                "the row out"
            )
            num_bytes = len(f"{question}{answer}".encode())
            broken.append(Broken(name, where, "broken_row", said, num_bytes))


def _firsts(asked: Iterable[_Asked]) -> list[_Asked]:
    """The first row of each question."""
    firsts: dict[str, _Asked] = {}
    for one in asked:
        firsts.setdefault(one.key, one)
    return list(firsts.values())


def _problem(name: str, asked: _Asked) -> Problem:
    digits = hashlib.sha256(asked.key.encode()).hexdigest()[:_ID_DIGITS]
    return Problem(
        id=f"{name}/{digits}", prompt=f"{asked.question}\n", answer=asked.final, source=KIND
    )


def _key_of(problem: Problem) -> str:
    return problem.id.rpartition("/")[2]


def _require_rows(name: str, source: ProblemsSource, rows: int, broken: list[Broken]) -> None:
    """DataError if too many rows are broken."""
    total = rows + len(broken)
    if len(broken) > MAX_BROKEN_SHARE * total:
        shown = ". ".join(one.reason for one in broken[:_SHOWN_BROKEN])
        more = len(broken) - _SHOWN_BROKEN
        raise fault(
            name,
            source,
            f"{len(broken):,} of {total:,} rows are broken, more than {MAX_BROKEN_SHARE:.0%}: "
            f"{shown}{f'. And {more:,} more' if more > 0 else ''}",
            "mend these files",
        )


def _require_sides(name: str, source: ProblemsSource, split: ProblemSplit) -> None:
    """DataError if there is nothing to train on, or nothing to hold out."""
    if split.train and split.held_out:
        return
    if source.held_out_glob is None:
        setting = f"held_out_share = {source.held_out_share}"
    else:
        setting = f"held_out_glob = {source.held_out_glob!r}"
    raise DataError(
        f"data.sources.{name}.{setting}: {len(split.held_out):,} problems are held out and "
        f"{len(split.train):,} left, but both need some; change it, or give more problems in "
        f"data.sources.{name}.glob"
    )
