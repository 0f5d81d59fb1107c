"""Reads the items of evaluation sets, none of which training text may hold.

An item that is not read would stay in training text unseen. So nothing is set aside here as it is
of a source: what cannot be read ends the stage.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from configs.data import EvaluationSet
from configs.errors import DataError
from stages.data.faults import EVALUATIONS, Broken, fault, require_unchanged
from stages.data.files import read_rows
from stages.data.inputs import InputFile, known_files
from stages.data.reads import identify
from stages.data.rows import Row, Wanted
from stages.hashing import Hashes
from stages.overlap import LEAST_CHARS
from stages.rolling import batches, fold


def read_items(name: str, one: EvaluationSet, hashes: Hashes) -> tuple[list[str], int]:
    """The items, and how many of them are too short to be searched for.

    The text of each field of each row is one, in the order of files, rows and `text_fields`, and
    all of a file without rows. A field that a row lacks, or that is null or blank there, is passed
    over. DataError if files cannot be found or read, are broken or change meanwhile, if a row has
    text in none of the fields or something else than text in one, or if there is no item at all.
    """
    told = f"{EVALUATIONS}{name}"
    known = identify(told, one, hashes)
    items: list[str] = []
    broken: Broken | None = None
    textless = ""
    for where, found in _rows(told, one, known_files(told, one, hashes, known)):
        # Behind a fault the rest is read all the same: a file that changed is to be called that.
        if isinstance(found, Broken):
            broken = broken or found
            continue
        values = found.also or (found.text,)
        texts = [value for value in values if isinstance(value, str) and value.strip()]
        items += texts
        textless = textless or _fault(one, where, values, has_text=bool(texts))
    require_unchanged(told, one, known, identify(told, one, hashes))
    if broken is not None:
        what, _, remedy = broken.reason.rpartition("; ")
        raise fault(told, one, what, remedy)
    if not items:
        raise DataError(
            f"data.evaluations.{name}.text_fields = {list(one.text_fields)}: no row of "
            f"{one.glob!r} has text there; name the columns or keys that hold the items"
        )
    if textless:
        remedy = f"set data.evaluations.{name}.text_fields to those that hold text"
        raise fault(told, one, textless, f"{remedy}, or mend the row")
    return items, _count_short(items)


def _rows(
    told: str, one: EvaluationSet, files: Sequence[InputFile]
) -> Iterator[tuple[str, Row | Broken]]:
    """Every row with its place; its fields are the row's further values, as it may lack each."""
    setting = f"data.evaluations.{told.removeprefix(EVALUATIONS)}.text_fields"
    wanted = Wanted(setting, None, one.text_fields)
    for file in files:
        known: dict[str, Any] = {"bytes": file.bytes, "sha256": file.version}
        rows = read_rows(told, one, file.path, file.label, known, wanted, splits=False)
        for number, row in enumerate(rows, start=1):
            yield f"{file.label} row {number}", row


def _fault(one: EvaluationSet, where: str, values: Sequence[object], *, has_text: bool) -> str:
    """What is wrong with a row's values; nothing if they are text as far as there are any."""
    for field, value in zip(one.text_fields, values, strict=False):
        if value is not None and not isinstance(value, str):
            return f"{where} has no text in {field!r}, but {type(value).__name__}"
    return "" if has_text else f"{where} has text in none of {list(one.text_fields)}"


def _count_short(items: Sequence[str]) -> int:
    """How many have fewer than `LEAST_CHARS` of the characters that are compared."""
    sizes = (np.diff(fold(some)[2], prepend=0) for some in batches(items))
    return sum(int((one < LEAST_CHARS).sum()) for one in sizes)
